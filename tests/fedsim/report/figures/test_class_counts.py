"""What the picture of who holds what shows."""

from __future__ import annotations

import itertools

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection

from fedsim.errors import DataError
from fedsim.report.figures import style
from fedsim.report.figures.class_counts import class_counts


def partition_frame(rows):
    return pd.DataFrame(rows, columns=["client", "class", "labelled", "unlabelled"]).assign(test=1)


SMALL = partition_frame([(0, 0, 25, 75), (0, 1, 4, 0), (2, 0, 0, 16)])


def many_clients(num_clients=1000, num_classes=5):
    """Client k holds 4 labelled and 8 unlabelled examples of class k mod C, and one of class 0."""
    k = np.arange(num_clients)
    main = pd.DataFrame({"client": k, "class": k % num_classes, "labelled": 4, "unlabelled": 8})
    extra = main[main["class"] > 0].assign(**{"class": 0, "labelled": 0, "unlabelled": 1})
    return pd.concat([main, extra]).assign(test=0)


def texts(fig):
    """Return all words in a figure."""
    artists = fig.findobj(mpl.text.Text)
    return [t.get_text() for t in artists if t.get_text() and t.get_visible()]


def circles(ax):
    """Return the diameters (in cells) of the axes' circles: colour -> {(client, class): d}."""
    found = {}
    for collection in ax.collections:
        assert isinstance(collection, EllipseCollection)
        assert collection._units == "x"
        colour = mpl.colors.to_hex(collection.get_facecolor()[0])
        where = [tuple(int(v) for v in row) for row in collection.get_offsets()]
        diameters = dict(zip(where, collection.get_widths(), strict=True))
        found[colour.upper()] = diameters
    return found


class TestClassCountsOfFewClients:
    def test_area_is_proportional_to_the_count(self):
        drawn = circles(class_counts(SMALL, 3, 2, "run").axes[0])
        every, labelled = drawn[style.UNLABELLED], drawn[style.LABELLED]
        assert set(every) == {(0, 0), (0, 1), (2, 0)}
        assert (every[2, 0] / every[0, 0]) ** 2 == pytest.approx(16 / 100)
        assert (labelled[0, 0] / every[0, 0]) ** 2 == pytest.approx(25 / 100)
        # All labelled: the dark circle covers the light one; none labelled: no dark one.
        assert labelled[0, 1] == every[0, 1]
        assert labelled.get((2, 0), 0) == 0
        assert max(every.values()) < 1

    def test_rare_pairs_stay_visible_and_keep_their_share(self):
        frame = partition_frame([(0, 0, 0, 1_000_000), (0, 1, 1, 3)])
        drawn = circles(class_counts(frame, 1, 2, "run").axes[0])
        every, labelled = drawn[style.UNLABELLED], drawn[style.LABELLED]
        assert every[0, 1] > 0.1
        assert (labelled[0, 1] / every[0, 1]) ** 2 == pytest.approx(1 / 4)

    def test_totals_beside_and_above(self):
        fig = class_counts(SMALL, 3, 2, "run")
        _, right, top, _ = fig.axes
        assert [bar.get_width() for bar in right.patches] == [25, 4, 91, 0]
        assert [bar.get_height() for bar in top.patches] == [29, 0, 0, 75, 0, 16]
        assert {"116", "4", "3 clients, 2 classes, 120 training examples (24.2 % labelled)"} <= set(
            texts(fig)
        )

    def test_cells_are_squares(self):
        for count, classes in ((3, 2), (40, 10), (60, 40)):
            fig = class_counts(SMALL, count, classes, "run")
            box = fig.axes[0].get_window_extent()
            assert box.width / count == pytest.approx(box.height / classes)

    @pytest.mark.parametrize("count", [1, 4, 7, 30, 495, 12_345])
    def test_size_legend_does_not_overlap(self, count):
        fig = class_counts(partition_frame([(0, 0, 1, count - 1)]), 1, 1, "run")
        key = fig.axes[-1]
        assert f"{count:,}" in [t.get_text() for t in key.texts]
        fig.draw_without_rendering()
        boxes = [t.get_window_extent() for t in key.texts]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
        assert boxes[-1].x1 < fig.bbox.x1

    def test_client_without_examples_and_missing_pairs(self):
        fig = class_counts(SMALL, 5, 4, "run")
        assert fig.axes[0].get_xlim() == (-0.5, 4.5)
        assert fig.axes[0].get_ylim() == (3.5, -0.5)


def unknown_too(frame):
    """Client 0 holds 9 examples more, of class -1."""
    return pd.concat([frame, partition_frame([(0, -1, 0, 9)])])


def names_frame(**kinds):
    rows = [(kind, *pair) for kind, names in kinds.items() for pair in enumerate(names)]
    return pd.DataFrame(rows, columns=["kind", "number", "name"])


class TestNames:
    @pytest.mark.parametrize("count", [3, 12, 60])
    def test_all_clients_and_classes_are_named_and_nothing_overlaps(self, count):
        clients = [f"the hospital of town {k}" for k in range(count)]
        names = names_frame(**{"class": ["cat", "$x$ & $y$"], "client": clients})
        fig = class_counts(SMALL, count, 2, "run", names)
        fig.draw_without_rendering()
        main = fig.axes[0]
        below, left = main.get_xticklabels(), main.get_yticklabels()
        assert [label.get_text() for label in below] == [
            f"{'the hospital of town'[: 13 - len(str(k)) + 1].rstrip()}… ({k})"
            for k in range(count)
        ]
        assert [label.get_text() for label in left] == ["cat", r"\$x\$ & \$y\$"]
        for labels in (below, left):
            boxes = [label.get_window_extent() for label in labels]
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
            assert all(box.x0 > 0 and box.y0 > 0 for box in boxes)
        legend = fig.axes[-1].get_window_extent()
        assert main.xaxis.label.get_window_extent().y0 > legend.y1

    def test_a_name_that_the_font_lacks_leaves_its_place_to_the_number(self):
        names = names_frame(client=["北京", "", "Zoë"])
        main = class_counts(SMALL, 3, 2, "run", names).axes[0]
        assert [label.get_text() for label in main.get_xticklabels()] == ["0", "1", "Zoë"]

    @pytest.mark.parametrize(("count", "named"), [(20, True), (50, False)])
    def test_beside_a_heat_map_clients_are_named_where_there_is_room(self, count, named):
        names = names_frame(**{"class": map("c{}".format, range(50)), "client": "a" * count})
        fig = class_counts(many_clients(count, 50), count, 50, "run", names)
        fig.draw_without_rendering()
        below, left = fig.axes[0].get_xticklabels(), fig.axes[0].get_yticklabels()
        assert (below[0].get_text() == "a") == named
        assert {"c0", "c5", "c45"} <= {label.get_text() for label in left}


class TestUnknownClasses:
    def test_a_row_of_circles(self):
        fig = class_counts(unknown_too(SMALL), 3, 2, "run")
        main, right, top, _ = fig.axes
        every = circles(main)[style.UNLABELLED]
        assert (every[0, 2] / every[0, 0]) ** 2 == pytest.approx(9 / 100)
        assert [label.get_text() for label in main.get_yticklabels()] == ["0", "1", "?"]
        assert [bar.get_width() for bar in right.patches] == [25, 4, 0, 91, 0, 9]
        assert [bar.get_height() for bar in top.patches][3] == 75 + 9
        assert (
            "3 clients, 2 classes, 129 training examples (22.5 % labelled; ?: their class isn't"
            " known)" in texts(fig)
        )

    def test_however_many_they_are_the_others_can_be_seen(self):
        frame = pd.concat([SMALL, partition_frame([(0, -1, 0, 5000)])])
        fig = class_counts(frame, 3, 2, "run")
        main, right, _, key = fig.axes
        every = circles(main)[style.UNLABELLED]
        assert every[0, 2] == every[0, 0] == max(every.values())
        assert "≥ 100" in [t.get_text() for t in key.texts]
        assert "⋯ 5,000" in texts(fig)
        widths = [bar.get_width() for bar in right.patches]
        assert widths == pytest.approx([25, 4, 0, 91, 0, 1.2 * 116])
        more = partition_frame([(client, -1, 0, 9000) for client in range(1000)])
        fig = class_counts(pd.concat([many_clients(), more]), 1000, 5, "run")
        assert {ax.images[0].get_clim() for ax in fig.axes[:2]} == {(1.0, 8.0)}
        alone = pd.concat([many_clients().assign(unlabelled=0), more])  # no label is hidden
        fig = class_counts(alone, 1000, 5, "run")
        assert {ax.images[0].get_clim() for ax in fig.axes[:2]} == {(4.0, 40.0)}

    def test_a_row_of_a_heat_map(self):
        fig = class_counts(unknown_too(many_clients()), 1000, 5, "run")
        _, unlabelled = (ax.images[0].get_array() for ax in fig.axes[:2])
        assert unlabelled.shape == (6, 200)
        assert unlabelled[5].sum() == pytest.approx(9 / 5)  # a column is the mean over 5 clients
        held = next(ax for ax in fig.axes if ax.get_xlabel() == "Classes of a client")
        assert held.patches[0].get_data().values.tolist() == [0, 200, 800]
        # The most frequent class of a client is one that is known.
        more = pd.DataFrame({"client": range(0, 1000, 2), "class": -1, "labelled": 0})
        frame = pd.concat([many_clients(), more.assign(unlabelled=99, test=0)])
        labelled = class_counts(frame, 1000, 5, "run").axes[0].images[0].get_array().filled(0)
        kind = np.repeat(np.arange(5), 40)
        np.testing.assert_allclose(labelled[:5], 4.0 * (np.arange(5)[:, None] == kind))
        fig.draw_without_rendering()
        labels = [label.get_text() for label in fig.axes[0].get_yticklabels()]
        assert labels[labels.index("4") + 1 :] in (["?"], ["?", "?"])  # beyond the axis's end


class TestClassCountsOfManyClients:
    def test_heat_maps_are_means_over_clients_of_one_kind(self):
        fig = class_counts(many_clients(), 1000, 5, "run")
        labelled, unlabelled = (ax.images[0].get_array() for ax in fig.axes[:2])
        # 200 columns of 5 clients, 40 columns for each most frequent class.
        assert labelled.shape == unlabelled.shape == (5, 200)
        kind = np.repeat(np.arange(5), 40)
        expected = 4.0 * (np.arange(5)[:, None] == kind)
        np.testing.assert_allclose(labelled.filled(0), expected)
        expected *= 2
        expected[0, 40:] += 1
        np.testing.assert_allclose(unlabelled.filled(0), expected)

    def test_one_colour_scale_for_both(self):
        fig = class_counts(many_clients(), 1000, 5, "run")
        limits = {ax.images[0].get_clim() for ax in fig.axes[:2]}
        assert limits == {(1.0, 8.0)}

    def test_class_totals(self):
        fig = class_counts(many_clients(), 1000, 5, "run")
        totals = next(ax for ax in fig.axes if ax.get_title("left") == "Total of the class")
        widths = [bar.get_width() for bar in totals.patches]
        assert widths == [800] * 5 + [1600 + 800, 1600, 1600, 1600, 1600]

    def test_histograms(self):
        fig = class_counts(many_clients(), 1000, 5, "run")
        sizes = next(ax for ax in fig.axes if ax.get_xlabel() == "Training examples of a client")
        together, labelled = (patch.get_data() for patch in sizes.patches)
        count = dict(zip(together.edges[:-1] + 0.5, together.values, strict=True))
        assert (count[12], count[13], sum(count.values())) == (200, 800, 1000)
        count = dict(zip(labelled.edges[:-1] + 0.5, labelled.values, strict=True))
        assert (count[4], sum(count.values())) == (1000, 1000)
        held = next(ax for ax in fig.axes if ax.get_xlabel() == "Classes of a client")
        assert held.patches[0].get_data().values.tolist() == [0, 200, 800]

    def test_very_unequal_sizes_use_doubling_bins(self):
        frame = many_clients()
        frame.loc[frame["client"] == 0, "unlabelled"] = 996
        fig = class_counts(frame, 1000, 5, "run")
        sizes = next(ax for ax in fig.axes if ax.get_xlabel() == "Training examples of a client")
        data = sizes.patches[0].get_data()
        assert sizes.get_xscale() == "log"
        assert data.edges.tolist() == [2**i for i in range(11)]
        # 12 and 13 are in 8-15, the 1000 of client 0 in 512-1023.
        assert data.values.tolist() == [0, 0, 0, 999, 0, 0, 0, 0, 0, 1]

    def test_everything_labelled_is_one_map(self):
        frame = many_clients().assign(unlabelled=0)
        fig = class_counts(frame[frame["labelled"] > 0], 1000, 5, "run")
        assert [ax.get_title("left") for ax in fig.axes if ax.images] == ["Labelled examples"]

    def test_many_classes_for_few_clients_names_the_clients(self):
        frame = partition_frame([(0, 3, 1, 1), (1, 0, 1, 1), (2, 99, 1, 1)])
        ax = class_counts(frame, 3, 100, "run").axes[0]
        assert ax.images[0].get_array().shape == (100, 3)
        assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "0", "2"]

    def test_client_without_examples_comes_last(self):
        frame = many_clients()
        fig = class_counts(frame[frame["client"] > 5], 1000, 5, "run")
        columns = fig.axes[1].images[0].get_array().filled(0).sum(axis=0)
        assert columns[-1] == 0
        assert (columns[:-2] > 0).all()

    def test_draws_a_hundred_thousand_clients(self):
        fig = class_counts(many_clients(100_000, 10), 100_000, 10, "run")
        fig.draw_without_rendering()
        assert fig.axes[0].images[0].get_array().shape == (10, 200)


class TestClassCountsOfManyClasses:
    def test_neighbours_share_a_strip(self):
        # Two classes a strip; of classes 6 and 7 client 0 has 3 labelled and 1 unlabelled example.
        frame = partition_frame([(0, 6, 2, 1), (0, 7, 1, 0), (1, 999, 8, 4)])
        fig = class_counts(frame, 2, 1000, "run")
        labelled, unlabelled = (ax.images[0].get_array().filled(0) for ax in fig.axes[:2])
        assert labelled.shape == unlabelled.shape == (500, 2)
        assert (labelled[3, 0], labelled[499, 1], labelled.sum()) == (1.5, 4, 5.5)
        assert (unlabelled[3, 0], unlabelled[499, 1], unlabelled.sum()) == (0.5, 2, 2.5)
        totals = next(ax for ax in fig.axes if ax.get_title("left") == "Mean total of a class")
        dark, light = (patch.get_data() for patch in totals.patches)
        assert (dark.values[3], dark.values[499], dark.values.sum()) == (1.5, 4, 5.5)
        np.testing.assert_array_equal(light.baseline, dark.values)
        assert light.values.sum() == 8
        assert "Examples per client and class, mean over neighbouring classes (white: none)" in (
            texts(fig)
        )

    def test_classes_that_have_a_strip_each(self):
        frame = partition_frame([(0, 6, 2, 1), (0, 7, 1, 0), (1, 499, 8, 4)])
        fig = class_counts(frame, 2, 500, "run")
        assert fig.axes[0].images[0].get_array().filled(0)[[6, 7], 0].tolist() == [2, 1]
        totals = next(ax for ax in fig.axes if ax.get_title("left") == "Total of the class")
        dark, light = (patch.get_data() for patch in totals.patches)
        assert dark.values[[6, 7, 499]].tolist() == [2, 1, 8]
        assert light.values[[6, 7, 499]].tolist() == [3, 1, 12]
        assert dark.edges[[0, 6, 500]].tolist() == [-0.5, 5.5, 499.5]

    def test_what_nobody_knows_has_a_strip_of_its_own(self):
        frame = partition_frame([(0, 6, 2, 1), (1, -1, 0, 40), (1, 1002, 1, 0)])
        fig = class_counts(frame, 2, 1003, "run")
        unlabelled = fig.axes[1].images[0].get_array().filled(0)
        assert unlabelled.shape == (501, 2)
        assert unlabelled[500].sum() == 40

    @pytest.mark.parametrize("classes", [700, 1_000_000])
    def test_the_cost_is_bounded(self, classes):
        # Each of two clients holds one example of every class.
        frame = pd.DataFrame({"client": np.repeat([0, 1], classes), "labelled": 1, "unlabelled": 0})
        fig = class_counts(frame.assign(**{"class": [*range(classes)] * 2}), 2, classes, "run")
        assert len(fig.findobj(mpl.patches.Patch)) < 60
        held = next(ax for ax in fig.axes if ax.get_xlabel() == "Classes of a client")
        counts = held.patches[0].get_data().values
        assert len(counts) <= 300
        assert counts.sum() == 2
        np.testing.assert_allclose(fig.axes[0].images[0].get_array(), 1)


class TestClassCountsFailure:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ((3, 0, 1, 1), r"row 1 has client 3; must be in \[0, 3\)"),
            ((0, 2, 1, 1), r"row 1 has class 2; must be in \[-1, 2\)"),
            ((0, -2, 1, 1), r"row 1 has class -2; must be in \[-1, 2\)"),
            ((-1, 0, 1, 1), r"row 1 has client -1; must be in \[0, 3\)"),
        ],
    )
    def test_out_of_range(self, row, message):
        with pytest.raises(DataError, match=message):
            class_counts(partition_frame([(0, 0, 1, 1), row]), 3, 2, "run")

    def test_nothing_held(self):
        with pytest.raises(DataError, match="no client holds a training example"):
            class_counts(partition_frame([(0, 0, 0, 0)]), 3, 2, "run")

    def test_missing_column(self):
        with pytest.raises(DataError, match=r"partition\.csv: column 'labelled' is missing"):
            class_counts(SMALL.drop(columns="labelled"), 3, 2, "run")
