"""The closing table and the summary line."""

from __future__ import annotations

import io
import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from fedsim.errors import DataError
from fedsim.report import tables
from fedsim.report.tables import client_table, partition_table, summary_line

VIEWS = ["generic", "generic-realigned", "personal", "personal-realigned"]


def clients_frame(accuracy, *, round=5, view="generic"):
    accuracy = np.asarray(accuracy, dtype=float)
    count = len(accuracy)
    return pd.DataFrame(
        {
            "round": round,
            "client": np.arange(count),
            "view": view,
            "num_train": 1000 + np.arange(count),
            "num_labelled": 10,
            "num_test": 4,
            "accuracy": accuracy,
            "loss": 0.5,
            "head_accuracy": accuracy,
            "medium_accuracy": 0.5,
            "tail_accuracy": np.nan,
            "f1_macro": accuracy / 2,
        }
    )


def views_frame(views, *, round=5):
    """Return view -> accuracies as the engine writes them: client by client."""
    frames = [clients_frame(values, round=round, view=view) for view, values in views.items()]
    return pd.concat(frames).sort_values("client", kind="stable").reset_index(drop=True)


def rounds_frame(**changes):
    nan = np.nan
    return pd.DataFrame(
        {
            "round": [29, 30, 31],
            "generic_accuracy": [0.99, 0.931, nan],
            "personal_accuracy": [0.99, 0.91, nan],
            "head_accuracy": [0.99, 0.95, nan],
            "medium_accuracy": [0.99, 0.921, nan],
            "tail_accuracy": [0.99, 0.88, nan],
        }
        | changes
    )


def printed(table, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue().splitlines()


def shown(table):
    """Return the printed lines as lists of words, from the title on; the caption last."""
    return [line.split() for line in printed(table, 200) if line.split()]


class TestClientTable:
    def test_rows_footer_and_units(self):
        lines = shown(client_table(clients_frame([0.5, np.nan, 1.0])))
        assert " ".join(lines[0]) == "Clients after round 5, accuracies in %"
        rows = lines[3:]
        assert rows[0] == ["0", "1,000", "10", "4", "50.0", "50.0", "50.0", "–", "0.250"]
        assert rows[1] == ["1", "1,001", "10", "4", "–", "–", "50.0", "–", "–"]
        assert rows[2] == ["2", "1,002", "10", "4", "100.0", "100.0", "50.0", "–", "0.500"]
        assert rows[3] == [
            "mean", "1,001", "10.0", "4.0", "75.0", "75.0", "50.0", "–", "0.375",
        ]  # fmt: skip
        assert rows[4] == ["std", "25.0", "25.0", "0.0", "–", "0.125"]
        assert rows[5] == ["worst", "10%", "50.0", "50.0", "50.0", "–", "0.250"]
        assert len(rows) == 6

    def test_only_the_last_evaluated_round(self):
        frame = pd.concat(
            [
                clients_frame([0.1, 0.2], round=5),
                clients_frame([0.3, 0.4], round=10),
                clients_frame([np.nan, np.nan], round=15),
            ]
        )
        lines = shown(client_table(frame))
        assert lines[0][:4] == ["Clients", "after", "round", "10,"]
        assert [line[4] for line in lines[3:5]] == ["30.0", "40.0"]

    def test_clients_in_their_order_whatever_the_order_of_the_frame(self):
        lines = shown(client_table(clients_frame(np.linspace(0, 1, 12)).sample(12, random_state=0)))
        assert [line[0] for line in lines[3:15]] == [str(k) for k in range(12)]

    def test_no_caption_when_all_are_shown(self):
        assert client_table(clients_frame([0.5] * 40)).caption is None

    def test_above_the_limit_best_and_worst_with_a_caption(self, monkeypatch):
        accuracy = np.arange(100) / 100
        accuracy[7] = np.nan
        monkeypatch.setattr(tables, "MOST_CLIENTS", 5)
        table = client_table(clients_frame(accuracy))
        lines = shown(table)
        names = [line[0] for line in lines[3:9]]
        assert names == ["99", "98", "97", "⋯", "1", "0"]
        assert str(table.caption) == (
            "The 3 best and 2 worst of 100 clients by accuracy; 95 not shown, "
            "1 of them without test examples: see clients.csv"
        )
        # The footer is over everybody, not over those shown.
        assert lines[9][4] == f"{100 * np.nanmean(accuracy):.1f}"

    def test_ties_are_not_shown_twice(self, monkeypatch):
        monkeypatch.setattr(tables, "MOST_CLIENTS", 4)
        table = client_table(clients_frame([0.5] * 7))
        names = [line[0] for line in shown(table)[3:8]]
        assert names == ["0", "1", "⋯", "5", "6"]

    def test_only_one_client_has_test_examples(self, monkeypatch):
        monkeypatch.setattr(tables, "MOST_CLIENTS", 2)
        table = client_table(clients_frame([np.nan, 0.5, np.nan]))
        assert [line[0] for line in shown(table)[3:6]] == ["1", "⋯", "mean"]
        assert "The 1 best and 0 worst of 3 clients by accuracy; 2 not shown" in str(table.caption)


class TestClientTableOfSeveralViews:
    def test_a_row_for_each_client_with_the_accuracy_of_each_view(self):
        frame = views_frame({"generic": [0.5, 0.7], "personal": [0.8, 0.9]})
        lines = shown(client_table(frame))
        assert " ".join(lines[0]) == "Clients after round 5, accuracies in %"
        assert " ".join(lines[1]) == "head, medium, tail and F1: personal"
        assert lines[2] == [
            "client", "train", "labels", "test", "generic", "personal",
            "head", "medium", "tail", "F1",
        ]  # fmt: skip
        # Head is as the accuracy and F1 half of it, in each view: these are the personal ones.
        assert lines[4:] == [
            ["0", "1,000", "10", "4", "50.0", "80.0", "80.0", "50.0", "–", "0.400"],
            ["1", "1,001", "10", "4", "70.0", "90.0", "90.0", "50.0", "–", "0.450"],
            ["mean", "1,000", "10.0", "4.0", "60.0", "85.0", "85.0", "50.0", "–", "0.425"],
            ["std", "10.0", "5.0", "5.0", "0.0", "–", "0.025"],
            ["worst", "10%", "50.0", "80.0", "80.0", "50.0", "–", "0.400"],
        ]

    def test_four_views_in_their_order_the_realigned_ones_below(self):
        frame = views_frame(dict(zip(VIEWS, ([0.1], [0.2], [0.3], [1.0]), strict=True)))
        lines = shown(client_table(frame))
        assert lines[2] == ["generic", "personal"]
        assert lines[3] == [
            "client", "train", "labels", "test", "realigned", "realigned",
            "head", "medium", "tail", "F1",
        ]  # fmt: skip
        row = ["0", "1,000", "10", "4", "10.0", "20.0", "30.0", "100.0", "30.0", "50.0", "–"]
        assert lines[5] == [*row, "0.150"]

    def test_names_stand_above_their_accuracies(self):
        frame = views_frame(dict(zip(VIEWS, ([0.1], [0.2], [0.3], [0.4]), strict=True)))
        lines = printed(client_table(frame), 80)
        row = next(line for line in lines if "1,000" in line)
        upper = next(line for line in lines if "generic " in line)
        lower = lines[lines.index(upper) + 1]
        places = {
            "10.0": upper.index("generic"),
            "20.0": lower.index("realigned"),
            "30.0": upper.index("personal"),
            "40.0": lower.rindex("realigned"),
        }
        for number, start in places.items():
            assert start <= row.index(number) < start + len("generic")

    @pytest.mark.parametrize("count", [1, 30, 60])
    def test_four_views_fit_on_a_terminal_of_80(self, count):
        rng = np.random.default_rng(count)
        right = rng.integers(0, 2, (4, count)).astype(float)
        right[:, 0] = 1
        frame = views_frame(dict(zip(VIEWS, right, strict=True)))
        # The largest numbers the table is made for.
        frame["client"] += 1_000_000 - count
        frame[["num_train", "num_labelled", "num_test"]] = 99_999
        frame[["head_accuracy", "medium_accuracy", "tail_accuracy", "f1_macro"]] = 1.0
        narrow, wide = (printed(client_table(frame), width) for width in (80, 500))
        assert narrow == wide
        assert max(map(len, narrow)) <= 80
        assert "…" not in "".join(narrow)
        assert sum(line.count("1.000") for line in narrow) == min(count, 40) + 2

    def test_ranked_by_the_personal_view_and_the_limit_counts_clients(self):
        accuracy = np.arange(120) / 200
        frame = views_frame({"generic": accuracy[::-1], "personal": accuracy})
        table = client_table(frame)
        names = [line[0] for line in shown(table)[4:45]]
        best, worst = range(119, 99, -1), range(19, -1, -1)
        assert names == [*map(str, best), "⋯", *map(str, worst)]
        assert str(table.caption) == (
            "The 20 best and 20 worst of 120 clients by personal accuracy; 80 not shown: "
            "see clients.csv"
        )

    def test_no_caption_when_all_clients_are_shown(self):
        assert client_table(views_frame(dict.fromkeys(VIEWS, [0.5] * 40))).caption is None

    def test_without_a_personal_view_the_first_one_counts(self, monkeypatch):
        frame = views_frame({"generic": [0.1, 0.9, 0.5], "generic-realigned": [0.9, 0.1, 0.5]})
        monkeypatch.setattr(tables, "MOST_CLIENTS", 2)
        table = client_table(frame)
        lines = shown(table)
        assert lines[1][-2:] == ["F1:", "generic"]
        assert [[line[0], line[-1]] for line in lines[5:8]] == [
            ["1", "0.450"],
            ["⋯", "⋯"],
            ["0", "0.050"],
        ]
        assert "by generic accuracy" in str(table.caption)

    def test_a_view_that_a_client_has_no_row_of(self, monkeypatch):
        frame = views_frame({"generic": [0.5, 0.7, 0.6], "personal": [0.8, 0.9, 0.4]})
        lacks = (frame["client"] == 1) & (frame["view"] == "personal")
        monkeypatch.setattr(tables, "MOST_CLIENTS", 3)
        table = client_table(frame[~lacks])
        lines = shown(table)
        assert lines[5] == ["1", "1,001", "10", "4", "70.0", "–", "–", "–", "–", "–"]
        assert lines[7][4:6] == ["60.0", "60.0"]
        monkeypatch.setattr(tables, "MOST_CLIENTS", 2)
        table = client_table(frame[~lacks])
        assert [line[0] for line in shown(table)[4:7]] == ["0", "⋯", "2"]
        assert str(table.caption) == (
            "The 1 best and 1 worst of 3 clients by personal accuracy; 1 not shown, "
            "1 of them without one: see clients.csv"
        )

    def test_views_of_other_rounds_are_not_shown(self):
        early = views_frame({"generic": [0.5], "personal": [0.6]}, round=4)
        lines = shown(client_table(pd.concat([early, clients_frame([0.7])])))
        assert lines[1][4] == "acc."

    def test_markup_in_a_name_is_printed_as_it_is(self):
        frame = views_frame({"generic": [0.5], "[red]x[/red]": [0.8]})
        assert any("[red]x[/red]" in line for line in shown(client_table(frame)))


class TestNamedClients:
    NAMES = pd.DataFrame(
        [
            ("class", 0, "cat"),
            ("client", 0, "[b]w10[/b]"),
            ("client", 1, "University of Rome"),
        ],
        columns=["kind", "number", "name"],
    )

    def test_of_a_run(self):
        lines = printed(client_table(clients_frame([0.5, 0.6, 0.7]), self.NAMES), 80)
        first = [re.split(r" (?= )| (?=[\d,]+ )", line.strip())[0] for line in lines]
        assert {"[b]w10[/b]", "University of Rome", "2", "worst 10%"} <= set(first)
        assert not any("cat" in line for line in lines)

    def test_of_a_partition(self):
        lines = printed(partition_table(TestPartitionTable.FRAME, 3, self.NAMES), 80)
        first = [re.split(r" (?= )| (?=[\d,]+ )", line.strip())[0] for line in lines]
        assert {"[b]w10[/b]", "University of Rome", "2", "total"} <= set(first)

    def test_only_names_give_way_where_the_terminal_is_narrow(self):
        frame = views_frame({view: [1.0, 0.5] for view in VIEWS})
        lines = printed(client_table(frame, self.NAMES), 80)
        row = next(line for line in lines if line.startswith("Univ"))
        assert "…" in row
        assert row.split()[-1] == "0.250"
        assert max(map(len, lines)) <= 80


class TestClientTableFailure:
    def test_no_evaluated_round(self):
        with pytest.raises(DataError, match="no round has a client accuracy"):
            client_table(clients_frame([np.nan, np.nan]))

    def test_empty_frame(self):
        with pytest.raises(DataError, match="no round has a client accuracy"):
            client_table(clients_frame([]).astype(object))

    def test_frame_without_rows_or_columns(self):
        with pytest.raises(DataError, match="no round has a client accuracy"):
            client_table(pd.DataFrame())

    def test_missing_column(self):
        with pytest.raises(DataError, match=r"clients\.csv: column 'f1_macro' is missing; it has"):
            client_table(clients_frame([0.5]).drop(columns="f1_macro"))

    def test_two_rows_of_a_client_and_view(self):
        frame = views_frame({"generic": [0.5, 0.7], "personal": [0.8, 0.9]})
        with pytest.raises(
            DataError, match=r"client 1 has two rows of view 'personal' in round 5; leave one"
        ):
            client_table(pd.concat([frame, frame.iloc[[3]]]))


class TestSummaryLine:
    def test_by_hand(self):
        clients = pd.concat(
            [clients_frame([0.1, 0.2], round=29), clients_frame([0.87, 0.95], round=30)]
        )
        assert summary_line(rounds_frame(), clients) == (
            "round 30: generic 93.1 %, personal 91.0 % (std 4.0, worst 10 % 87.0), "
            "head/medium/tail 95.0/92.1/88.0 %"
        )

    def test_spread_is_of_the_personal_view_where_there_is_one(self):
        clients = pd.concat(
            [
                clients_frame([0.1, 0.9], round=30),
                clients_frame([0.90, 0.92], round=30, view="personal"),
            ]
        )
        assert "(std 1.0, worst 10 % 90.0)" in summary_line(rounds_frame(), clients)

    def test_group_without_classes_and_no_local_test_sets(self):
        rounds = rounds_frame(tail_accuracy=np.nan, personal_accuracy=np.nan)
        for clients in (clients_frame([np.nan], round=30), pd.DataFrame()):
            assert summary_line(rounds, clients) == (
                "round 30: generic 93.1 %, personal – % (std –, worst 10 % –), "
                "head/medium/tail 95.0/92.1/– %"
            )

    def test_realigned_views(self):
        rounds = rounds_frame(
            generic_realigned_accuracy=[0.99, 0.945, np.nan],
            personal_realigned_accuracy=[0.99, 0.9, np.nan],
        )
        clients = views_frame(dict(zip(VIEWS, ([0.1], [0.2], [0.9], [0.4]), strict=True)), round=30)
        assert summary_line(rounds, clients) == (
            "round 30: generic 93.1 % (realigned 94.5 %), "
            "personal 91.0 % (std 0.0, worst 10 % 90.0; realigned 90.0 %), "
            "head/medium/tail 95.0/92.1/88.0 %"
        )

    def test_method_without_a_generic_model(self):
        nan = np.nan
        rounds = rounds_frame(
            generic_accuracy=nan,
            head_accuracy=nan,
            medium_accuracy=nan,
            tail_accuracy=nan,
            personal_head_accuracy=[0.99, 0.8, nan],
            personal_medium_accuracy=[0.99, 0.7, nan],
            personal_tail_accuracy=nan,
        )
        clients = clients_frame([0.87, 0.95], round=30, view="personal")
        assert summary_line(rounds, clients) == (
            "round 30: personal 91.0 % (std 4.0, worst 10 % 87.0), head/medium/tail 80.0/70.0/– %"
        )

    def test_no_generic_model_and_no_personal_groups(self):
        with pytest.raises(DataError, match="column 'personal_head_accuracy' is missing"):
            summary_line(rounds_frame(generic_accuracy=np.nan), clients_frame([0.5], round=30))

    def test_never_evaluated(self):
        accuracies = [name for name in rounds_frame().columns if name.endswith("accuracy")]
        rounds = rounds_frame(**dict.fromkeys(accuracies, np.nan))
        assert summary_line(rounds, clients_frame([])) == "3 rounds, none evaluated"

    def test_missing_column(self):
        with pytest.raises(DataError, match=r"rounds\.csv: column 'head_accuracy' is missing"):
            summary_line(rounds_frame().drop(columns="head_accuracy"), clients_frame([0.5]))


class TestPartitionTable:
    FRAME = pd.DataFrame(
        [(0, 0, 2, 8, 1), (0, 1, 1, 0, 0), (0, 2, 0, 0, 5), (2, 1, 0, 1500, 1)],
        columns=["client", "class", "labelled", "unlabelled", "test"],
    )

    def test_rows_mean_and_total(self):
        lines = shown(partition_table(self.FRAME, 3))
        assert lines[1] == ["client", "train", "labelled", "classes", "test"]
        assert lines[3:] == [
            ["0", "11", "3", "2", "6"],
            ["1", "0", "0", "0", "0"],
            ["2", "1,500", "0", "1", "1"],
            ["mean", "504", "1.0", "1.0", "2.3"],
            ["total", "1,511", "3", "7"],
        ]

    def test_examples_of_unknown_class_are_no_class(self):
        extra = pd.DataFrame(
            {"client": [0, 1], "class": -1, "labelled": 0, "unlabelled": 9, "test": 0}
        )
        lines = shown(partition_table(pd.concat([self.FRAME, extra]), 3))
        assert lines[3][:4] == ["0", "20", "3", "2"]
        assert lines[4][:4] == ["1", "9", "0", "0"]

    def test_above_the_limit_largest_and_smallest_with_a_caption(self, monkeypatch):
        k = np.arange(50)
        frame = pd.DataFrame({"client": k, "class": 0, "labelled": k, "unlabelled": 1, "test": 1})
        monkeypatch.setattr(tables, "MOST_CLIENTS", 5)
        table = partition_table(frame, 50)
        assert [line[0] for line in shown(table)[3:9]] == ["49", "48", "47", "⋯", "1", "0"]
        assert str(table.caption) == (
            "The 3 largest and 2 smallest of 50 clients; 45 not shown: see partition.csv"
        )


class TestPartitionTableFailure:
    def test_client_out_of_range(self):
        with pytest.raises(DataError, match=r"client 2 is out of range; must be in \[0, 2\)"):
            partition_table(TestPartitionTable.FRAME, 2)

    def test_missing_column(self):
        with pytest.raises(DataError, match=r"partition\.csv: column 'test' is missing"):
            partition_table(TestPartitionTable.FRAME.drop(columns="test"), 3)
