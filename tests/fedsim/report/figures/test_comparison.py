"""What the figures of several runs show: a line of its own for each."""

import shutil
from dataclasses import replace

from fedsim.report.comparison import compare, read_runs
from fedsim.report.figures.comparison import accuracy_over_rounds
from tests.fedsim.report.test_comparison import change


def test_twelve_runs_have_twelve_colours_for_lines_and_labels(two_methods):
    (one, _) = compare(read_runs([two_methods]))
    figure = accuracy_over_rounds([replace(one, label=f"run {i}") for i in range(12)], "mine")
    ax = figure.axes[0]
    labels = [text for text in ax.texts if text.get_text().startswith("run ")]
    lines = [line for line in ax.lines if len(line.get_xdata()) == 2]
    assert len({text.get_color() for text in labels}) == len(labels) == 12
    assert [line.get_color() for line in lines] == [text.get_color() for text in labels]
    assert len({line.get_linestyle() for line in lines}) == 2


def test_many_runs_have_lines_of_their_own(runs):
    for i in range(9):
        copy = shutil.copytree(runs / "fedavg-0", runs / f"lr-{i}")
        change(copy, "lr = 0.1", f"lr = 1.{i}")
    seed_groups = compare(read_runs([runs]))
    assert len(seed_groups) == 11
    lines = [
        line
        for line in accuracy_over_rounds(seed_groups, "mine").axes[0].lines
        if len(line.get_xdata())
    ]
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == 10  # FedPer has no generic model
