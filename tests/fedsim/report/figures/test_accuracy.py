"""What the figures of views show: their lines, bars and words; what personal models gain."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import DataError
from fedsim.report.figures import style
from fedsim.report.figures.accuracy import (
    accuracy_over_rounds,
    client_accuracy,
    gains,
    group_accuracy,
    personal_gain,
)

NAN = np.nan
VIEWS = ["generic", "generic-realigned", "personal", "personal-realigned"]


def rounds_frame(**changes):
    return pd.DataFrame(
        {
            "round": [1, 2, 3, 4],
            "generic_accuracy": [NAN, 0.5, NAN, 0.75],
            "personal_accuracy": [NAN, 0.4, NAN, 0.625],
            "head_accuracy": [NAN, 0.6, NAN, 0.9],
            "medium_accuracy": [NAN, 0.5, NAN, 0.7],
            "tail_accuracy": [NAN, 0.1, NAN, 0.25],
        }
        | changes
    )


def clients_frame(accuracy, *, round=4, view="generic"):
    count = len(accuracy)
    return pd.DataFrame(
        {"round": round, "client": np.arange(count), "view": view, "accuracy": accuracy}
    )


def all_views(**changes):
    """Return rounds of a method with all four views, each 10 points above the one before."""
    more = {"personal_accuracy": [NAN, 0.4, NAN, 0.6]}
    for i, view in enumerate(VIEWS[1:], start=1):
        name = view.replace("-", "_")
        if view != "personal":
            more[f"{name}_accuracy"] = [NAN, 0.3, NAN, 0.5 + i / 10]
        for j, group in enumerate(("head", "medium", "tail")):
            more[f"{name}_{group}_accuracy"] = [NAN, 0.1, NAN, (7 - 2 * j + i) / 10]
    return rounds_frame(**(more | changes))


def both_views(generic, personal, **more):
    return pd.concat(
        [clients_frame(generic, **more), clients_frame(personal, view="personal", **more)]
    )


def texts(fig):
    """Return all words in a figure."""
    artists = fig.findobj(mpl.text.Text)
    return [t.get_text() for t in artists if t.get_text() and t.get_visible()]


def curves(ax):
    """Return the labelled lines of the axes: name -> (x, y)."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in ax.lines
        if not line.get_label().startswith("_")
    }


def overlaps(fig):
    """Tell whether two of the words outside the axes cover each other in the drawn picture."""
    fig.draw_without_rendering()
    boxes = [t.get_window_extent() for ax in fig.axes for t in ax.texts]
    return any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


class TestAccuracyOverRounds:
    def test_draws_evaluated_rounds_in_percent(self):
        fig = accuracy_over_rounds(rounds_frame(), "run")
        assert curves(fig.axes[0]) == {
            "generic": ([2, 4], [50, 75]),
            "personal": ([2, 4], [40, 62.5]),
        }
        assert {"generic 75.0 %", "personal 62.5 %", "Accuracy (%)", "Round", "run"} <= set(
            texts(fig)
        )

    def test_view_without_values_is_left_out(self):
        fig = accuracy_over_rounds(rounds_frame(personal_accuracy=NAN), "run")
        assert list(curves(fig.axes[0])) == ["generic"]

    def test_every_view_that_a_method_has_in_order(self):
        fig = accuracy_over_rounds(all_views(), "run")
        ax = fig.axes[0]
        drawn = curves(ax)
        assert list(drawn) == VIEWS
        assert [y[-1] for _, y in drawn.values()] == pytest.approx([75, 60, 60, 80])
        lines = {line.get_label(): line for line in ax.lines}
        assert {name: line.get_color() for name, line in lines.items()} == style.VIEW_COLOURS
        assert [lines[view].get_linestyle() for view in VIEWS] == ["-", "--", "-", "--"]
        assert {"generic-realigned 60.0 %", "personal-realigned 80.0 %"} <= set(texts(fig))
        assert not overlaps(fig)

    def test_method_without_a_generic_model(self):
        fig = accuracy_over_rounds(rounds_frame(generic_accuracy=NAN), "run")
        assert list(curves(fig.axes[0])) == ["personal"]
        assert not any("Generic" in text or "nan" in text for text in texts(fig))

    def test_axis_covers_all_views(self):
        fig = accuracy_over_rounds(all_views(personal_realigned_accuracy=[NAN, 0, NAN, 1]), "run")
        low, high = fig.axes[0].get_ylim()
        assert low <= 0
        assert high >= 100

    def test_single_round_is_a_mark_with_one_tick(self):
        fig = accuracy_over_rounds(rounds_frame().iloc[1:2], "run")
        fig.draw_without_rendering()
        ax = fig.axes[0]
        assert curves(ax)["generic"] == ([2], [50])
        assert ax.lines[0].get_marker() == "o"
        inside = [t for t in ax.get_xticks() if ax.get_xlim()[0] <= t <= ax.get_xlim()[1]]
        assert inside == [2]

    def test_a_thousand_rounds_have_no_marks(self):
        count = 1000
        frame = pd.DataFrame(
            {
                "round": np.arange(1, count + 1),
                "generic_accuracy": np.linspace(0.1, 0.9, count),
                "personal_accuracy": np.linspace(0.1, 0.9, count),
            }
        )
        line = accuracy_over_rounds(frame, "run").axes[0].lines[0]
        assert len(line.get_xdata()) == count
        assert line.get_marker() == ""

    def test_equal_ends_have_labels_apart(self):
        fig = accuracy_over_rounds(rounds_frame(personal_accuracy=[NAN, 0.4, NAN, 0.75]), "run")
        assert not overlaps(fig)

    def test_no_evaluated_round(self):
        frame = rounds_frame(generic_accuracy=NAN, personal_accuracy=NAN)
        with pytest.raises(DataError, match=r"rounds\.csv: no evaluated round"):
            accuracy_over_rounds(frame, "run")

    def test_missing_column(self):
        with pytest.raises(DataError, match="column 'personal_accuracy' is missing; it has round"):
            accuracy_over_rounds(rounds_frame().drop(columns="personal_accuracy"), "run")


class TestClientAccuracy:
    def test_sorted_with_mean_and_worst(self):
        accuracy = np.array([0.9, 0.5, NAN, 0.7])
        frame = pd.concat([clients_frame([0.1] * 4, round=2), clients_frame(accuracy)])
        fig = client_accuracy(frame, "run")
        ax = fig.axes[0]
        x, y = curves(ax)["generic"]
        assert x == [1, 2, 3]
        assert y == pytest.approx([50, 70, 90])
        assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "3", "0"]
        assert {"mean 70.0 %", "worst 10 %: 50.0 %"} <= set(texts(fig))
        levels = [line.get_ydata()[0] for line in ax.lines if line.get_label().startswith("_")]
        assert sorted(levels) == pytest.approx([50, 70])
        assert any("Round 4, 3 clients" in t and "left out: 1" in t for t in texts(fig))

    def test_shades_the_worst_tenth(self):
        fig = client_accuracy(clients_frame(np.linspace(0, 1, 50)), "run")
        band = fig.axes[0].patches[0].get_extents().transformed(fig.axes[0].transData.inverted())
        assert (band.x0, band.x1) == pytest.approx((0.5, 5.5))

    def test_each_view_has_its_colour_order_and_labels(self):
        frame = pd.concat(
            [
                clients_frame([0.2, 0.4]),
                clients_frame([0.8, 0.6], view="personal"),
                clients_frame([0.9, 0.9], view="tuned"),
            ]
        )
        fig = client_accuracy(frame, "run")
        drawn = curves(fig.axes[0])
        assert drawn["generic"][1] == pytest.approx([20, 40])
        assert drawn["personal"][1] == pytest.approx([60, 80])
        assert drawn["tuned"][1] == pytest.approx([90, 90])
        lines = [line for line in fig.axes[0].lines if line.get_label() in drawn]
        assert len({line.get_color() for line in lines}) == 3
        assert {"generic: mean 30.0 %", "personal: worst 10 %: 60.0 %"} <= set(texts(fig))
        assert not overlaps(fig)

    def test_four_views_have_the_colours_of_their_rounds(self):
        frame = pd.concat([clients_frame([0.5, 0.6 + i / 10], view=v) for i, v in enumerate(VIEWS)])
        fig = client_accuracy(frame, "run")
        ax = fig.axes[0]
        drawn = {x.get_label(): x.get_color() for x in ax.lines if x.get_label() in VIEWS}
        assert drawn == style.VIEW_COLOURS
        assert list(drawn) == VIEWS
        # Eight levels across the picture would hide the clients.
        levels = [line for line in ax.lines if line.get_label().startswith("_")]
        assert len(levels) == 8
        assert all(line.get_xdata()[0] > 0.9 for line in levels)
        assert not overlaps(fig)

    def test_view_of_which_nothing_is_known(self):
        # As of a method without a generic model: nobody is without test examples.
        fig = client_accuracy(both_views([NAN] * 3, [0.5, 0.6, 0.7]), "run")
        assert list(curves(fig.axes[0])) == ["personal"]
        assert {"mean 60.0 %", "Round 4, 3 clients; shaded: the worst 10 %"} <= set(texts(fig))

    def test_a_hundred_thousand_clients(self):
        accuracy = np.random.default_rng(0).random(100_000)
        fig = client_accuracy(clients_frame(accuracy), "run")
        y = np.array(curves(fig.axes[0])["generic"][1])
        np.testing.assert_allclose(y, 100 * np.sort(accuracy))

    @pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
    def test_all_equal(self, value):
        fig = client_accuracy(clients_frame([value] * 3), "run")
        low, high = fig.axes[0].get_ylim()
        assert low < 100 * value < high
        assert not overlaps(fig)

    @pytest.mark.parametrize("accuracy", [[], [NAN, NAN]])
    def test_nobody_evaluated(self, accuracy):
        with pytest.raises(DataError, match="no round has a client accuracy"):
            client_accuracy(clients_frame(accuracy), "run")


@pytest.mark.parametrize("draw", [client_accuracy, personal_gain])
@pytest.mark.parametrize("names", [["a", "b", "c"], ["$a", "the second of them", "c$"]])
def test_few_clients_are_named_in_their_order(draw, names):
    frame = clients_frame([0.5, 0.9, 0.7])
    if draw is personal_gain:
        generic = clients_frame([0.5, 0.5, 0.5])
        frame = pd.concat([generic, frame.assign(view="personal")])
    names = pd.DataFrame({"kind": "client", "number": range(3), "name": names})
    ax = draw(frame, "run", names).axes[0]
    ax.figure.draw_without_rendering()
    labels = [label.get_text().replace("\\", "") for label in ax.get_xticklabels()]
    assert labels == names["name"][[0, 2, 1]].tolist()
    assert ax.get_window_extent().height > 3 * ax.figure.dpi  # what `label_ends` counts on
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert not boxes[0].overlaps(boxes[1])
    assert not boxes[1].overlaps(boxes[2])


class TestGroupAccuracy:
    def test_bars_of_the_last_evaluated_round(self):
        fig = group_accuracy(rounds_frame(), "run")
        heights = [bar.get_height() for bar in fig.axes[0].patches]
        assert heights == pytest.approx([90, 70, 25])
        assert {"90.0 %", "70.0 %", "25.0 %"} <= set(texts(fig))
        assert any("Round 4" in t for t in texts(fig))

    def test_group_without_classes_is_left_out_and_named(self):
        fig = group_accuracy(rounds_frame(medium_accuracy=NAN), "run")
        ax = fig.axes[0]
        assert [bar.get_height() for bar in ax.patches] == pytest.approx([90, 25])
        assert [t.get_text() for t in ax.get_xticklabels()] == ["head", "tail"]
        assert any("no classes in: medium" in t for t in texts(fig))

    def test_no_evaluated_round(self):
        frame = rounds_frame(head_accuracy=NAN, medium_accuracy=NAN, tail_accuracy=NAN)
        with pytest.raises(DataError, match="no round has a head, medium or tail accuracy"):
            group_accuracy(frame, "run")

    def test_several_views_are_clusters_in_order(self):
        fig = group_accuracy(all_views(), "run")
        ax = fig.axes[0]
        fig.draw_without_rendering()
        assert [t.get_text() for t in ax.get_xticklabels()] == VIEWS
        bars = {bars.get_label(): bars for bars in ax.containers}
        assert list(bars) == ["head", "medium", "tail"]
        heights = {name: [bar.get_height() for bar in group] for name, group in bars.items()}
        assert heights["head"] == pytest.approx([90, 80, 90, 100])
        assert heights["medium"] == pytest.approx([70, 60, 70, 80])
        assert heights["tail"] == pytest.approx([25, 40, 50, 60])
        # From left to right: the three groups of a view, then those of the next one.
        place = sorted((bar.get_x(), name) for name, group in bars.items() for bar in group)
        assert [name for _, name in place] == ["head", "medium", "tail"] * 4
        for name, group in bars.items():
            colours = {mpl.colors.to_hex(bar.get_facecolor()).upper() for bar in group}
            assert colours == {style.GROUP_COLOURS[name].upper()}
        legend = [t.get_text() for t in ax.get_legend().get_texts()]
        assert legend == ["head", "medium", "tail"]
        assert {"25.0", "100.0"} <= set(texts(fig))
        assert not overlaps(fig)

    def test_view_without_values_is_left_out(self):
        frame = all_views(
            **dict.fromkeys([f"personal_{g}_accuracy" for g in ("head", "medium", "tail")], NAN)
        )
        ax = group_accuracy(frame, "run").axes[0]
        names = [t.get_text() for t in ax.get_xticklabels()]
        assert names == ["generic", "generic-realigned", "personal-realigned"]

    def test_group_of_one_view_only_leaves_a_gap(self):
        fig = group_accuracy(all_views(generic_realigned_tail_accuracy=NAN), "run")
        tail = fig.axes[0].containers[2]
        assert [bar.get_height() for bar in tail] == pytest.approx([25, 50, 60])
        assert [round(bar.get_x()) for bar in tail] == [0, 2, 3]
        assert not any("no classes" in t for t in texts(fig))

    def test_group_without_classes_in_any_view(self):
        names = [name for name in all_views().columns if name.endswith("medium_accuracy")]
        assert len(names) == 4
        fig = group_accuracy(all_views(**dict.fromkeys(names, NAN)), "run")
        assert [bars.get_label() for bars in fig.axes[0].containers] == ["head", "tail"]
        assert any("no classes in: medium" in t for t in texts(fig))

    def test_personal_view_only_is_drawn_as_a_single_view(self):
        groups = {f"personal_{g}_accuracy": [NAN, NAN, NAN, 0.5] for g in ("head", "medium")}
        none = dict.fromkeys(["head_accuracy", "medium_accuracy", "tail_accuracy"], NAN)
        frame = rounds_frame(generic_accuracy=NAN, **none, **groups, personal_tail_accuracy=NAN)
        fig = group_accuracy(frame, "run")
        assert [bar.get_height() for bar in fig.axes[0].patches] == [50, 50]
        assert any("Round 4, personal model, mean over the clients" in t for t in texts(fig))

    def test_column_of_a_group_is_missing(self):
        frame = all_views().drop(columns="personal_tail_accuracy")
        with pytest.raises(DataError, match="column 'personal_tail_accuracy' is missing"):
            group_accuracy(frame, "run")


SCORES = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=30)


class TestGains:
    @given(SCORES)
    def test_difference_of_each_client_in_points_from_least_to_most(self, scores):
        generic, personal = (np.array(right) / 7 for right in zip(*scores, strict=True))
        gain = gains(both_views(generic, personal).sample(frac=1, random_state=0))
        assert sorted(gain.index) == list(range(len(scores)))
        assert (np.diff(gain) >= 0).all()
        expected = [100 * (b - a) / 7 for a, b in scores]
        np.testing.assert_allclose([gain[k] for k in range(len(scores))], expected, atol=1e-8)
        # Equal counts are level, whatever the rounding of the shares.
        assert (gain == 0).sum() == sum(a == b for a, b in scores)

    def test_last_evaluated_round_and_clients_with_both(self):
        frame = pd.concat(
            [
                both_views([0.1] * 4, [0.9] * 4, round=2),
                both_views([0.5, 0.5, NAN, 0.5], [0.25, 0.75, 0.5, NAN]),
                both_views([NAN] * 4, [NAN] * 4, round=6),
                clients_frame([1.0] * 4, view="personal-realigned"),
            ]
        )
        assert gains(frame).to_dict() == {0: -25, 1: 25}

    @pytest.mark.parametrize(
        "frame",
        [pd.DataFrame(), clients_frame([0.5]), both_views([NAN], [0.5]), clients_frame([NAN])],
        ids=["no columns", "one view", "no generic model", "never evaluated"],
    )
    def test_nobody(self, frame):
        assert gains(frame).empty


class TestPersonalGain:
    def test_bars_from_least_to_most_coloured_by_sign(self):
        frame = both_views([0.5, 0.5, 0.5, NAN, 0.5], [0.75, 0.25, 0.5, NAN, 1.0])
        fig = personal_gain(frame, "run")
        fig.draw_without_rendering()
        ax = fig.axes[0]
        bars = sorted(ax.patches, key=lambda bar: bar.get_x())
        assert [bar.get_height() for bar in bars] == [-25, 25, 50]
        # The client in second place is level: no bar there.
        assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([1, 3, 4])
        colours = [mpl.colors.to_hex(bar.get_facecolor()).upper() for bar in bars]
        assert colours == [style.VIEW_COLOURS[v] for v in ("generic", "personal", "personal")]
        assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "0", "4"]
        note = "Round 4, 4 clients: 2 gain, 1 lose, 1 level; without test examples, left out: 1"
        assert {note, "mean +12.5 points"} <= set(texts(fig))
        assert 12.5 in [line.get_ydata()[0] for line in ax.lines]

    def test_client_with_one_of_the_views_is_counted_apart(self):
        fig = personal_gain(both_views([0.5, 0.5, NAN], [0.5, NAN, NAN]), "run")
        assert any(
            "1 level; without test examples, left out: 1; with one of the two views only, "
            "left out: 1" in " ".join(text.split())
            for text in texts(fig)
        )

    def test_many_clients_are_two_areas(self):
        generic, personal = np.full(300, 0.5), np.linspace(0.4, 0.9, 300)
        fig = personal_gain(both_views(generic, personal), "run")
        above, below = (patch.get_data() for patch in fig.axes[0].patches)
        expected = 100 * (personal - generic)
        np.testing.assert_allclose(above.values, np.maximum(expected, 0), atol=1e-8)
        np.testing.assert_allclose(below.values, np.minimum(expected, 0), atol=1e-8)
        np.testing.assert_allclose(above.edges, np.arange(301) + 0.5)

    def test_all_level(self):
        fig = personal_gain(both_views([0.5] * 3, [0.5] * 3), "run")
        low, high = fig.axes[0].get_ylim()
        assert low < 0 < high
        assert "mean 0.0 points" in texts(fig)


class TestPersonalGainFailure:
    @pytest.mark.parametrize(
        ("frame", "has"),
        [
            (clients_frame([0.5]), "generic"),
            (clients_frame([0.5], view="personal"), "personal"),
            (both_views([NAN], [0.5]), "personal"),
        ],
    )
    def test_a_view_is_missing(self, frame, has):
        with pytest.raises(DataError, match=f"both views, .*, in round 4, only of: {has};"):
            personal_gain(frame, "run")

    def test_never_evaluated(self):
        with pytest.raises(DataError, match="no round has a client accuracy"):
            personal_gain(both_views([NAN], [NAN]), "run")

    def test_missing_column(self):
        with pytest.raises(DataError, match=r"clients\.csv: column 'view' is missing"):
            personal_gain(clients_frame([0.5]).drop(columns="view"), "run")
