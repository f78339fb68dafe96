"""Runs side by side: what tells them apart, and what their seeds reached."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from fedsim.errors import ConfigError, DataError, EngineError
from fedsim.report.comparison import compare, read_runs
from fedsim.report.report import write_comparison
from tests.fedsim.report.test_report import Page


def change(run, old, new):
    file = run / "experiment.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def labels(*folders):
    return [(one.label, len(one.runs)) for one in compare(read_runs(folders))]


def test_seeds_are_put_together_and_methods_told_apart(two_methods):
    assert labels(two_methods) == [("fedavg", 2), ("fedper", 2)]


def test_a_single_run_is_called_as_its_experiment(two_methods):
    assert labels(two_methods / "fedavg-0") == [("experiment", 1)]


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
        seed_groups = compare(read_runs([runs]))
    shown = Page(write_comparison(tmp_path / "out", seed_groups, "mine"))
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
    seed_groups = compare(read_runs([runs / "fedavg-0", runs / "fedavg-1"]))
    write_comparison(tmp_path / "out", seed_groups, "mine")
    assert (tmp_path / "out" / "figures" / "accuracy_over_rounds.png").exists()


def test_runs_come_in_the_order_of_their_numbers(runs):
    for seed in (2, 10):
        copy = shutil.copytree(runs / "fedavg-0", runs / "inner" / f"fedavg-{seed}")
        change(copy, "seed = 0", f"seed = {seed}")
    assert [run.settings["seed"] for run in read_runs([runs / "inner"])] == [2, 10]
    assert labels(runs) == [("fedavg", 4), ("fedper", 2)]


@pytest.mark.parametrize("target", [0.8, 1, 100.5, float("nan")])
def test_a_target_is_in_percent(two_methods, target):
    with pytest.raises(ConfigError, match="must be in %, above 1 and at most 100"):
        compare(read_runs([two_methods]), [80, target])


def test_a_comparison_is_a_page_with_figures_and_a_csv_file(two_methods, tmp_path):
    seed_groups = compare(read_runs([two_methods]))
    page = write_comparison(tmp_path / "out", seed_groups, "mine")
    shown = Page(page)
    assert [row[0] for row in shown.tables[0]] == ["run", "fedavg", "fedper"]
    assert [row[0] for row in shown.tables[1]] == ["run", *["fedavg"] * 2, *["fedper"] * 2]
    files = {file.read_bytes() for file in (tmp_path / "out" / "figures").iterdir()}
    assert set(shown.pictures) == files
    assert len(files) == 3
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table.columns[:2].tolist() == ["label", "method.name"]
    rounds = pd.read_csv(two_methods / "fedavg-1" / "rounds.csv")
    assert table["generic"].iloc[1] == rounds["generic_accuracy"].iloc[-1]


def counts_no_rows(run):
    """Change a run to one of an older fedsim, whose run.json doesn't say how many rows it wrote."""
    description = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(description | {"rows": {}}))


def test_runs_that_nobody_tested_have_a_page_too(runs, tmp_path):
    for run in runs.iterdir():
        rounds = pd.read_csv(run / "rounds.csv")
        rounds.loc[:, rounds.columns.str.contains("accuracy")] = np.nan
        rounds.to_csv(run / "rounds.csv", index=False)
        (run / "clients.csv").unlink()
        counts_no_rows(run)
    seed_groups = compare(read_runs([runs]))
    shown = Page(write_comparison(tmp_path / "out", seed_groups, "mine"))
    assert shown.tables[0][1][:4] == ["fedavg", "2", "–", "–"]
    assert shown.pictures == []


def test_personal_models_that_nobody_could_test_are_no_line(runs, tmp_path):
    for seed in (0, 1):
        clients = pd.read_csv(runs / f"fedper-{seed}" / "clients.csv")
        generic = clients.assign(view="generic")
        pd.concat([generic, clients.assign(accuracy=np.nan)]).to_csv(
            runs / f"fedper-{seed}" / "clients.csv", index=False
        )
        counts_no_rows(runs / f"fedper-{seed}")
    write_comparison(tmp_path / "out", compare(read_runs([runs])), "mine")
    assert (tmp_path / "out" / "figures" / "client_accuracy.png").exists()


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
        counts_no_rows(runs / "fedper-1")
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
