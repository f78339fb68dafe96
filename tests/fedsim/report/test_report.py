"""The report of a run: made from its folder, whatever became of the run."""

import base64
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

import fedsim
from fedsim import Experiment, cli
from fedsim.errors import DataError
from fedsim.report import page, report
from fedsim.report.report import write_report
from fedsim.run.saved import SavedRun

HEADS = ("class_norms.csv", "figures/class_norms.png")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


class Page(HTMLParser):
    """What a page shows: its tables as lists of rows of text, its pictures, all addresses."""

    def __init__(self, file):
        super().__init__()
        self.tables, self.pictures, self.addresses, self.text = [], [], [], ""
        self._cell = None
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[key] for key in ("src", "href") if key in attrs]
        if tag == "img":
            self.pictures.append(base64.b64decode(attrs["src"].partition(",")[2]))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._cell)
            self._cell = None

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            self._cell += data


def test_a_run_ends_with_a_page_that_needs_nothing_beside_it(finished):
    shown = Page(finished / "report.html")
    assert all(address.startswith("data:image/png;base64,") for address in shown.addresses)
    assert "http" not in (finished / "report.html").read_text()
    files = {file.read_bytes() for file in (finished / "figures").iterdir()}
    assert set(shown.pictures) == files
    assert len(shown.pictures) == 7


def test_the_page_has_every_clients_numbers(finished):
    heads, *rows = Page(finished / "report.html").tables[0]
    clients = pd.read_csv(finished / "clients.csv").query("round == 3")
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "mean", "std", "worst 10 %"]
    for view in ("generic", "generic-realigned", "personal", "personal-realigned"):
        accuracy = 100 * clients[clients["view"] == view].sort_values("client")["accuracy"]
        shown = [float(row[heads.index(view)]) for row in rows]
        np.testing.assert_allclose(shown[:5], accuracy, atol=0.05001)
        assert shown[5] == pytest.approx(accuracy.mean(), abs=0.05001)
        assert shown[6] == pytest.approx(accuracy.std(ddof=0), abs=0.05001)
        assert shown[7] == pytest.approx(accuracy.min(), abs=0.05001)
    labels = clients.query("view == 'generic'").sort_values("client")["num_labelled"]
    assert [row[heads.index("labels")] for row in rows[:5]] == [str(n) for n in labels]


def test_the_page_has_the_tested_rounds_and_every_setting(finished):
    shown = Page(finished / "report.html")
    heads, *rows = shown.tables[1]
    assert heads[:2] == ["round", "generic"]
    assert [row[0] for row in rows] == ["2", "3"]
    assert (finished / "experiment.toml").read_text() in shown.text


def test_a_users_words_are_no_markup(run):
    words = "mine:<script>alert(1)</script> & more"
    settings = (run / "experiment.toml").read_text()
    (run / "experiment.toml").write_text(settings.replace('"digits"', f'"{words}"'))
    write_report(SavedRun.read(run))
    assert Page(run / "report.html").text.count(words) == 2  # below the title, and in the settings
    assert "<script>alert" not in (run / "report.html").read_text()


def test_a_report_made_anew_is_the_same(run):
    before = {f: f.read_bytes() for f in (*run.glob("figures/*"), run / "class_norms.csv")}
    text = (run / "report.html").read_text()
    for file in (*before, run / "report.html"):
        file.unlink()
    assert write_report(SavedRun.read(run)) == run / "report.html"
    assert {file: file.read_bytes() for file in before} == before
    assert (run / "report.html").read_text() == text


def test_a_run_that_was_killed_has_a_report(run):
    # While the third round's rows are being written; its checkpoint is that of the third round.
    norms = (run / "class_norms.csv").read_bytes()
    description = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(
        json.dumps(description | {"finished": None, "rounds_finished": 0})
    )
    for file in ("model.safetensors", "class_norms.csv", "report.html"):
        (run / file).unlink()
    text = (run / "rounds.csv").read_text()
    (run / "rounds.csv").write_text(text[:-10])
    write_report(SavedRun.read(run))
    shown = Page(run / "report.html")
    assert "2 of 3 rounds had finished when this page was made." in shown.text
    assert "Clients after round 2" in shown.text  # clients.csv has the third, too
    assert "Of the first 0 rounds." in shown.text
    assert len(shown.pictures) == 7
    assert (run / "class_norms.csv").read_bytes() == norms


def test_a_run_that_goes_on_shows_its_checkpoints_model_not_the_last_ones(run):
    norms = (run / "class_norms.csv").read_bytes()
    save_file({"head.weight": np.ones((10, 4), np.float32)}, run / "model.safetensors")
    write_report(SavedRun.read(run))
    assert (run / "class_norms.csv").read_bytes() != norms
    description = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(description | {"finished": None}))
    write_report(SavedRun.read(run))
    assert (run / "class_norms.csv").read_bytes() == norms


def test_a_report_of_a_run_that_ends_meanwhile_shows_its_end(run, monkeypatch):
    """Whether the run's own report was written before or after."""
    files = [run / "report.html", run / "class_norms.csv", *run.glob("figures/*")]
    last = {file: file.read_bytes() for file in files}
    end = {name: (run / name).read_text() for name in ("run.json", "rounds.csv")}
    description = json.loads(end["run.json"]) | {"finished": None, "rounds_finished": 0}
    (run / "run.json").write_text(json.dumps(description))
    (run / "rounds.csv").write_text("".join(end["rounds.csv"].splitlines(True)[:3]))
    write = report.write_page
    written = []

    def ends_meanwhile(*arguments):
        for name, text in end.items() if not written else ():
            (run / name).write_text(text)
        written.append(write(*arguments))
        if len(written) == 1:
            assert "2 of 3 rounds" in (run / "report.html").read_text()
        return written[-1]

    monkeypatch.setattr(report, "write_page", ends_meanwhile)
    found, page = report.report_of(run)
    assert (len(found.rounds), page, len(written)) == (3, run / "report.html", 2)
    assert {file: file.read_bytes() for file in files} == last


def test_without_the_clients_file_there_is_a_page_without_clients(run):
    (run / "clients.csv").unlink()
    with pytest.warns(UserWarning, match=r"clients\.csv: is missing; the rest of the run is shown"):
        saved = SavedRun.read(run)
    with pytest.warns(UserWarning, match=r"client_accuracy\.png: skipped, no client was tested"):
        write_report(saved)
    assert "Clients after" not in Page(run / "report.html").text


def test_a_model_with_a_wrong_bit_is_told(run):
    content = bytearray((run / "model.safetensors").read_bytes())
    content[-50] ^= 1
    (run / "model.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match=r"model\.safetensors: can't be read: .*checksum differs"):
        write_report(SavedRun.read(run))


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "state/versions.npy"])
def test_a_model_that_can_not_be_read_leaves_the_rest(run, name, lost):
    """And what an earlier report wrote of it."""
    kept = {run / file: (run / file).read_bytes() for file in HEADS}
    content = (run / name).read_bytes()
    (run / name).unlink()
    if not lost:
        (run / name).write_bytes(content[:60])
    with pytest.warns(UserWarning, match=rf"{name}.*; the report goes without the heads"):
        write_report(SavedRun.read(run))
    assert len(Page(run / "report.html").pictures) == 5
    assert {file: file.read_bytes() for file in kept} == kept


def test_a_client_update_of_ones_own_is_named(run):
    settings = (run / "experiment.toml").read_text()
    assert 'client = ""' in settings
    (run / "experiment.toml").write_text(settings.replace('client = ""', 'client = "moon:Moon"'))
    write_report(SavedRun.read(run))
    line = "fedloge with client moon:Moon and model cnn on digits, 5 clients (iid), 3 rounds"
    assert line in Page(run / "report.html").text


def test_the_page_says_how_many_clients_were_tested(run):
    clients = pd.read_csv(run / "clients.csv")
    clients[clients["client"] != 4].to_csv(run / "clients.csv", index=False)
    with pytest.warns(UserWarning, match=r"clients\.csv: has 32 of the 40 rows that the run wrote"):
        saved = SavedRun.read(run)
    write_report(saved)
    assert "4 of 5 were tested." in Page(run / "report.html").text


def test_a_view_of_a_methods_own_is_shown(run):
    rounds = pd.read_csv(run / "rounds.csv")
    rounds["generic_cold_accuracy"] = 0.125 * rounds["generic_accuracy"].notna()
    rounds.to_csv(run / "rounds.csv", index=False)
    write_report(SavedRun.read(run))
    shown = Page(run / "report.html")
    heads, *rows = shown.tables[1]
    assert [row[heads.index("generic-cold")] for row in rows][-1] == "12.5"
    assert "generic-cold12.5 %" in shown.text


def test_heads_of_any_shape_are_left_out(run):
    other = {"head.weight": np.ones((3, 5), np.float32), "etf.weight": np.ones(10, np.float32)}
    save_file(other, run / "model.safetensors")
    for name in ("state", "checkpoint"):  # which knows that there were some
        shutil.rmtree(run / name)
    write_report(SavedRun.read(run))
    assert pd.read_csv(run / "class_norms.csv").empty


def test_a_run_without_evaluation_or_labels_has_a_report(run):
    rounds = pd.read_csv(run / "rounds.csv")
    rounds.loc[:, rounds.columns.str.contains("accuracy")] = np.nan
    rounds["train_loss"] = np.nan
    rounds.to_csv(run / "rounds.csv", index=False)
    clients = pd.read_csv(run / "clients.csv")
    clients.loc[:, clients.columns.str.contains("accuracy")] = np.nan
    clients.to_csv(run / "clients.csv", index=False)
    with pytest.warns(UserWarning, match="skipped, no ") as told:
        write_report(SavedRun.read(run))
    assert [str(one.message) for one in told] == [
        "accuracy_over_rounds.png: skipped, no evaluated round to draw",
        "client_accuracy.png: skipped, no client was tested on examples of its own",
        "group_accuracy.png: skipped, no evaluated round to draw",
    ]
    assert len(Page(run / "report.html").pictures) == 3


def test_of_many_clients_the_page_lists_the_best_and_the_worst(run, monkeypatch):
    monkeypatch.setattr(page, "MOST_CLIENTS", 2)
    write_report(SavedRun.read(run))
    shown = Page(run / "report.html")
    assert len(shown.tables[0]) == 1 + 2 + 3
    assert "The 1 best and 1 worst of 5 clients by personal accuracy; 3 not shown" in shown.text


def test_of_many_rounds_the_page_lists_the_last(run, monkeypatch):
    monkeypatch.setattr(page, "MOST_ROUNDS", 1)
    write_report(SavedRun.read(run))
    shown = Page(run / "report.html")
    assert [row[0] for row in shown.tables[1][1:]] == ["3"]
    assert "The last 1 of 2: see rounds.csv" in shown.text


def test_class_norms_are_those_of_the_saved_heads(run):
    # Rows of two features: (0, 0), (3, 4), (6, 8), ... have norms 0, 5, 10, ...
    head = np.outer(np.arange(10), [3, 4]).astype(np.float32)
    save_file({"head.weight": head, "retrained.weight": 2 * head}, run / "model.safetensors")
    for name in ("state", "checkpoint"):  # which knows that there were some
        shutil.rmtree(run / name)
    write_report(SavedRun.read(run))
    norms = pd.read_csv(run / "class_norms.csv")
    assert norms["head"].drop_duplicates().tolist() == ["global head", "re-trained head"]
    assert norms["norm"].tolist() == [*range(0, 50, 5), *range(0, 100, 10)]
    partition = pd.read_csv(run / "partition.csv")
    held = (partition["labelled"] + partition["unlabelled"]).groupby(partition["class"]).sum()
    assert norms["examples"].tolist() == held.tolist() * 2


@pytest.fixture(scope="module")
def npz_of_hospitals(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "hospitals.npz"
    rng = np.random.default_rng(0)
    y = {"train": np.arange(120) % 4, "test": np.arange(60) % 4}
    arrays = {f"y_{split}": labels for split, labels in y.items()}
    arrays |= {
        f"x_{s}": rng.normal(labels[:, None], 1, (len(labels), 3)) for s, labels in y.items()
    }
    group = np.array(["hosp10", "<i>hosp2</i>", "$3$"])
    np.savez(file, **arrays, group_train=group[np.arange(120) // 4 % 3])
    return file


def counts_no_names(run):
    """Change a run to one of an older fedsim, whose run.json doesn't say how many names it has."""
    said = json.loads((run / "run.json").read_text())
    del said["rows"]["names.csv"]
    (run / "run.json").write_text(json.dumps(said))


def of_hospitals(file, **changes):
    return Experiment(
        data={"source": f"npz:{file}"},
        clients={"count": 3, "partition": "group"} | changes.get("clients", {}),
        model={"name": "linear"},
        training={"rounds": changes.get("rounds", 2)},
        engine={"backend": "inline"},
    )


class TestNames:
    """Groups in sorted order: $3$, <i>hosp2</i>, hosp10."""

    @pytest.fixture
    def named(self, npz_of_hospitals, tmp_path):
        result = fedsim.simulate(of_hospitals(npz_of_hospitals), out=tmp_path / "named")
        return result, tmp_path / "named"

    def test_a_run_says_whose_numbers_are_whose(self, named):
        result, folder = named
        rows = "kind,number,name\nclient,0,$3$\nclient,1,<i>hosp2</i>\nclient,2,hosp10\n"
        assert (folder / "names.csv").read_text() == rows
        pd.testing.assert_frame_equal(result.names, SavedRun.read(folder).names, check_dtype=False)
        assert set(result.clients["client"]) == {0, 1, 2}

    def test_the_page_names_the_clients_whatever_is_in_the_names(self, named):
        heads, *rows = Page(named[1] / "report.html").tables[0]
        assert heads[:3] == ["client", "name", "train"]
        assert [row[:2] for row in rows] == [
            ["0", "$3$"],
            ["1", "<i>hosp2</i>"],
            ["2", "hosp10"],
            *([label, ""] for label in ("mean", "std", "worst 10 %")),
        ]
        assert {len(row) for row in rows} == {len(heads)}
        assert "<i>hosp2" not in (named[1] / "report.html").read_text()

    def test_the_page_names_the_classes_of_each_group(self, run):
        names = pd.DataFrame({"kind": "class", "number": range(10), "name": list("abcdefghij")})
        names.loc[:2, "name"] = ["NA", "<b>dog</b>", ""]
        names.to_csv(run / "names.csv", index=False)
        counts_no_names(run)
        write_report(SavedRun.read(run))
        shown = Page(run / "report.html")
        caption = shown.text.partition("rare (tail) classes. Head: ")[2].partition("\n")[0]
        words = caption.replace("Medium: ", "").replace("Tail: ", "").replace(".", ",").split(", ")
        words = [word.rstrip(",") for word in words]
        assert sorted(words) == sorted(["NA", "<b>dog</b>", "2", *"defghij"]), caption
        heads, *rows = shown.tables[2]
        assert heads == ["class", "name", "training examples", "group"]
        assert [row[:2] for row in rows[:3]] == [["0", "NA"], ["1", "<b>dog</b>"], ["2", ""]]
        counts = pd.read_csv(run / "partition.csv").query("`class` == 0")
        assert rows[0][2:] == [str(counts[["labelled", "unlabelled"]].to_numpy().sum()), "head"]

    def test_without_names_there_is_no_file_of_names(self, finished, npz_of_hospitals, tmp_path):
        assert not (finished / "names.csv").exists()
        assert SavedRun.read(finished).names.empty
        experiment = of_hospitals(npz_of_hospitals, clients={"partition": "iid"})
        assert fedsim.simulate(experiment, out=tmp_path / "iid").names.empty
        assert not (tmp_path / "iid" / "names.csv").exists()

    def test_a_run_from_before_there_were_names_goes_on(self, named, npz_of_hospitals):
        _, folder = named
        names = (folder / "names.csv").read_bytes()
        (folder / "names.csv").unlink()
        counts_no_names(folder)
        write_report(SavedRun.read(folder))
        more = of_hospitals(npz_of_hospitals, rounds=3)
        assert len(fedsim.simulate(more, out=folder, resume=True).rounds) == 3
        assert (folder / "names.csv").read_bytes() == names

    def test_who_holds_what_by_name(self, npz_of_hospitals, tmp_path, capsys):
        (tmp_path / "named.toml").write_text(of_hospitals(npz_of_hospitals).to_toml())
        cli.partition(tmp_path / "named.toml", out=tmp_path / "out")
        assert "<i>hosp2</i>" in capsys.readouterr().out
        assert "client,2,hosp10" in (tmp_path / "out" / "names.csv").read_text()

    @pytest.mark.parametrize("content", ["kind,number\nclass,0\n", "kind,number,name\nclass,x,y\n"])
    def test_names_that_can_not_be_read(self, run, content):
        (run / "names.csv").write_text(content)
        with pytest.raises(DataError, match=r"names\.csv: column '(name|number)'"):
            write_report(SavedRun.read(run))
