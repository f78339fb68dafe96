"""A run as its folder holds it, and what is said of a folder that is damaged."""

import json
import shutil

import pandas as pd
import pytest

from fedsim.errors import DataError
from fedsim.report.report import write_report
from fedsim.run.saved import SavedRun


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def describe(run, **changes):
    said = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(said | changes))


@pytest.mark.parametrize("name", ["rounds", "clients", "training", "partition"])
@pytest.mark.parametrize("lost", [1, 10])
def test_rows_that_are_lost_are_told(run, name, lost):
    """A whole row, or the end of one."""
    file = run / f"{name}.csv"
    text = file.read_text()
    rows = text.count("\n") - 1
    end = text[:-1].rindex("\n") + 1 if lost == 1 else len(text) - lost
    file.write_text(text[:end])
    line = rf"{name}\.csv: has {rows - 1} of the {rows} rows that the run wrote; the rest of the"
    with pytest.warns(UserWarning, match=line):
        _ = SavedRun.read(run).training


@pytest.mark.parametrize("name", ["rounds", "clients", "training", "partition"])
def test_rows_that_are_too_many_are_told(run, name):
    file = run / f"{name}.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[-1]]))
    rows = len(lines) - 1
    line = rf"{name}\.csv: has {rows + 1} rows, of which the run wrote {rows}; all are shown"
    with pytest.warns(UserWarning, match=line):
        _ = SavedRun.read(run).training
    # A run that goes on has written more than its run.json says.
    describe(run, finished=None)
    _ = SavedRun.read(run).training


def test_names_that_are_lost_are_told(run):
    rows = json.loads((run / "run.json").read_text())["rows"]
    assert (rows["names.csv"], SavedRun.read(run).names.empty) == (0, True)
    describe(run, rows=rows | {"names.csv": 2})
    with pytest.warns(UserWarning, match=r"names\.csv: is missing; the rest of the run is shown"):
        assert SavedRun.read(run).names.empty
    (run / "names.csv").write_text("kind,number,name\nclass,0,a\n")
    with pytest.warns(UserWarning, match=r"names\.csv: has 1 of the 2 rows that the run wrote"):
        _ = SavedRun.read(run).names


def test_a_run_that_counted_only_some_rows_is_read(run):
    """As an older fedsim wrote it."""
    rows = json.loads((run / "run.json").read_text())["rows"]
    describe(run, rows={name: rows[name] for name in ("clients.csv", "training.csv")})
    partition = pd.read_csv(run / "partition.csv")
    partition.iloc[1:].to_csv(run / "partition.csv", index=False)
    _ = SavedRun.read(run).names


def test_rows_that_are_lost_of_a_run_that_counted_none_are_told(run):
    description = json.loads((run / "run.json").read_text())
    del description["rows"]
    (run / "run.json").write_text(json.dumps(description))
    rows = pd.read_csv(run / "clients.csv").query("round != 2")
    rows.to_csv(run / "clients.csv", index=False)
    with pytest.warns(UserWarning, match=r"clients\.csv: has no row of round 2, in which clients"):
        SavedRun.read(run)


class TestSavedRunFailure:
    def test_no_folder(self, tmp_path):
        with pytest.raises(DataError, match="nowhere: there is no such folder"):
            SavedRun.read(tmp_path / "nowhere")

    def test_another_folder(self, tmp_path):
        with pytest.raises(
            DataError, match=r"isn't the folder of a run, it has no experiment\.toml"
        ):
            SavedRun.read(tmp_path)

    @pytest.mark.parametrize("content", [None, "", "round,gen", "round,generic_accuracy\n1,0."])
    def test_no_round_yet(self, run, content):
        (run / "rounds.csv").unlink()
        if content is not None:
            (run / "rounds.csv").write_text(content)
        with pytest.raises(DataError, match="run: no round of this run has finished"):
            SavedRun.read(run)

    @pytest.mark.parametrize("content", [b"a,b\n1,2\n1,2,3\n", b"a\n\xff\n", b"a,b\n1,2\n"])
    @pytest.mark.parametrize("name", ["rounds.csv", "clients.csv", "training.csv", "partition.csv"])
    def test_a_table_that_can_not_be_read(self, run, name, content):
        (run / name).write_bytes(content)
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            write_report(SavedRun.read(run))

    @pytest.mark.parametrize(
        "name", ["rounds.csv", "clients.csv", "training.csv", "partition.csv", "names.csv"]
    )
    def test_a_row_cut_short(self, run, name):
        if name == "names.csv":
            (run / name).write_text('kind,number,name\nclass,0,"a\nb"\nclass,1,\nclass,2,b\n')
        lines = (run / name).read_text().splitlines(keepends=True)
        fields = lines[0].count(",") + 1
        lines[-2] = lines[-2].rpartition(",")[0] + "\n"
        (run / name).write_text("".join(lines))
        line = rf"{name}: line {len(lines) - 1} has {fields - 1} fields, the header has {fields}$"
        with pytest.raises(DataError, match=line):
            write_report(SavedRun.read(run))

    def test_an_empty_partition(self, run):
        (run / "partition.csv").write_text("client,class\n")
        with pytest.raises(DataError, match=r"partition\.csv: has no rows"):
            SavedRun.read(run)

    def test_a_word_among_numbers(self, run):
        rounds = pd.read_csv(run / "rounds.csv").astype({"generic_accuracy": object})
        rounds.loc[1, "generic_accuracy"] = "high"
        rounds.to_csv(run / "rounds.csv", index=False)
        line = r"rounds\.csv: column 'generic_accuracy' has an entry that is no number"
        with pytest.raises(DataError, match=line):
            SavedRun.read(run)

    @pytest.mark.parametrize(
        ("name", "old", "new", "missing"),
        [
            ("run.json", '"num_classes"', '"classes"', "num_classes"),
            ("run.json", '"versions": {', '"versions": [], "v": {', "versions"),
            ("experiment.toml", "[clients]", "[customers]", r"clients\.count"),
            ("experiment.toml", "rounds = 3", 'rounds = "three"', r"training\.rounds"),
        ],
    )
    def test_a_description_of_another_kind(self, run, name, old, new, missing):
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match=rf"{name}: .*{missing}.* another version of fedsim"):
            write_report(SavedRun.read(run))

    @pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
    @pytest.mark.parametrize("name", ["run.json", "experiment.toml"])
    def test_a_description_that_can_not_be_read(self, run, name, content):
        (run / name).write_bytes(content)
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            write_report(SavedRun.read(run))
