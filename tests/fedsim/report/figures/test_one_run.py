"""Which pictures a run gets."""

from __future__ import annotations

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from fedsim.report.figures.accuracy import accuracy_over_rounds, group_accuracy
from fedsim.report.figures.one_run import save_figures
from tests.fedsim.report.figures.test_accuracy import clients_frame, rounds_frame, texts
from tests.fedsim.report.figures.test_class_counts import SMALL

NAN = np.nan
PNGS = ["accuracy_over_rounds.png", "client_accuracy.png", "class_counts.png", "group_accuracy.png"]


class TestSaveFigures:
    def save(self, folder, **changes):
        given = {
            "rounds": rounds_frame(),
            "clients": clients_frame([0.5, 0.6, 0.7]),
            "partition": SMALL,
            "num_clients": 3,
            "num_classes": 2,
            "title": "run",
        }
        return save_figures(folder, **(given | changes))

    def test_writes_all_into_a_new_folder(self, tmp_path):
        paths = self.save(tmp_path / "run" / "figures")
        assert paths == [tmp_path / "run" / "figures" / name for name in PNGS]
        for path in paths:
            assert path.read_bytes().startswith(b"\x89PNG")

    def test_without_evaluated_round_warns_and_keeps_class_counts(self, tmp_path):
        accuracies = [name for name in rounds_frame().columns if name.endswith("accuracy")]
        rounds = rounds_frame(**dict.fromkeys(accuracies, NAN))
        with pytest.warns(UserWarning, match="skipped, no ") as record:
            paths = self.save(tmp_path, rounds=rounds, clients=clients_frame([]))
        assert [path.name for path in paths] == ["class_counts.png"]
        assert [str(w.message).split(":")[0] for w in record] == [PNGS[0], PNGS[1], PNGS[3]]

    def test_frames_without_rows_or_columns(self, tmp_path):
        with pytest.warns(UserWarning, match="skipped, no "):
            paths = self.save(tmp_path, rounds=pd.DataFrame(), clients=pd.DataFrame())
        assert [path.name for path in paths] == ["class_counts.png"]

    def test_frames_read_back_from_csv(self, tmp_path):
        frames = {"rounds": rounds_frame(), "partition": SMALL}
        for name, frame in frames.items():
            frame.to_csv(tmp_path / f"{name}.csv", index=False)
        clients_frame([0.5]).iloc[:0].to_csv(tmp_path / "clients.csv", index=False)
        read = {n: pd.read_csv(tmp_path / f"{n}.csv") for n in (*frames, "clients")}
        with pytest.warns(UserWarning, match=r"client_accuracy\.png: skipped"):
            assert len(self.save(tmp_path, **read)) == 3

    def test_method_with_several_views_and_heads(self, tmp_path):
        clients = pd.concat(
            [clients_frame([0.5, 0.6]), clients_frame([0.75, 0.5], view="personal")]
        )
        norms = pd.DataFrame(
            {"head": "global head", "class": [0, 1], "examples": [9, 1], "norm": [1.5, 0.5]}
        )
        paths = self.save(tmp_path, clients=clients, norms=norms, etf=np.eye(2))
        assert [path.name for path in paths] == [
            *PNGS, "personal_gain.png", "class_norms.png", "etf.png",
        ]  # fmt: skip
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)

    def test_no_norms_are_no_picture_and_no_warning(self, tmp_path):
        paths = self.save(tmp_path, norms=pd.DataFrame(), etf=None)
        assert [path.name for path in paths] == PNGS

    def test_method_without_a_generic_model(self, tmp_path):
        groups = [f"{group}_accuracy" for group in ("head", "medium", "tail")]
        rounds = rounds_frame(**dict.fromkeys(["generic_accuracy", *groups], NAN))
        rounds = rounds.assign(**{f"personal_{name}": 0.5 for name in groups})
        clients = clients_frame([0.5, 0.6], view="personal")
        paths = self.save(tmp_path, rounds=rounds, clients=clients)
        assert [path.name for path in paths] == PNGS

    def test_title_is_written_as_it_is(self, tmp_path):
        # An odd number of $, and an unknown command: as mathematics this would fail.
        title = r"cost $5 & $\nonsense$ " + "long " * 60
        self.save(tmp_path, title=title)
        fig = accuracy_over_rounds(rounds_frame(), title)
        assert any(" ".join(text.split()) == title.strip() for text in texts(fig))

    def test_user_settings_neither_change_nor_leak_in(self, tmp_path):
        with mpl.rc_context({"font.size": 30, "axes.spines.top": True}):
            before = dict(mpl.rcParams)
            self.save(tmp_path)
            assert dict(mpl.rcParams) == before
            fig = group_accuracy(rounds_frame(), "run")
        assert not fig.axes[0].spines["top"].get_visible()
        assert fig.axes[0].xaxis.label.get_size() < 12

    def test_pyplot_is_never_imported(self):
        code = (
            "import sys, fedsim.report.figures.one_run, fedsim.report.tables\n"
            "bad = {'matplotlib.pyplot', 'torch', 'flwr', 'ray'} & set(sys.modules)\n"
            "sys.exit(str(bad) if bad else 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
