"""Who holds how many examples of what, and what all figures of that share.

K clients, C classes, P pairs of client and class that occur, R rows: a row for each class, and a
last one for the examples whose class nobody knows, if there are any. S strips of a heat map, of one
row or several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes

from fedsim.data.source import UNKNOWN
from fedsim.errors import DataError
from fedsim.report.figures import style
from fedsim.report.text import counted
from fedsim.run import frames

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_MOST_STRIPS = 500  # rows of a heat map: it has about as many pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """The training examples of each (client, class) pair that occurs, all int64 [P].

    ``row`` is the class, or C where nobody knows it. Clients and classes may have names.
    """

    num_clients: int
    num_classes: int
    client: Ints
    row: Ints
    labelled: Ints
    unlabelled: Ints
    client_names: Mapping[int, str]
    class_names: Mapping[int, str]

    @classmethod
    def read(
        cls,
        partition: pd.DataFrame,
        num_clients: int,
        num_classes: int,
        names: pd.DataFrame | None = None,
    ) -> Counts:
        """Check and take over the frames of partition.csv and names.csv."""
        columns = ("client", "class", "labelled", "unlabelled")
        frames.require(partition, columns, "partition.csv")
        client, klass, labelled, unlabelled = (
            partition[name].to_numpy(dtype=np.int64) for name in columns
        )
        for name, values, start, stop in (
            ("client", client, 0, num_clients),
            ("class", klass, UNKNOWN, num_classes),
        ):
            outside = (values < start) | (values >= stop)
            if outside.any():
                row = int(np.argmax(outside))
                raise DataError(
                    f"partition.csv: row {row} has {name} {values[row]};"
                    f" must be in [{start}, {stop})"
                )
        if labelled.sum() + unlabelled.sum() == 0:
            raise DataError("partition.csv: no client holds a training example; nothing to draw")
        return cls(
            num_clients=num_clients,
            num_classes=num_classes,
            client=client,
            row=np.where(klass == UNKNOWN, num_classes, klass),
            labelled=labelled,
            unlabelled=unlabelled,
            client_names=frames.names_of(names, "client"),
            class_names=frames.names_of(names, "class"),
        )

    @property
    def num_rows(self) -> int:
        """R."""
        return max(self.num_classes, int(self.row.max()) + 1)

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Whether the class of a pair is known, [P]."""
        return self.row < self.num_classes

    def row_name(self, row: float) -> str:
        """Return the class, or a question mark."""
        return "?" if row >= self.num_classes else style.tick(round(row), self.class_names)

    def by_row(self, values: Ints) -> Floats:
        """Sum over clients: float64 [R]."""
        return np.bincount(self.row, values, minlength=self.num_rows).astype(np.float64)

    def by_client(self, values: Ints | npt.NDArray[np.bool_]) -> Floats:
        """Sum over classes: float64 [K]."""
        return np.bincount(self.client, values, minlength=self.num_clients).astype(np.float64)

    def strips(self) -> tuple[Ints, Ints]:
        """Give each row a strip of the heat map: its strip, int64 [R], and the strips' sizes [S].

        Where there are more classes than strips, neighbours share one; what nobody knows has its
        own.
        """
        classes = np.arange(self.num_classes)
        strips = classes * min(self.num_classes, _MOST_STRIPS) // self.num_classes
        unknown = np.arange(self.num_rows - self.num_classes) + strips[-1] + 1
        strips = np.concatenate([strips, unknown])
        return strips, np.bincount(strips)

    @property
    def known_strips(self) -> slice:
        """The strips of known classes."""
        return slice(min(self.num_classes, _MOST_STRIPS))

    def note(self) -> str:
        """Say the sizes in one line."""
        labelled, total = self.labelled.sum(), (self.labelled + self.unlabelled).sum()
        unknown = "" if self.known.all() else "; ?: their class isn't known"
        return (
            f"{counted(self.num_clients, 'client')}, {self.num_classes:,} classes, "
            f"{total:,} training examples ({100 * labelled / total:.1f} % labelled{unknown})"
        )


def class_totals(ax: Axes, counts: Counts, *, named: bool) -> None:
    """Draw the totals of the classes as lying bars; ``named`` writes them at the bars' ends."""
    strips, size = counts.strips()
    labelled, unlabelled = (
        np.bincount(strips, counts.by_row(values)) / size
        for values in (counts.labelled, counts.unlabelled)
    )
    totals = [f"{value:,.0f}" for value in labelled + unlabelled]
    most = 1.2 * largest_known(labelled + unlabelled, counts.known_strips)
    if unlabelled[-1] > most:  # of unknown class
        unlabelled[-1], totals[-1] = most, f"⋯ {totals[-1]}"
    ax.set_yticks([])
    if named:
        y = np.arange(counts.num_rows)
        ax.barh(y, labelled, height=0.72, color=style.LABELLED)
        bars = ax.barh(y, unlabelled, height=0.72, left=labelled, color=style.UNLABELLED)
        ax.bar_label(bars, totals, padding=3, fontsize=8, color=style.MUTED)
        # Room for the number at the end of the longest bar, whatever its length.
        ax.set_xlim(0, 1.55 * (labelled + unlabelled).max())
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
    else:  # as one outline: of many bars each takes milliseconds
        edges = np.linspace(-0.5, counts.num_rows - 0.5, len(size) + 1)
        for low, high, colour in (
            (np.zeros(len(size)), labelled, style.LABELLED),
            (labelled, labelled + unlabelled, style.UNLABELLED),
        ):
            ax.stairs(
                high,
                edges,
                baseline=low,
                orientation="horizontal",
                fill=True,
                color=colour,
                snap=True,
            )
        ax.xaxis.set_major_locator(style.whole_numbers(3))
        ax.xaxis.set_major_formatter(style.THOUSANDS)
        ax.set_xlabel("Examples")


def largest_known(values: Ints | Floats, known: slice | npt.NDArray[np.bool_]) -> float:
    """Return the largest value, of the known classes if they have any.

    Examples of unknown class are often so many that beside them no other could be seen.
    """
    return float(values[known].max(initial=0) or values.max())
