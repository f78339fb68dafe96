"""What is said of a run's pseudo-labels: the shares of each round, and their picture."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import DataError
from fedsim.report.figures.one_run import save_figures
from fedsim.report.figures.pseudo_labels import by_round, pseudo_labels

NAN = np.nan
GROUPS = ("head", "medium", "tail")
COLUMNS = ["round", "kept", "local", "accuracy", *(f"{g}_accuracy" for g in GROUPS)]


def row(round, client=0, *, seen=0, local=NAN, **groups):
    """Return a client's row; each group is (kept, correct), (0, 0) if not given."""
    counts = {name: groups.get(name, (0, 0)) for name in GROUPS}
    return {
        "round": round,
        "client": client,
        "num_examples": 50,
        "train_loss": 1.5,
        "pseudo_seen": seen,
        "pseudo_kept": sum(kept for kept, _ in counts.values()),
        "pseudo_local": local,
        "pseudo_correct": sum(correct for _, correct in counts.values()),
        **{f"pseudo_kept_{name}": kept for name, (kept, _) in counts.items()},
        **{f"pseudo_correct_{name}": correct for name, (_, correct) in counts.items()},
    }


def warm_up(round, client=0):
    """Return the row of a client that trained without a pseudo-labelling pass."""
    return {"round": round, "client": client, "num_examples": 50, "train_loss": 2.0}


TWO_CLIENTS = pd.DataFrame(
    [
        row(1, 0, seen=100, local=10, head=(30, 27), medium=(8, 4), tail=(2, 0)),
        row(1, 1, seen=20, local=5, head=(4, 3), medium=(0, 0), tail=(6, 3)),
    ]
)


def test_accuracy_is_that_of_the_labels_whose_truth_is_known():
    counts = row(1, seen=100, head=(30, 27), tail=(10, 3))
    counts["pseudo_kept"] += 20  # of examples whose class nobody knows
    check(by_round(pd.DataFrame([counts])), kept=[0.6], accuracy=[30 / 40], head_accuracy=[0.9])
    said = " ".join(texts(pseudo_labels(pd.DataFrame([counts]), "run")))
    assert "true labels, all clients of a round together. The true label is known of 67 %." in said


def many_rounds(count):
    """Return rounds in which the tail is right in every second one, the head in 3 of 4 labels."""
    return pd.DataFrame(
        [row(r, seen=20, local=5, head=(8, 6), tail=(2, 2 * (r % 2))) for r in range(1, count + 1)]
    )


def check(frame, **expected):
    """Compare the columns named, each given as the values of the rounds."""
    for name, values in expected.items():
        np.testing.assert_allclose(frame[name], values, err_msg=name)


class TestByRound:
    def test_counts_of_the_clients_are_summed_before_they_are_divided(self):
        frame = by_round(TWO_CLIENTS)
        assert list(frame.columns) == COLUMNS
        # 40 of 100 and 10 of 20 are kept; the mean of the clients' shares would be 0.45.
        check(
            frame,
            round=[1],
            kept=[50 / 120],
            local=[15 / 50],
            accuracy=[37 / 50],
            head_accuracy=[30 / 34],
            medium_accuracy=[4 / 8],
            tail_accuracy=[3 / 8],
        )

    def test_rounds_come_in_order(self):
        rows = [row(r, seen=10, head=(r, 1)) for r in (10, 2, 1)]
        frame = by_round(pd.DataFrame(rows))
        check(frame, round=[1, 2, 10], kept=[0.1, 0.2, 1.0], accuracy=[1, 1 / 2, 1 / 10])

    def test_nothing_kept_in_a_round(self):
        rows = [row(1, seen=10, local=0), row(2, seen=10, local=1, head=(4, 3))]
        check(
            by_round(pd.DataFrame(rows)),
            round=[1, 2],
            kept=[0, 0.4],
            local=[NAN, 0.25],
            accuracy=[NAN, 0.75],
            head_accuracy=[NAN, 0.75],
            tail_accuracy=[NAN, NAN],
        )

    def test_warm_up_rounds_and_clients_do_not_count(self):
        rows = [
            warm_up(1, 0),
            row(2, 0, seen=0),
            warm_up(3, 0),
            row(3, 1, seen=10, local=2, head=(4, 3)),
        ]
        frame = by_round(pd.DataFrame(rows))
        check(frame, round=[3], kept=[0.4], local=[0.5], accuracy=[0.75])

    @pytest.mark.parametrize(
        "training", [TWO_CLIENTS.drop(columns="pseudo_local"), TWO_CLIENTS.assign(pseudo_local=NAN)]
    )
    def test_one_teacher(self, training):
        check(by_round(training), local=[NAN], kept=[50 / 120], accuracy=[37 / 50])

    def test_local_share_is_of_the_clients_where_it_is_known(self):
        rows = [row(1, 0, seen=9, local=3, head=(4, 1)), row(1, 1, seen=9, head=(6, 1))]
        check(by_round(pd.DataFrame(rows)), local=[3 / 4], kept=[10 / 18])

    def test_without_labels_a_client_has_no_model_of_its_own(self):
        rows = [row(1, 0, seen=9, local=3, head=(4, 1)), row(1, 1, seen=9, local=6, head=(6, 1))]
        frame = by_round(pd.DataFrame(rows).assign(has_labels=[1.0, 0.0]))
        check(frame, local=[3 / 4], kept=[10 / 18])

    @pytest.mark.parametrize(
        "training",
        [
            pd.DataFrame(),
            pd.DataFrame([warm_up(1), warm_up(2)]),
            pd.DataFrame([row(1, seen=0), row(2, seen=0)]),
            TWO_CLIENTS.drop(columns="pseudo_correct_tail"),
            TWO_CLIENTS.iloc[:0],
        ],
        ids=["no columns", "other method", "nothing seen", "a column is missing", "no rows"],
    )
    def test_no_pseudo_labels_is_an_empty_frame(self, training):
        frame = by_round(training)
        assert frame.empty
        assert list(frame.columns) == COLUMNS

    def test_same_when_read_back_from_csv(self, tmp_path):
        training = pd.DataFrame([warm_up(1), *TWO_CLIENTS.assign(round=2).to_dict("records")])
        training.to_csv(tmp_path / "training.csv", index=False)
        read = by_round(pd.read_csv(tmp_path / "training.csv"))
        pd.testing.assert_frame_equal(read, by_round(training))
        check(read, round=[2], accuracy=[37 / 50])

    def test_frame_given_is_left_as_it_was(self):
        before = TWO_CLIENTS.copy()
        by_round(TWO_CLIENTS)
        pd.testing.assert_frame_equal(TWO_CLIENTS, before)

    @settings(max_examples=40)
    @given(
        st.lists(
            st.tuples(st.integers(1, 4), *[st.tuples(st.integers(0, 9), st.integers(0, 9))] * 3),
            min_size=1,
            max_size=12,
        )
    )
    def test_shares_of_any_counts(self, clients):
        rows = [
            row(
                r,
                seen=30,
                local=0,
                **{g: (max(pair), min(pair)) for g, pair in zip(GROUPS, pairs, strict=True)},
            )
            for r, *pairs in clients
        ]
        frame = by_round(pd.DataFrame(rows)).set_index("round")
        assert set(frame.index) == {r for r, *_ in clients}
        for r, values in frame.iterrows():
            of_round = [x for x in rows if x["round"] == r]
            ends = {"accuracy": ""} | {f"{g}_accuracy": f"_{g}" for g in GROUPS}
            for column, end in ends.items():
                kept = sum(x[f"pseudo_kept{end}"] for x in of_round)
                correct = sum(x[f"pseudo_correct{end}"] for x in of_round)
                expected = correct / kept if kept else NAN
                assert values[column] == pytest.approx(expected, nan_ok=True)


def curves(ax):
    """Return the labelled lines of the axes: name -> (x, y)."""
    return {
        line.get_label(): (line.get_xdata(), line.get_ydata())
        for line in ax.lines
        if not line.get_label().startswith("_")
    }


def texts(fig):
    """Return all words in a figure, each as one line."""
    artists = fig.findobj(mpl.text.Text)
    return [" ".join(t.get_text().split()) for t in artists if t.get_text() and t.get_visible()]


class TestPseudoLabels:
    def test_two_panels_in_percent(self):
        second = TWO_CLIENTS.assign(round=2, pseudo_seen=50)
        upper, lower = pseudo_labels(pd.concat([TWO_CLIENTS, second]), "run").axes
        expected = {"overall": 74, "head": 100 * 30 / 34, "medium": 50, "tail": 37.5}
        drawn = curves(upper)
        assert list(drawn) == list(expected)
        for name, (x, y) in drawn.items():
            assert list(x) == [1, 2]
            assert y == pytest.approx([expected[name]] * 2)
        drawn = curves(lower)
        assert list(drawn) == ["kept", "local expert"]
        assert drawn["kept"][1] == pytest.approx([100 * 50 / 120, 50])
        assert drawn["local expert"][1] == pytest.approx([30, 30])
        assert upper.get_xlim() == lower.get_xlim()

    def test_words(self):
        fig = pseudo_labels(TWO_CLIENTS, "my $run")
        ends = {"overall 74.0 %", "head 88.2 %", "medium 50.0 %", "tail 37.5 %"}
        assert ends | {"kept 41.7 %", "local expert 30.0 %"} <= set(texts(fig))
        assert {"my $run", "Accuracy (%)", "Share (%)", "Round"} <= set(texts(fig))

    def test_labels_of_equal_values_do_not_overlap(self):
        training = pd.DataFrame([row(1, seen=10, local=6, head=(2, 1), medium=(2, 1), tail=(2, 1))])
        fig = pseudo_labels(training, "run")
        fig.draw_without_rendering()
        for ax, count in zip(fig.axes, (4, 2), strict=True):
            boxes = [t.get_window_extent() for t in ax.texts]
            assert len(boxes) == count
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])

    def test_one_round_is_a_mark_with_one_tick(self):
        fig = pseudo_labels(TWO_CLIENTS.assign(round=7), "run")
        fig.draw_without_rendering()
        lower = fig.axes[1]
        assert lower.lines[0].get_marker() == "o"
        low, high = lower.get_xlim()
        assert [t for t in lower.get_xticks() if low <= t <= high] == [7]

    def test_local_expert_is_left_out_where_unknown(self):
        fig = pseudo_labels(TWO_CLIENTS.drop(columns="pseudo_local"), "run")
        assert list(curves(fig.axes[1])) == ["kept"]
        assert not any("local" in t for t in texts(fig))

    def test_group_of_which_nothing_was_kept_is_left_out(self):
        fig = pseudo_labels(pd.DataFrame([row(1, seen=9, head=(4, 3), tail=(2, 1))]), "run")
        assert list(curves(fig.axes[0])) == ["overall", "head", "tail"]

    def test_gap_where_nothing_was_kept_and_label_of_the_last_known(self):
        rows = [row(1, seen=8, head=(4, 3)), row(2, seen=8), row(3, seen=8, head=(4, 1))]
        fig = pseudo_labels(pd.DataFrame([*rows, row(4, seen=8)]), "run")
        np.testing.assert_array_equal(curves(fig.axes[0])["head"][1], [75, NAN, 25, NAN])
        np.testing.assert_array_equal(curves(fig.axes[1])["kept"][1], [50, 0, 50, 0])
        assert {"head 25.0 %", "kept 0.0 %"} <= set(texts(fig))

    def test_nothing_ever_kept_is_said(self):
        fig = pseudo_labels(pd.DataFrame([row(1, seen=5), row(2, seen=5)]), "run")
        assert curves(fig.axes[0]) == {}
        assert "Nothing was kept" in texts(fig)

    def test_nothing_to_compare_with_is_said(self):
        fig = pseudo_labels(pd.DataFrame([row(1, seen=5) | {"pseudo_kept": 3}]), "run")
        assert "Nobody knows the true labels" in texts(fig)

    def test_warm_up_is_not_drawn(self):
        rows = [warm_up(r) for r in range(1, 20)] + [row(20, seen=8, head=(4, 3))]
        fig = pseudo_labels(pd.DataFrame(rows), "run")
        assert list(curves(fig.axes[1])["kept"][0]) == [20]
        assert fig.axes[1].get_xlim()[0] > 19

    def test_sixty_rounds_are_drawn_as_they_are(self):
        fig = pseudo_labels(many_rounds(60), "run")
        assert curves(fig.axes[0])["tail"][1] == pytest.approx([100, 0] * 30)
        assert len(fig.axes[0].lines) == 3
        assert not any("centred mean" in t for t in texts(fig))

    def test_more_rounds_get_a_centred_mean_over_their_own_values(self):
        fig = pseudo_labels(many_rounds(61), "run")
        upper = fig.axes[0]
        tail = curves(upper)["tail"][1]
        # Five rounds around each: 1 0 1 0 1 or 0 1 0 1 0; at the ends only those there are.
        assert tail[2:-2] == pytest.approx([60 if r % 2 else 40 for r in range(3, 60)])
        assert tail[:2] == pytest.approx([100 * 2 / 3, 50])
        assert tail[-2:] == pytest.approx([50, 100 * 2 / 3])
        assert any("centred mean over 5 rounds" in t for t in texts(fig))
        assert "tail 66.7 %" in texts(fig)
        light = [line for line in upper.lines if line.get_label().startswith("_")]
        assert [line.get_alpha() < 1 for line in light] == [True] * 3
        assert light[-1].get_ydata() == pytest.approx([100, 0] * 30 + [100])

    def test_window_grows_with_the_run_and_bridges_single_gaps(self):
        training = many_rounds(1000)
        counts = [c for c in training if c.startswith(("pseudo_kept", "pseudo_correct"))]
        training.loc[training["round"] == 500, counts] = 0
        fig = pseudo_labels(training, "run")
        assert any("centred mean over 51 rounds" in t for t in texts(fig))
        assert np.isfinite(curves(fig.axes[0])["head"][1]).all()


class TestPseudoLabelsFailure:
    @pytest.mark.parametrize("training", [pd.DataFrame(), pd.DataFrame([warm_up(1)])])
    def test_no_pseudo_labels(self, training):
        with pytest.raises(DataError, match=r"training\.csv: no round with pseudo_seen > 0"):
            pseudo_labels(training, "run")


class TestSaveFigures:
    def save(self, folder, **given):
        rounds = pd.DataFrame(
            {"round": [1], "generic_accuracy": 0.5, "personal_accuracy": 0.5}
            | {f"{g}_accuracy": [0.5] for g in GROUPS}
        )
        clients = pd.DataFrame({"round": [1], "client": 0, "view": "generic", "accuracy": 0.5})
        partition = pd.DataFrame({"client": [0], "class": 0, "labelled": 1, "unlabelled": 1})
        paths = save_figures(
            folder,
            rounds=rounds,
            clients=clients,
            partition=partition,
            num_clients=1,
            num_classes=1,
            title="run",
            **given,
        )
        return [path.name for path in paths]

    def test_with_pseudo_labels(self, tmp_path):
        assert self.save(tmp_path, training=TWO_CLIENTS)[-1] == "pseudo_labels.png"
        assert (tmp_path / "pseudo_labels.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"training": None},
            {"training": pd.DataFrame()},
            {"training": pd.DataFrame([warm_up(1)])},
        ],
        ids=["not given", "none", "no rows", "other method"],
    )
    def test_without_there_is_no_picture_and_no_warning(self, tmp_path, given):
        assert "pseudo_labels.png" not in self.save(tmp_path, **given)
        assert not (tmp_path / "pseudo_labels.png").exists()
