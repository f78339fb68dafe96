"""Runs side by side: what tells them apart, and what their seeds reached."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import fedsim
from fedsim import Experiment
from fedsim.errors import ConfigError, DataError, EngineError
from fedsim.report.comparison import compare, comparison_rows, comparison_table, read_runs
from fedsim.report.figures.comparison import accuracy_over_rounds
from fedsim.report.report import write_comparison
from tests.fedsim.report.test_report import Page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two methods, of which one has no generic model, each with two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("fedavg", "fedper"):
        for seed in (0, 1):
            fedsim.simulate(
                Experiment(
                    seed=seed,
                    data={"imbalance": 0.1},
                    clients={"count": 4},
                    model={"name": "mlp", "hidden": [8]},
                    method={"name": method},
                    training={"rounds": 2, "lr": 0.1},
                    engine={"backend": "inline"},
                ),
                out=folder / f"{method}-{seed}",
            )
    return folder


@pytest.fixture
def runs(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "runs")


def change(run, old, new):
    file = run / "experiment.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def labels(*folders):
    return [(one.label, len(one.runs)) for one in compare(read_runs(folders))]


def test_seeds_are_put_together_and_methods_told_apart(folder):
    assert labels(folder) == [("fedavg", 2), ("fedper", 2)]


def test_a_single_run_is_called_as_its_experiment(folder):
    assert labels(folder / "fedavg-0") == [("experiment", 1)]


def test_what_differs_is_named_and_what_follows_from_it_isn_t(runs):
    change(runs / "fedper-1", "lr = 0.1", "lr = 0.2")
    assert labels(runs) == [("fedavg, lr=0.1", 2), ("fedper, lr=0.1", 1), ("fedper, lr=0.2", 1)]
    # Between these two the method says it all.
    assert labels(runs / "fedavg-0", runs / "fedper-1") == [("fedavg", 1), ("fedper", 1)]


def test_clients_without_an_update_of_their_own_are_called_as_the_method(runs):
    change(runs / "fedavg-1", 'client = ""', 'client = "my:Moon"')
    some = runs / "fedavg-0", runs / "fedavg-1"
    assert labels(*some) == [("fedavg", 1), ("my:Moon", 1)]
    told = labels(*some, runs / "fedper-0")
    assert told == [("fedavg", 1), ("fedavg, my:Moon", 1), ("fedper", 1)]


def test_where_and_how_often_a_run_is_tested_tells_nothing(runs):
    change(runs / "fedavg-1", 'backend = "inline"', 'backend = "ray"')
    change(runs / "fedavg-1", "every = 1", "every = 2")
    assert labels(runs / "fedavg-0", runs / "fedavg-1") == [("experiment", 2)]


def test_the_same_run_twice_is_told(runs):
    shutil.copytree(runs / "fedavg-0", runs / "again")
    with pytest.warns(UserWarning, match=r"left out: .*again has all settings of .*fedavg-0, and"):
        assert labels(runs / "fedavg-0", runs / "again") == [("experiment", 1)]


def test_a_double_leaves_the_other_seeds_together(runs):
    for seed in (0, 1):
        change(runs / f"fedavg-{seed}", 'name = "experiment"', f'name = "mine-{seed}"')
    shutil.copytree(runs / "fedavg-0", runs / "again")
    with pytest.warns(UserWarning, match="left out"):
        assert labels(runs) == [("fedavg", 2), ("fedper", 2)]


def test_what_a_run_ran_on_tells_it_apart_where_nothing_else_does(runs):
    shutil.copytree(runs / "fedavg-0", runs / "on-ray")
    change(runs / "on-ray", 'backend = "inline"', 'backend = "ray"')
    told = labels(runs / "fedavg-0", runs / "fedavg-1", runs / "on-ray")
    assert told == [("backend=inline", 2), ("backend=ray", 1)]


def test_a_run_that_stopped_is_told(runs, tmp_path):
    rows = (runs / "fedavg-1" / "rounds.csv").read_text().splitlines(keepends=True)
    (runs / "fedavg-1" / "rounds.csv").write_text("".join(rows[:2]))
    description = json.loads((runs / "fedavg-1" / "run.json").read_text())
    (runs / "fedavg-1" / "run.json").write_text(json.dumps(description | {"rounds_finished": 1}))
    with pytest.warns(UserWarning, match="fedavg-1: 1 of 2 rounds have finished"):
        series = compare(read_runs([runs]))
    shown = Page(write_comparison(tmp_path / "out", series, "mine"))
    assert [row[2] for row in shown.tables[1]] == ["rounds", "2", "1 of 2 rounds", "2", "2"]
    # What the other seed reached a round later isn't averaged with it.
    assert shown.tables[0][1][1:3] == ["1 of 2", "2"]
    rounds = pd.read_csv(runs / "fedavg-0" / "rounds.csv")
    assert float(shown.tables[0][1][3]) == pytest.approx(
        100 * rounds["generic_accuracy"].iloc[-1], abs=0.05001
    )


def test_seeds_that_were_tested_in_different_rounds_still_have_a_curve(runs, tmp_path):
    for seed, tested in ((0, 1), (1, 2)):
        rounds = pd.read_csv(runs / f"fedavg-{seed}" / "rounds.csv")
        accuracy = rounds.columns[rounds.columns.str.contains("accuracy")]
        rounds.loc[rounds["round"] != tested, accuracy] = np.nan
        rounds.to_csv(runs / f"fedavg-{seed}" / "rounds.csv", index=False)
    series = compare(read_runs([runs / "fedavg-0", runs / "fedavg-1"]))
    write_comparison(tmp_path / "out", series, "mine")
    assert (tmp_path / "out" / "figures" / "accuracy_over_rounds.png").exists()


def test_runs_come_in_the_order_of_their_numbers(runs):
    for seed in (2, 10):
        copy = shutil.copytree(runs / "fedavg-0", runs / "inner" / f"fedavg-{seed}")
        change(copy, "seed = 0", f"seed = {seed}")
    assert [run.settings["seed"] for run in read_runs([runs / "inner"])] == [2, 10]
    assert labels(runs) == [("fedavg", 4), ("fedper", 2)]


def test_the_numbers_are_those_of_the_last_rounds(folder):
    series = compare(read_runs([folder]))
    heads, rows = comparison_rows(series)
    cells = dict(zip(heads, rows[1], strict=True))
    personal, worst, tail = [], [], []
    for seed in (0, 1):
        clients = pd.read_csv(folder / f"fedper-{seed}" / "clients.csv").query("round == 2")
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
    series = compare(read_runs([runs]), [72, 70.5, 60, 99.5])
    heads, rows = comparison_rows(series)
    of_fedavg, of_fedper = (dict(zip(heads, row, strict=True)) for row in rows)
    assert of_fedavg["rounds to 72 % generic"] == "1.5"  # after two rounds and after one
    assert of_fedavg["rounds to 60 % generic"] == "1.5"
    assert of_fedper["rounds to 60 % generic"] == "–"  # has no such model
    assert "rounds to 99.5 % generic" not in heads  # nobody got there
    write_comparison(tmp_path / "out", series, "mine")
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table["rounds_to_70.5_generic"].tolist()[:2] == [2, 1]
    assert table["rounds_to_99.5_generic"].isna().all()

    rounds["generic_accuracy"] = (0.3, 0.4)
    rounds.to_csv(runs / name / "rounds.csv", index=False)
    heads, rows = comparison_rows(compare(read_runs([runs]), [70]))
    assert dict(zip(heads, rows[0], strict=True))["rounds to 70 % generic"] == "2 (1 of 2)"


@pytest.mark.parametrize("target", [0.8, 1, 100.5, float("nan")])
def test_a_target_is_in_percent(folder, target):
    with pytest.raises(ConfigError, match="must be in %, above 1 and at most 100"):
        compare(read_runs([folder]), [80, target])


def test_the_table_fits_a_terminal(folder):
    text = io.StringIO()
    series = compare(read_runs([folder]), [10])
    Console(file=text, width=80).print(comparison_table(series))
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
def test_names_go_on_in_the_next_line_between_words(folder, width, lines):
    (one, _) = compare(read_runs([folder]))
    table = comparison_table([replace(one, label="my.own_moon:MoonWithProjection, alpha=0.5")])
    text = io.StringIO()
    name = next(table.columns[0].cells)
    Console(file=text, width=width).print(name)
    assert [line.rstrip() for line in text.getvalue().splitlines()] == lines
    text = io.StringIO()
    Console(file=text, width=80).print(table)
    assert max(map(len, text.getvalue().split("\n"))) <= 80
    assert "MoonWithProj" in text.getvalue()


def test_twelve_runs_have_twelve_colours_for_lines_and_labels(folder):
    (one, _) = compare(read_runs([folder]))
    figure = accuracy_over_rounds([replace(one, label=f"run {i}") for i in range(12)], "mine")
    ax = figure.axes[0]
    labels = [text for text in ax.texts if text.get_text().startswith("run ")]
    lines = [line for line in ax.lines if len(line.get_xdata()) == 2]
    assert len({text.get_color() for text in labels}) == len(labels) == 12
    assert [line.get_color() for line in lines] == [text.get_color() for text in labels]
    assert len({line.get_linestyle() for line in lines}) == 2


def test_a_comparison_is_a_page_with_figures_and_a_csv_file(folder, tmp_path):
    series = compare(read_runs([folder]))
    page = write_comparison(tmp_path / "out", series, "mine")
    shown = Page(page)
    assert [row[0] for row in shown.tables[0]] == ["run", "fedavg", "fedper"]
    assert [row[0] for row in shown.tables[1]] == ["run", *["fedavg"] * 2, *["fedper"] * 2]
    files = {file.read_bytes() for file in (tmp_path / "out" / "figures").iterdir()}
    assert set(shown.pictures) == files
    assert len(files) == 3
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table.columns[:2].tolist() == ["label", "method.name"]
    rounds = pd.read_csv(folder / "fedavg-1" / "rounds.csv")
    assert table["generic"].iloc[1] == rounds["generic_accuracy"].iloc[-1]


def test_runs_that_nobody_tested_have_a_page_too(runs, tmp_path):
    for run in runs.iterdir():
        rounds = pd.read_csv(run / "rounds.csv")
        rounds.loc[:, rounds.columns.str.contains("accuracy")] = np.nan
        rounds.to_csv(run / "rounds.csv", index=False)
        (run / "clients.csv").unlink()
        description = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(description | {"rows": {}}))
    series = compare(read_runs([runs]))
    shown = Page(write_comparison(tmp_path / "out", series, "mine"))
    assert shown.tables[0][1][:4] == ["fedavg", "2", "–", "–"]
    assert shown.pictures == []


def test_personal_models_that_nobody_could_test_are_no_line(runs, tmp_path):
    for seed in (0, 1):
        clients = pd.read_csv(runs / f"fedper-{seed}" / "clients.csv")
        generic = clients.assign(view="generic")
        pd.concat([generic, clients.assign(accuracy=np.nan)]).to_csv(
            runs / f"fedper-{seed}" / "clients.csv", index=False
        )
    write_comparison(tmp_path / "out", compare(read_runs([runs])), "mine")
    assert (tmp_path / "out" / "figures" / "client_accuracy.png").exists()


def test_many_runs_have_lines_of_their_own(runs):
    for i in range(9):
        copy = shutil.copytree(runs / "fedavg-0", runs / f"lr-{i}")
        change(copy, "lr = 0.1", f"lr = 1.{i}")
    series = compare(read_runs([runs]))
    assert len(series) == 11
    lines = [
        line for line in accuracy_over_rounds(series, "mine").axes[0].lines if len(line.get_xdata())
    ]
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == 10  # FedPer has no generic model


def test_a_run_without_a_finished_round_is_left_out_with_a_warning(runs):
    (runs / "fedavg-0" / "rounds.csv").unlink()
    with pytest.warns(
        UserWarning, match=r"left out: .*fedavg-0: no round of this run has finished"
    ):
        assert labels(runs) == [("fedavg", 1), ("fedper", 2)]


class TestCompareFailure:
    def test_the_folder_of_a_run_is_left_alone(self, runs):
        with pytest.raises(EngineError, match="fedper-0 is the folder of a run; choose another"):
            write_comparison(runs / "fedper-0", compare(read_runs([runs])), "mine")

    def test_a_client_twice_is_said_with_its_run(self, runs):
        file = runs / "fedper-1" / "clients.csv"
        rows = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*rows, rows[-1]]))
        line = r"fedper-1: clients.csv: client 3 has two rows"
        with pytest.raises(DataError, match=line):
            read_runs([runs / "fedper-1"])
        with pytest.warns(UserWarning, match=line):
            assert labels(runs) == [("fedavg", 2), ("fedper", 1)]

    def test_a_folder_without_runs(self, tmp_path):
        with pytest.raises(DataError, match="isn't the folder of a run"):
            read_runs([tmp_path])

    def test_no_folder(self, tmp_path):
        with pytest.raises(DataError, match="nowhere: there is no such folder"):
            read_runs([tmp_path / "nowhere"])

    def test_no_run(self):
        with pytest.raises(DataError, match="no run to compare"):
            compare([])
