"""The closing table and the summary line."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from fedsim.errors import DataError
from fedsim.report.tables import client_table, partition_table, summary_line


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


def shown(table):
    """Return the printed lines as lists of words, from the header on; the caption last."""
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(table)
    return [line.split() for line in console.file.getvalue().splitlines() if line.split()]


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

    def test_above_the_limit_best_and_worst_with_a_caption(self):
        accuracy = np.arange(100) / 100
        accuracy[7] = np.nan
        table = client_table(clients_frame(accuracy), limit=5)
        lines = shown(table)
        names = [line[0] for line in lines[3:9]]
        assert names == ["99", "98", "97", "⋯", "1", "0"]
        assert str(table.caption) == (
            "The 3 best and 2 worst of 100 clients by accuracy; 95 not shown, "
            "1 of them without test examples: see clients.csv"
        )
        # The footer is over everybody, not over those shown.
        assert lines[9][4] == f"{100 * np.nanmean(accuracy):.1f}"

    def test_ties_are_not_shown_twice(self):
        table = client_table(clients_frame([0.5] * 7), limit=4)
        names = [line[0] for line in shown(table)[3:8]]
        assert names == ["0", "1", "⋯", "5", "6"]

    def test_several_views_have_a_column_and_a_footer_each(self):
        frame = pd.concat([clients_frame([0.5, 0.7]), clients_frame([0.8, 0.9], view="personal")])
        lines = shown(client_table(frame))
        assert lines[1][:2] == ["client", "view"]
        assert [line[:2] for line in lines[3:7]] == [
            ["0", "generic"],
            ["0", "personal"],
            ["1", "generic"],
            ["1", "personal"],
        ]
        means = {line[1]: line[5] for line in lines if line[0] == "mean"}
        assert means == {"generic": "60.0", "personal": "85.0"}

    def test_markup_in_a_name_is_printed_as_it_is(self):
        frame = pd.concat([clients_frame([0.5]), clients_frame([0.8], view="[red]x[/red]")])
        assert any("[red]x[/red]" in line for line in shown(client_table(frame)))


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

    def test_limit(self):
        with pytest.raises(DataError, match="limit is 1; give 2 or more"):
            client_table(clients_frame([0.5]), limit=1)


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

    def test_above_the_limit_largest_and_smallest_with_a_caption(self):
        k = np.arange(50)
        frame = pd.DataFrame({"client": k, "class": 0, "labelled": k, "unlabelled": 1, "test": 1})
        table = partition_table(frame, 50, limit=5)
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

    def test_limit(self):
        with pytest.raises(DataError, match="limit is 1; give 2 or more"):
            partition_table(TestPartitionTable.FRAME, 3, limit=1)
