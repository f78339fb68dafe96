"""Pictures of who holds what: labelled and unlabelled examples by client and class.

K clients, C classes, P pairs of client and class that occur, B bins of clients, R rows: a row for
each class, and a last one for the examples whose class nobody knows, if there are any. S strips of
a heat map, of one row or several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from fedsim.data.source import UNKNOWN
from fedsim.errors import DataError
from fedsim.report import _style
from fedsim.report.text import counted
from fedsim.run import frames

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MOST_BUBBLES = (60, 40)  # clients and classes up to which circles are large enough to compare
_ALL = "#C9C9C9"  # labelled and unlabelled together, in the histograms
_MOST_BINS = 200  # columns of a heat map: each still 3 pixels wide
_MOST_STRIPS = 500  # rows of a heat map: it has about as many pixels
_MOST_STEPS = 200  # of a histogram
_WIDEST = 0.94  # diameter of the largest circle, in cells
_SMALLEST = 0.17  # a circle for a single example must still be seen


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
        return "?" if row >= self.num_classes else _style.tick(round(row), self.class_names)

    def by_row(self, values: Ints) -> Floats:
        """Sum over clients: float64 [R]."""
        return np.bincount(self.row, values, minlength=self.num_rows).astype(np.float64)

    def by_client(self, values: Ints | npt.NDArray[np.bool_]) -> Floats:
        """Sum over classes: float64 [K]."""
        return np.bincount(self.client, values, minlength=self.num_clients).astype(np.float64)

    def note(self) -> str:
        """Say the sizes in one line."""
        labelled, total = self.labelled.sum(), (self.labelled + self.unlabelled).sum()
        unknown = "" if self.known.all() else "; ?: their class isn't known"
        return (
            f"{counted(self.num_clients, 'client')}, {self.num_classes:,} classes, "
            f"{total:,} training examples ({100 * labelled / total:.1f} % labelled{unknown})"
        )


def bubbles(counts: Counts, title: str) -> Figure:
    """Draw a circle for each client and class, with the sums of both beside it.

    Everything is placed in inches: a cell must be a square of known size for its circle.
    """
    cols, rows = counts.num_clients, counts.num_rows
    cell = float(np.clip(min(10.5 / cols, 6.5 / rows), 0.18, 0.6))
    wide, high = cols * cell, rows * cell
    clients = _style.ticks(range(cols), counts.client_names, wide)
    classes = [counts.row_name(row) for row in range(rows)]
    aside = max(0.0, _style.width(classes) - 0.2) if counts.class_names else 0.0
    left, gap, strip, top_strip, below = 0.8 + aside, 0.12, 1.5, 0.7, 0.5 + clients.height
    legend = max(0.4, cell + 0.1)
    width = max(left + wide + gap + strip + 0.15, 6.5)
    bottom = 0.1 + legend + below
    body = bottom + high + gap + top_strip + 0.12
    fig = _style.new_figure(width, body, title, counts.note(), constrained=False)
    height = fig.get_figheight()

    def axes(x: float, y: float, w: float, h: float) -> Axes:
        return fig.add_axes((x / width, y / height, w / width, h / height))

    main = axes(left, bottom, wide, high)
    main.set_xlim(-0.5, cols - 0.5)
    main.set_ylim(rows - 0.5, -0.5)
    main.set_xlabel("Client")
    main.set_ylabel("Class")
    main.spines[["left", "bottom"]].set_visible(False)
    main.tick_params(length=0)
    if counts.client_names:
        clients.place(main, np.arange(cols))
    else:  # two-digit numbers need 0.2 inch each
        main.set_xticks(np.arange(0, cols, 1 if cell >= 0.2 else 5))
    main.set_yticks(np.arange(rows), classes)
    for k in range(cols):
        main.axvline(k, color=_style.GRID, linewidth=0.5, zorder=0)
    for c in range(rows):
        main.axhline(c, color=_style.GRID, linewidth=0.5, zorder=0)
    total = counts.labelled + counts.unlabelled
    largest = int(_largest(total, counts.known))
    held = total > 0
    where = np.column_stack([counts.client, counts.row])[held]
    outer = _diameter(total[held], largest)
    # The dark part has its true share of the circle, also where the circle is the smallest one.
    inner = outer * np.sqrt(counts.labelled[held] / total[held])
    _circles(main, where, outer, _style.UNLABELLED)
    _circles(main, where, inner, _style.LABELLED)

    right = axes(left + wide + gap, bottom, strip, high)
    _class_totals(right, counts, named=True)
    right.set_ylim(rows - 0.5, -0.5)
    right.set_title("Total of the class", loc="left", color=_style.MUTED, fontsize=8)

    top = axes(left, bottom + high + gap, wide, top_strip)
    _stacked(top, counts.by_client(counts.labelled), counts.by_client(counts.unlabelled))
    top.set_xlim(-0.5, cols - 0.5)
    top.set_xticks([])
    top.spines["left"].set_visible(False)
    # Of so low bars the highest says most; a round number may be above it.
    top.set_yticks([0, int(counts.by_client(total).max())])
    top.yaxis.set_major_formatter(_style.THOUSANDS)
    top.tick_params(axis="y", length=0)
    top.grid(axis="y")
    top.set_ylabel("Total")
    for ax, inches, further in ((main, high, aside), (top, top_strip, 0.0)):
        ax.yaxis.set_label_coords(-(0.55 + further) / wide, 0.5)
        if inches < 0.6:
            ax.yaxis.label.set_fontsize(8)

    key = axes(0.15, 0.1, width - 0.3, legend)
    _size_legend(key, cell, largest, bool(total.max() > largest), width - 0.3, legend)
    return fig


def heat_maps(counts: Counts, title: str) -> Figure:
    """Draw the mean counts of clients grouped by their most frequent class, and histograms.

    However many clients and classes there are, the picture has as many parts: neighbours are drawn
    together.
    """
    total = counts.labelled + counts.unlabelled
    bins, bin_size = _bin_clients(counts, total)
    _, strip_size = _strips(counts)
    panels = {
        name: _mean_counts(counts, values, bins, bin_size)
        for name, values in (("Labelled", counts.labelled), ("Unlabelled", counts.unlabelled))
        if values.any()
    }
    every = np.concatenate(list(panels.values()), axis=1)
    low, high = float(every[every > 0].min()), _largest(every, _known_strips(counts))
    # Four powers of ten are all that the eye tells apart; rarer than that is drawn as rarest.
    norm = LogNorm(max(low, high / 1e4), high if high > low else 10 * low)

    few = counts.num_clients <= MOST_BUBBLES[0]
    fit = counts.num_clients * 0.13 <= (2.8 if len(panels) > 1 else 7.0)  # inches of a panel
    clients = _style.ticks(
        np.argsort(bins).tolist() if few else [], counts.client_names if fit else {}, 0.0
    )
    fig = _style.new_figure(10.5, 7.0 + clients.height, title, counts.note())
    grid = fig.add_gridspec(2, 3, width_ratios=[4, 4, 2.2], height_ratios=[2.1, 1])
    heat_axes = [
        fig.add_subplot(grid[0, :2] if len(panels) == 1 else grid[0, i]) for i in range(len(panels))
    ]
    for ax, (name, image) in zip(heat_axes, panels.items(), strict=True):
        shown = ax.imshow(
            np.ma.masked_equal(image, 0.0),
            aspect="auto",
            interpolation="nearest",
            cmap=mpl.colormaps["viridis_r"],
            norm=norm,
            extent=(0, counts.num_clients, counts.num_rows - 0.5, -0.5),
        )
        _style.set_note(ax, f"{name} examples")
        ax.set_xlabel("Clients, by their most frequent class, then size")
        if few:
            clients._replace(rotation=90).place(ax, np.arange(counts.num_clients) + 0.5)
        else:
            ax.xaxis.set_major_locator(_style.whole_numbers(5))
            ax.xaxis.set_major_formatter(_style.THOUSANDS)
        ax.yaxis.set_major_locator(_style.whole_numbers(20))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda row, _: counts.row_name(row)))
    heat_axes[0].set_ylabel("Class")
    beyond = "max" if every.max() > high else "neither"
    bar = fig.colorbar(shown, ax=heat_axes, location="bottom", aspect=50, pad=0.03, extend=beyond)
    bar.outline.set_visible(False)
    bar.formatter = FuncFormatter(lambda value, _: f"{value:,g}")
    if high < 10 * low:  # with a power of ten or none between them
        bar.minorformatter = bar.formatter
    merged = [
        what
        for what, is_merged in (
            ("clients", len(bin_size) < counts.num_clients),
            ("classes", len(strip_size) < counts.num_rows),
        )
        if is_merged
    ]
    per_bin = f", mean over neighbouring {' and '.join(merged)}" if merged else ""
    bar.set_label(f"Examples per client and class{per_bin} (white: none)")

    totals = fig.add_subplot(grid[0, 2])
    _class_totals(totals, counts, named=counts.num_classes <= 20)
    totals.set_ylim(counts.num_rows - 0.5, -0.5)
    several = len(strip_size) < counts.num_rows
    _style.set_note(totals, "Mean total of a class" if several else "Total of the class")

    _size_histogram(fig.add_subplot(grid[1, 0]), counts, total)
    _class_histogram(fig.add_subplot(grid[1, 1]), counts, total)
    key = fig.add_subplot(grid[1, 2])
    key.axis("off")
    key.legend(
        handles=[
            Patch(color=_style.LABELLED, label="labelled"),
            Patch(color=_style.UNLABELLED, label="unlabelled"),
            Patch(color=_ALL, label="both together"),
        ],
        loc="center left",
        frameon=False,
    )
    return fig


def _largest(values: Ints | Floats, known: slice | npt.NDArray[np.bool_]) -> float:
    """Return the largest value, of the known classes if they have any.

    Examples of unknown class are often so many that beside them no other could be seen.
    """
    return float(values[known].max(initial=0) or values.max())


def _diameter(values: npt.ArrayLike, largest: int) -> Floats:
    """Return diameters, in cells, of circles with area proportional to values in (0, largest]."""
    share = np.minimum(np.asarray(values, dtype=np.float64) / largest, 1.0)
    return np.maximum(_WIDEST * np.sqrt(share), _SMALLEST)


def _circles(ax: Axes, where: npt.ArrayLike, diameter: npt.ArrayLike, colour: str) -> None:
    """Draw circles; the unit of the x axis is one cell."""
    diameter = np.asarray(diameter)
    ax.add_collection(
        EllipseCollection(
            diameter,
            diameter,
            np.zeros(len(diameter)),
            units="x",
            offsets=np.asarray(where),
            offset_transform=ax.transData,
            facecolors=colour,
            edgecolors="none",
            zorder=2,
        )
    )


def _size_legend(
    ax: Axes, cell: float, largest: int, and_more: bool, width: float, height: float
) -> None:
    """Draw what a circle's size and its two colours mean, in a row, at the scale of the cells."""
    ax.set_xlim(0, width / cell)
    ax.set_ylim(-height / cell / 2, height / cell / 2)
    ax.axis("off")
    x = 0.0

    def write(text: str) -> None:
        nonlocal x
        ax.text(x / cell, 0, text, va="center_baseline", fontsize=8)
        x += 0.064 * len(text) + 0.18  # inches: the mean width of a letter, and a space

    def entry(text: str, diameter: float, colour: str) -> None:
        nonlocal x
        x += cell * diameter / 2
        _circles(ax, [(x / cell, 0)], [diameter], colour)
        x += cell * diameter / 2 + 0.06
        write(text)

    write("Examples (area):")
    # Up to this count all circles are the smallest one.
    least = int(largest * (_SMALLEST / _WIDEST) ** 2)
    if least > 0:
        entry(f"≤ {least:,}" if least > 1 else "1", _SMALLEST, _style.UNLABELLED)
    if largest >= 5:
        middle = _round_down(largest // 5)
        entry(f"{middle:,}", float(_diameter(middle, largest)), _style.UNLABELLED)
    entry(f"≥ {largest:,}" if and_more else f"{largest:,}", _WIDEST, _style.UNLABELLED)
    x += 0.15
    entry("labelled", 0.14 / cell, _style.LABELLED)
    entry("unlabelled", 0.14 / cell, _style.UNLABELLED)


def _round_down(value: int) -> int:
    """Round a value >= 1 down to 1, 2 or 5 times a power of ten.

    >>> [_round_down(v) for v in (1, 7, 34, 280, 1000)]
    [1, 5, 20, 200, 1000]
    """
    power = int("1" + "0" * (len(str(value)) - 1))
    return max(m * power for m in (1, 2, 5) if m * power <= value)


def _stacked(ax: Axes, labelled: Floats, unlabelled: Floats) -> None:
    x = np.arange(len(labelled))
    ax.bar(x, labelled, width=0.72, color=_style.LABELLED)
    ax.bar(x, unlabelled, width=0.72, bottom=labelled, color=_style.UNLABELLED)


def _class_totals(ax: Axes, counts: Counts, *, named: bool) -> None:
    """Draw the totals of the classes as lying bars; ``named`` writes them at the bars' ends."""
    strips, size = _strips(counts)
    labelled, unlabelled = (
        np.bincount(strips, counts.by_row(values)) / size
        for values in (counts.labelled, counts.unlabelled)
    )
    totals = [f"{value:,.0f}" for value in labelled + unlabelled]
    most = 1.2 * _largest(labelled + unlabelled, _known_strips(counts))
    if unlabelled[-1] > most:  # of unknown class
        unlabelled[-1], totals[-1] = most, f"⋯ {totals[-1]}"
    ax.set_yticks([])
    if named:
        y = np.arange(counts.num_rows)
        ax.barh(y, labelled, height=0.72, color=_style.LABELLED)
        bars = ax.barh(y, unlabelled, height=0.72, left=labelled, color=_style.UNLABELLED)
        ax.bar_label(bars, totals, padding=3, fontsize=8, color=_style.MUTED)
        # Room for the number at the end of the longest bar, whatever its length.
        ax.set_xlim(0, 1.55 * (labelled + unlabelled).max())
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
    else:  # as one outline: of many bars each takes milliseconds
        edges = np.linspace(-0.5, counts.num_rows - 0.5, len(size) + 1)
        for low, high, colour in (
            (np.zeros(len(size)), labelled, _style.LABELLED),
            (labelled, labelled + unlabelled, _style.UNLABELLED),
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
        ax.xaxis.set_major_locator(_style.whole_numbers(3))
        ax.xaxis.set_major_formatter(_style.THOUSANDS)
        ax.set_xlabel("Examples")


def _strips(counts: Counts) -> tuple[Ints, Ints]:
    """Give each row a strip of the heat map: its strip, int64 [R], and the strips' sizes [S].

    Where there are more classes than strips, neighbours share one; what nobody knows has its own.
    """
    classes = np.arange(counts.num_classes)
    strips = classes * min(counts.num_classes, _MOST_STRIPS) // counts.num_classes
    unknown = np.arange(counts.num_rows - counts.num_classes) + strips[-1] + 1
    strips = np.concatenate([strips, unknown])
    return strips, np.bincount(strips)


def _known_strips(counts: Counts) -> slice:
    return slice(min(counts.num_classes, _MOST_STRIPS))


def _bin_clients(counts: Counts, total: Ints) -> tuple[Ints, Ints]:
    """Give each client a column of the heat map: its bin, int64 [K], and the bins' sizes [B].

    Clients are ordered by their most frequent class, then by size, so that clients of one kind
    stand together and a bin doesn't average the differences between clients away.
    """
    # The last pair of a client in this order is its largest; in a tie the lower class.
    order = np.lexsort((-counts.row, total, counts.client))
    order = order[(total > 0)[order] & counts.known[order]]
    main_class = np.full(counts.num_clients, counts.num_classes)
    main_class[counts.client[order]] = counts.row[order]
    ranked = np.lexsort((-counts.by_client(total), main_class))
    num_bins = min(counts.num_clients, _MOST_BINS)
    bins = np.empty(counts.num_clients, dtype=np.int64)
    bins[ranked] = np.arange(counts.num_clients) * num_bins // counts.num_clients
    return bins, np.bincount(bins, minlength=num_bins)


def _mean_counts(counts: Counts, values: Ints, bins: Ints, bin_size: Ints) -> Floats:
    """Return the mean count of a bin's clients and a strip's rows, float64 [S, B]."""
    strips, strip_size = _strips(counts)
    cell = strips[counts.row] * len(bin_size) + bins[counts.client]
    sums = np.bincount(cell, values, minlength=len(strip_size) * len(bin_size))
    return sums.reshape(len(strip_size), len(bin_size)) / bin_size / strip_size[:, None]


def _size_histogram(ax: Axes, counts: Counts, total: Ints) -> None:
    """Draw how many examples the clients hold."""
    sizes, labelled = counts.by_client(total), counts.by_client(counts.labelled)
    high, median = sizes.max(), np.median(sizes)
    note = (
        f"{sizes.min():,.0f} to {high:,.0f}, median {median:,.0f}; "
        f"clients without labels: {np.count_nonzero(labelled == 0):,}"
    )
    if high > 20 * max(1.0, float(median)):
        # Bins that double (1, 2-3, 4-7, ...) are as wide as each other on a log scale and hold
        # whole numbers; clients with none have no place there.
        edges = 2.0 ** np.arange(np.ceil(np.log2(high + 1)) + 1)
        ax.set_xscale("log", base=2)
    else:
        edges = np.arange(0, high + 2, max(1, int(high / 40))) - 0.5
        edges = np.append(edges, edges[-1] + edges[1] - edges[0])
        ax.xaxis.set_major_locator(_style.whole_numbers(6))
    _two_histograms(ax, sizes, labelled, edges)
    ax.set_xlabel("Training examples of a client")
    ax.set_ylabel("Clients")
    ax.xaxis.set_major_formatter(_style.THOUSANDS)
    _style.set_note(ax, note)


def _class_histogram(ax: Axes, counts: Counts, total: Ints) -> None:
    """Draw how many classes the clients hold."""
    held = counts.by_client((total > 0) & counts.known)
    labelled = counts.by_client(counts.labelled > 0)
    step = max(1, int(held.max() / _MOST_STEPS))
    _two_histograms(ax, held, labelled, np.arange(0, held.max() + 1 + step, step) - 0.5)
    ax.set_xlabel("Classes of a client")
    ax.xaxis.set_major_locator(_style.whole_numbers(8))
    _style.set_note(
        ax,
        f"{held.min():.0f} to {held.max():.0f} of {counts.num_classes}, "
        f"median {np.median(held):.0f}",
    )


def _two_histograms(ax: Axes, together: Floats, labelled: Floats, edges: Floats) -> None:
    ax.stairs(np.histogram(together, edges)[0], edges, color=_ALL, fill=True)
    ax.stairs(np.histogram(labelled, edges)[0], edges, color=_style.LABELLED, linewidth=1.4)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(_style.whole_numbers(4))
    ax.yaxis.set_major_formatter(_style.THOUSANDS)
