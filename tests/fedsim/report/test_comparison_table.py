"""The table of runs side by side: what their seeds reached."""

import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from fedsim.report.comparison import compare, read_runs
from fedsim.report.comparison_table import comparison_rows, comparison_table
from fedsim.report.report import write_comparison


def test_the_numbers_are_those_of_the_last_rounds(two_methods):
    seed_groups = compare(read_runs([two_methods]))
    heads, rows = comparison_rows(seed_groups)
    cells = dict(zip(heads, rows[1], strict=True))
    personal, worst, tail = [], [], []
    for seed in (0, 1):
        clients = pd.read_csv(two_methods / f"fedper-{seed}" / "clients.csv").query("round == 2")
        personal.append(100 * clients["accuracy"].mean())
        worst.append(100 * clients["accuracy"].min())  # a tenth of four clients: one
        tail.append(100 * clients["tail_accuracy"].mean())
    for name, values in (("personal", personal), ("worst 10 %", worst), ("tail", tail)):
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        shown = [float(number) for number in cells[name].split(" ± ")]
        np.testing.assert_allclose(shown, [mean, deviation], atol=0.05001)
    assert (cells["run"], cells["seeds"], cells["round"]) == ("fedper", "2", "2")
    assert cells["generic"] == "–"


def test_a_view_of_a_methods_own_is_compared_too(runs):
    for name, share in (("fedper-0", 0.25), ("fedper-1", 0.75)):
        rounds = pd.read_csv(runs / name / "rounds.csv").assign(generic_cold_accuracy=share)
        rounds.to_csv(runs / name / "rounds.csv", index=False)
    heads, rows = comparison_rows(compare(read_runs([runs])))
    assert [row[heads.index("generic-cold")] for row in rows] == ["–", "50.0 ± 35.4"]


def test_rounds_to_an_accuracy_are_the_first_ones_evaluated_with_it(runs, tmp_path):
    curves = {"fedavg-0": (0.5, 0.72), "fedavg-1": (0.72, 0.6)}
    for name, curve in curves.items():
        rounds = pd.read_csv(runs / name / "rounds.csv")
        rounds["generic_accuracy"] = curve
        rounds.to_csv(runs / name / "rounds.csv", index=False)
    seed_groups = compare(read_runs([runs]), [72, 70.5, 60, 99.5])
    heads, rows = comparison_rows(seed_groups)
    of_fedavg, of_fedper = (dict(zip(heads, row, strict=True)) for row in rows)
    assert of_fedavg["rounds to 72 % generic"] == "1.5"  # after two rounds and after one
    assert of_fedavg["rounds to 60 % generic"] == "1.5"
    assert of_fedper["rounds to 60 % generic"] == "–"  # has no such model
    assert "rounds to 99.5 % generic" not in heads  # nobody got there
    write_comparison(tmp_path / "out", seed_groups, "mine")
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table["rounds_to_70.5_generic"].tolist()[:2] == [2, 1]
    assert table["rounds_to_99.5_generic"].isna().all()

    rounds["generic_accuracy"] = (0.3, 0.4)
    rounds.to_csv(runs / name / "rounds.csv", index=False)
    heads, rows = comparison_rows(compare(read_runs([runs]), [70]))
    assert dict(zip(heads, rows[0], strict=True))["rounds to 70 % generic"] == "2 (1 of 2)"


def test_the_table_fits_a_terminal(two_methods):
    text = io.StringIO()
    seed_groups = compare(read_runs([two_methods]), [10])
    Console(file=text, width=80).print(comparison_table(seed_groups))
    assert max(map(len, text.getvalue().split("\n"))) <= 80
    assert "After round 2, accuracies in %" in text.getvalue()
    assert "…" not in text.getvalue()


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (80, ["my.own_moon:MoonWithProjection, alpha=0.5"]),
        (30, ["my.own_moon:", "MoonWithProjection, alpha=0.5"]),
        (19, ["my.own_moon:", "MoonWithProjection,", "alpha=0.5"]),
        (16, ["my.own_moon:Moon", "WithProjection,", "alpha=0.5"]),
        (8, ["my.own_", "moon:", "MoonWith", "Projecti", "on,", "alpha=", "0.5"]),
    ],
)
def test_names_go_on_in_the_next_line_between_words(two_methods, width, lines):
    (one, _) = compare(read_runs([two_methods]))
    table = comparison_table([replace(one, label="my.own_moon:MoonWithProjection, alpha=0.5")])
    text = io.StringIO()
    name = next(table.columns[0].cells)
    Console(file=text, width=width).print(name)
    assert [line.rstrip() for line in text.getvalue().splitlines()] == lines
    text = io.StringIO()
    Console(file=text, width=80).print(table)
    assert max(map(len, text.getvalue().split("\n"))) <= 80
    assert "MoonWithProj" in text.getvalue()
