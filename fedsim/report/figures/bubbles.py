"""A circle for each client and class: who holds how much of what, of a few clients.

K clients, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from fedsim.report.figures import style
from fedsim.report.figures.counts import Counts, Floats, class_totals, largest_known

MOST_BUBBLES = (60, 40)  # clients and classes up to which circles are large enough to compare
_WIDEST = 0.94  # diameter of the largest circle, in cells
_SMALLEST = 0.17  # a circle for a single example must still be seen


def bubbles(counts: Counts, title: str) -> Figure:
    """Draw a circle for each client and class, with the sums of both beside it.

    Everything is placed in inches: a cell must be a square of known size for its circle.
    """
    cols, rows = counts.num_clients, counts.num_rows
    cell = float(np.clip(min(10.5 / cols, 6.5 / rows), 0.18, 0.6))
    wide, high = cols * cell, rows * cell
    clients = style.ticks(range(cols), counts.client_names, wide)
    classes = [counts.row_name(row) for row in range(rows)]
    aside = max(0.0, style.width(classes) - 0.2) if counts.class_names else 0.0
    left, gap, strip, top_strip, below = 0.8 + aside, 0.12, 1.5, 0.7, 0.5 + clients.height
    legend = max(0.4, cell + 0.1)
    width = max(left + wide + gap + strip + 0.15, 6.5)
    bottom = 0.1 + legend + below
    body = bottom + high + gap + top_strip + 0.12
    fig = style.new_figure(width, body, title, counts.note(), constrained=False)
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
        main.axvline(k, color=style.GRID, linewidth=0.5, zorder=0)
    for c in range(rows):
        main.axhline(c, color=style.GRID, linewidth=0.5, zorder=0)
    total = counts.labelled + counts.unlabelled
    largest = int(largest_known(total, counts.known))
    held = total > 0
    where = np.column_stack([counts.client, counts.row])[held]
    outer = _diameter(total[held], largest)
    # The dark part has its true share of the circle, also where the circle is the smallest one.
    inner = outer * np.sqrt(counts.labelled[held] / total[held])
    _circles(main, where, outer, style.UNLABELLED)
    _circles(main, where, inner, style.LABELLED)

    right = axes(left + wide + gap, bottom, strip, high)
    class_totals(right, counts, named=True)
    right.set_ylim(rows - 0.5, -0.5)
    right.set_title("Total of the class", loc="left", color=style.MUTED, fontsize=8)

    top = axes(left, bottom + high + gap, wide, top_strip)
    _stacked(top, counts.by_client(counts.labelled), counts.by_client(counts.unlabelled))
    top.set_xlim(-0.5, cols - 0.5)
    top.set_xticks([])
    top.spines["left"].set_visible(False)
    # Of so low bars the highest says most; a round number may be above it.
    top.set_yticks([0, int(counts.by_client(total).max())])
    top.yaxis.set_major_formatter(style.THOUSANDS)
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
        entry(f"≤ {least:,}" if least > 1 else "1", _SMALLEST, style.UNLABELLED)
    if largest >= 5:
        middle = _round_down(largest // 5)
        entry(f"{middle:,}", float(_diameter(middle, largest)), style.UNLABELLED)
    entry(f"≥ {largest:,}" if and_more else f"{largest:,}", _WIDEST, style.UNLABELLED)
    x += 0.15
    entry("labelled", 0.14 / cell, style.LABELLED)
    entry("unlabelled", 0.14 / cell, style.UNLABELLED)


def _round_down(value: int) -> int:
    """Round a value >= 1 down to 1, 2 or 5 times a power of ten.

    >>> [_round_down(v) for v in (1, 7, 34, 280, 1000)]
    [1, 5, 20, 200, 1000]
    """
    power = int("1" + "0" * (len(str(value)) - 1))
    return max(m * power for m in (1, 2, 5) if m * power <= value)


def _stacked(ax: Axes, labelled: Floats, unlabelled: Floats) -> None:
    x = np.arange(len(labelled))
    ax.bar(x, labelled, width=0.72, color=style.LABELLED)
    ax.bar(x, unlabelled, width=0.72, bottom=labelled, color=style.UNLABELLED)
