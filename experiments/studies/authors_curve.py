"""FedLoGe's authors' curve on CIFAR-10-LT, and runs from their draws beside it.

``python -m experiments.studies.authors_curve OUT.png`` draws the accuracies that stand in
experiments/results/fedloge: those read off the authors' log, and those of runs as
`experiments.studies.fedloge_authors` begins them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "results" / "fedloge"
VIEWS = {"personal": "#D55E00", "generic": "#0072B2"}


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="the picture, a PNG file")
    theirs = pd.read_csv(RESULTS / "authors_cifar10.csv")
    ours = pd.read_csv(RESULTS / "from_their_draws.csv")
    figure(theirs, ours).savefig(parser.parse_args().out, dpi=150)


def figure(theirs: pd.DataFrame, ours: pd.DataFrame) -> Figure:
    """Return the curves up to a third more rounds than ours has.

    Parameters
    ----------
    theirs : DataFrame
        ``round``, ``generic`` and ``personal``, in %.
    ours : DataFrame
        The same and ``run``; the run with the most rounds is drawn.
    """
    last = ours["round"].max()
    run = ours.loc[ours["round"] == last, "run"].iloc[0]
    longest = ours[ours["run"] == run]
    theirs = theirs[theirs["round"] <= last * 4 / 3]
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        fig = Figure(figsize=(7, 4), layout="constrained")
        ax = fig.add_subplot()
        for view, colour in VIEWS.items():
            ax.plot(longest["round"], longest[view], color=colour, lw=1.8)
            ax.plot(theirs["round"], theirs[view], "o", color=colour, ms=4, mfc="none")
            end = longest.iloc[-1]
            ax.annotate(
                view, (end["round"], end[view]), (6, 0), textcoords="offset points", color=colour
            )
        ax.plot([], [], color="#444444", lw=1.8, label=f"from their draws ({run})")
        ax.plot([], [], "o", color="#444444", ms=4, mfc="none", label="read off the authors' log")
        ax.legend(frameon=False, loc="lower right")
        ax.set(xlabel="Round", ylabel="Accuracy, %", xlim=(0, None), ylim=(0, 100))
        ax.set_title("FedLoGe on CIFAR-10-LT, 40 clients, as its authors ran it", loc="left")
    return fig


if __name__ == "__main__":
    main()
