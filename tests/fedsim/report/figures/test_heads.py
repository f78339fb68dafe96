"""What the figures of heads show: norms by class frequency, cosines of all pairs."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from fedsim.errors import DataError
from fedsim.report.figures import style
from fedsim.report.figures.heads import etf_angles, norms_by_frequency

NAN = np.nan


def norms_frame(num_classes=3, **heads):
    """Return a row for each head and class; class c has 10 c examples: the last is the largest."""
    classes = np.arange(num_classes)
    rows = [
        pd.DataFrame(
            {"head": name.replace("_", " "), "class": classes, "examples": 10 * classes, "norm": y}
        )
        for name, y in heads.items()
    ]
    return pd.concat(rows)


def simplex(num_classes, features=None):
    """Return rows of norm 0.1 with all pairwise cosines -1/(C-1), by hand: I - 1/C, scaled."""
    rows = np.eye(num_classes, features or num_classes)
    rows[:, :num_classes] -= 1 / num_classes
    return 0.1 * rows / np.linalg.norm(rows, axis=1, keepdims=True)


def texts(fig):
    """Return all words in a figure, with plain spaces and minus signs, on one line each."""
    artists = fig.findobj(mpl.text.Text)
    shown = [t.get_text() for t in artists if t.get_visible()]
    return [" ".join(t.replace("−", "-").split()) for t in shown if t]


def curves(ax):
    """Return the labelled lines of the axes: name -> (x, y)."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in ax.lines
        if not line.get_label().startswith("_")
    }


class TestNormsByFrequency:
    def test_classes_from_most_to_least_frequent(self):
        fig = norms_by_frequency(
            norms_frame(global_head=[0.5, 1.0, 2.0], fixed_ETF=[0.1] * 3), "run"
        )
        fig.draw_without_rendering()
        upper, lower = fig.axes
        assert curves(upper) == {
            "global head": ([1, 2, 3], [2.0, 1.0, 0.5]),
            "fixed ETF": ([1, 2, 3], [0.1, 0.1, 0.1]),
        }
        assert [bar.get_height() for bar in lower.patches] == [20, 10, 0]
        assert [t.get_text() for t in lower.get_xticklabels()] == ["2", "1", "0"]
        assert {"global head", "fixed ETF", "Norm", "Examples", "run"} <= set(texts(fig))

    def test_equally_frequent_classes_come_by_number(self):
        frame = norms_frame(head=[1.0, 2.0, 3.0]).assign(examples=5).iloc[::-1]
        assert curves(norms_by_frequency(frame, "run").axes[0])["head"][1] == [1.0, 2.0, 3.0]

    def test_norms_stand_above_zero(self):
        upper = norms_by_frequency(norms_frame(head=[0.9, 1.0, 1.1]), "run").axes[0]
        low, high = upper.get_ylim()
        assert low == 0
        assert high > 1.1

    def test_classes_are_marked_only_if_few(self):
        for count, marker in ((40, "o"), (41, "")):
            upper, lower = norms_by_frequency(norms_frame(count, head=1.0), "run").axes
            assert upper.lines[0].get_marker() == marker
            assert len(lower.patches) == (count if marker else 1)  # one outline of many bars

    def test_heads_keep_the_colours_of_their_views(self):
        frame = norms_frame(**{"fixed_ETF": 0.1, "personal_heads_(mean)": 1.0, "global_head": 2.0})
        lines = norms_by_frequency(frame, "run").axes[0].lines
        colours = {line.get_label(): line.get_color() for line in lines}
        assert colours["global head"] == style.VIEW_COLOURS["generic"]
        assert colours["personal heads (mean)"] == style.VIEW_COLOURS["personal"]
        assert len(set(colours.values())) == 3

    def test_labels_of_equal_heads_do_not_overlap(self):
        fig = norms_by_frequency(norms_frame(a=[1.0] * 3, b=[1.0] * 3, c=[1.0] * 3), "run")
        fig.draw_without_rendering()
        boxes = [t.get_window_extent() for t in fig.axes[0].texts]
        assert len(boxes) == 3
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])

    def test_unknown_norms_are_gaps_and_unknown_heads_left_out(self):
        fig = norms_by_frequency(norms_frame(a=[1.0, NAN, NAN], b=NAN), "run")
        assert list(curves(fig.axes[0])) == ["a"]
        np.testing.assert_array_equal(curves(fig.axes[0])["a"][1], [NAN, NAN, 1.0])
        assert "a" in texts(fig)


def test_classes_are_named():
    names = pd.DataFrame({"kind": "class", "number": range(3), "name": ["ape", "$bee$", "cat"]})
    _, lower = norms_by_frequency(norms_frame(global_head=[1.0, 2.0, 3.0]), "run", names).axes
    labels = [label.get_text() for label in lower.get_xticklabels()]
    assert labels == ["cat", r"\$bee\$", "ape"]
    ax = etf_angles(simplex(3), "run", names).axes[0]
    for axis in (ax.xaxis, ax.yaxis):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        assert labels == ["ape", r"\$bee\$", "cat"]


class TestNormsByFrequencyFailure:
    @pytest.mark.parametrize(
        ("frame", "message"),
        [
            (norms_frame(a=1.0).drop(columns="norm"), "class norms: column 'norm' is missing"),
            (norms_frame(a=NAN), "no norm is known"),
            (norms_frame(a=1.0).iloc[:0], "no norm is known"),
            (pd.concat([norms_frame(a=1.0)] * 2), "'a' has class 0 twice"),
            (
                pd.concat([norms_frame(a=1.0), norms_frame(b=1.0).replace({"examples": {20: 7}})]),
                "class 2 has 20, 7 examples",
            ),
        ],
    )
    def test_frame(self, frame, message):
        with pytest.raises(DataError, match=message):
            norms_by_frequency(frame, "run")


class TestEtfAngles:
    def test_cosines_of_all_pairs_without_the_diagonal(self):
        weight = np.array([[3.0, 0, 0], [3, 4, 0], [0, -2, 0]])
        image = etf_angles(weight, "run").axes[0].images[0].get_array()
        expected = [[NAN, 0.6, 0], [0.6, NAN, -0.8], [0, -0.8, NAN]]
        np.testing.assert_allclose(image.filled(NAN), expected, atol=1e-12)

    def test_of_many_classes_one_in_a_few(self, monkeypatch):
        monkeypatch.setattr("fedsim.report.figures.heads._MOST_CELLS", 3)
        weight = np.eye(7, 8)
        weight[4, 0] = -1.0  # at 135 degrees to class 0
        weight[5] = weight[1]
        fig = etf_angles(weight, "run")
        image = fig.axes[0].images[0]
        expected = [[NAN, 0, 0], [0, NAN, 0], [0, 0, NAN]]  # of classes 0, 3 and 6
        np.testing.assert_array_equal(image.get_array().filled(NAN), expected)
        assert image.get_extent() == [-0.5, 8.5, 8.5, -0.5]
        assert fig.axes[0].get_xlabel() == "Class (one in 3 is drawn)"
        assert image.get_clim() == (-1, 1)
        [note] = [text for text in texts(fig) if "angles" in text]
        assert note.startswith("7 classes, ")
        assert "min 0.00°" in note  # classes 1 and 5

    def test_colours_are_centred_at_zero(self):
        for weight in (np.array([[1.0, 0], [1, 0.5]]), simplex(10), simplex(100, 128)):
            fig = etf_angles(weight, "run")
            low, high = fig.axes[0].images[0].get_clim()
            assert low == -high
            assert high <= 1

    @pytest.mark.parametrize(("count", "angle"), [(2, "180.00"), (10, "96.38"), (100, "90.58")])
    def test_ideal(self, count, angle):
        # arccos(-1/9) = 96.38 degrees, arccos(-1/99) = 90.58.
        note = next(t for t in texts(etf_angles(simplex(count), "run")) if "angles" in t)
        assert f"{count} classes, angles: ideal {angle}° (cosine {-1 / (count - 1):.4f})" in note
        assert f"mean {angle}°, min {angle}°, std 0.00°, norms 0.1000 to 0.1000" in note

    def test_note_of_an_uneven_classifier(self):
        # Angles 90, 45 and 45 degrees; 5 of 9 entries are zero; norms 1, 2 and sqrt(2).
        weight = np.array([[1.0, 0, 0], [0, 2, 0], [1, 1, 0]])
        note = next(t for t in texts(etf_angles(weight, "run")) if "angles" in t)
        assert "ideal 120.00° (cosine -0.5000), mean 60.00°, min 45.00°" in note
        assert "norms 1.0000 to 2.0000, sparsity 55.6 %" in note

    def test_numbers_in_the_cells_only_if_few(self):
        fig = etf_angles(simplex(3), "run")
        assert texts(fig).count("-0.50") >= 6
        assert not etf_angles(simplex(30), "run").axes[0].texts

    def test_ideal_is_marked_on_the_colour_bar(self):
        bar = etf_angles(simplex(5), "run").axes[1]
        assert [line.get_ydata()[0] for line in bar.lines] == [-0.25]

    def test_single_precision_and_read_only(self):
        weight = simplex(10).astype(np.float32)
        weight.flags.writeable = False
        fig = etf_angles(weight, "run")
        image = fig.axes[0].images[0].get_array()
        np.testing.assert_allclose(image.compressed(), -1 / 9, atol=1e-6)


class TestEtfAnglesFailure:
    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (np.ones(4), r"shape \[4\].*at least 2 classes"),
            (np.ones((1, 4)), r"shape \[1, 4\].*at least 2 classes"),
            (np.array([[1.0, 0], [0, 0]]), "row 1 .* norm 0"),
            (np.array([[NAN, 0], [0, 1]]), "row 0 .* norm nan"),
        ],
    )
    def test_weight(self, weight, message):
        with pytest.raises(DataError, match=message):
            etf_angles(weight, "run")
