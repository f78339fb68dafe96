"""The look that all figures share: colours, type, titles and labels beside the data.

Matplotlib's objects are used directly: no pyplot, no change of anyone's settings.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedsim.run.directory import write_whole

# Okabe and Ito, "Color Universal Design": told apart with any kind of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# For more series than that; the last two are near others to some colour-blind eyes.
SERIES_COLOURS = (*PALETTE, *("#222222", "#B00020", "#332288", "#882255", "#117733", "#999933"))
# Realigned views: the lighter tone of the same hue, and dashed where lines run close.
VIEW_COLOURS = {
    "generic": PALETTE[0],
    "generic-realigned": PALETTE[5],
    "personal": PALETTE[1],
    "personal-realigned": PALETTE[4],
}
VIEW_DASHES = dict.fromkeys(("generic-realigned", "personal-realigned"), (0, (3.5, 1.8)))
# One hue from dark to light: the groups have an order. Not too light for a line or a word.
GROUP_COLOURS = {"head": "#08458F", "medium": "#3585C2", "tail": "#70B3DE"}
LABELLED, UNLABELLED = "#08519C", "#A6CEE4"
INK, MUTED, GRID, SHADE = "#222222", "#666666", "#E4E4E4", "#F1F1F1"
DPI = 150

_FONT = FontProperties(family="DejaVu Sans", size=8)  # of tick labels, as in STYLE
_LONGEST_NAME = 18  # characters of a tick label

# Set for the time of drawing only, so that neither the user's own settings nor ours leak.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.usetex": False,
    "text.color": INK,
    "axes.facecolor": "white",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": None,
    "figure.dpi": DPI,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "lines.solid_capstyle": "round",
}

THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")


def view_colours(views: Iterable[str]) -> dict[str, str]:
    """Return a colour for each view, also for those of a method's own."""
    spare = [colour for colour in PALETTE if colour not in VIEW_COLOURS.values()]
    others = [view for view in views if view not in VIEW_COLOURS]
    return VIEW_COLOURS | {view: spare[i % len(spare)] for i, view in enumerate(others)}


def new_figure(
    width: float, body: float, title: str, note: str, *, constrained: bool = True
) -> Figure:
    """Return a figure that draws itself without pyplot, with its header written.

    Parameters
    ----------
    width, body : float
        Inches; the header adds its own height above the body.
    title : str
        The user's: bold, wrapped, written as it is (``$`` starts no mathematics).
    note : str
        Ours: grey, below the title.
    constrained : bool
        Whether matplotlib places the axes in the body; if not, the caller does.
    """
    title = textwrap.fill(title, int(width / 0.105), break_on_hyphens=False)
    note = textwrap.fill(note, int(width / 0.07))
    title_height = 0.19 * (title.count("\n") + 1)
    header = 0.16 + title_height + 0.06 + 0.16 * (note.count("\n") + 1) + 0.1
    height = body + header
    fig = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(fig)
    if constrained:
        fig.set_layout_engine(
            ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, rect=(0, 0, 1, body / height))
        )

    def write(text: str, inches_down: float, **look: Any) -> None:
        x, y = 0.12 / width, 1 - inches_down / height
        fig.text(x, y, text, va="top", parse_math=False, **look).set_in_layout(False)

    write(title, 0.16, fontsize=11, fontweight="bold")
    write(note, 0.16 + title_height + 0.06, color=MUTED)
    return fig


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file as the style says, whatever the user's own Matplotlib settings are."""
    picture = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(picture, dpi=DPI, format="png")
    write_whole(path, picture.getvalue())


def whole_numbers(most: int) -> MaxNLocator:
    """Place up to ``most`` ticks, on round whole numbers only; one is enough."""
    return MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


class Ticks(NamedTuple):
    """Labels of ticks in a row, how far they are turned, and the inches below that this takes."""

    labels: list[str]
    rotation: int
    height: float

    def place(self, ax: Axes, at: npt.ArrayLike) -> None:
        """Write them below the x axis of some axes."""
        ax.set_xticks(np.asarray(at), self.labels)
        ax.tick_params(axis="x", length=0, rotation=self.rotation)


def ticks(numbers: Iterable[int], names: Mapping[int, str], room: float) -> Ticks:
    """Return the labels of all classes or clients in a row ``room`` inches long.

    Names that don't fit side by side are turned; ``height`` is what they need beyond numbers.
    """
    labels = [tick(number, names) for number in numbers]
    if not names:
        return Ticks(labels, 0 if len(labels) <= 20 else 90, 0.0)
    widest = width(labels)
    if len(labels) * (widest + 0.1) <= room:
        return Ticks(labels, 0, 0.0)
    return Ticks(labels, 90, max(0.0, widest - 0.2))


def tick(number: int, names: Mapping[int, str]) -> str:
    """Return the tick label of a class or client: its name, or its number where it has none.

    A long name is cut short, and the number then says which it is. A name that the font can't draw
    leaves its place to the number. ``$`` starts no mathematics.

    >>> tick(6, {6: "University Hospital"}), tick(7, {6: "University Hospital"})
    ('University Ho… (6)', '7')
    """
    name = names.get(number, "")
    if len(name) > _LONGEST_NAME:
        end = f"… ({number})"
        name = name[: _LONGEST_NAME - len(end)].rstrip() + end
    if not name.strip() or not _drawable().issuperset(map(ord, name)):
        return str(number)
    return name.replace("$", r"\$")


@cache
def _drawable() -> frozenset[int]:
    """Return the characters of the figures' font."""
    return frozenset(get_font(findfont(_FONT)).get_charmap())


def width(labels: Iterable[str]) -> float:
    """Return the inches that the widest of some tick labels takes."""
    font = get_font(findfont(_FONT))
    font.set_size(_FONT.get_size_in_points(), 72)
    widest = 0.0
    for label in labels:
        font.set_text(label, 0.0)
        widest = max(widest, font.get_width_height()[0] / 64 / 72)  # 64ths of a point
    return widest


def set_note(ax: Axes, note: str) -> None:
    """Write a grey line above axes, at their left."""
    ax.set_title(note, loc="left", color=MUTED, fontsize=9, parse_math=False)


def percent_axis(ax: Axes, values: npt.NDArray[np.float64]) -> None:
    """Let the y axis run over the tens of % around the values, both ends drawn in full."""
    low = 10 * np.floor(np.nanmin(values) / 10)
    high = 10 * np.ceil(np.nanmax(values) / 10)
    if low == high:
        low, high = max(0.0, low - 10), min(100.0, high + 10)
    pad = 0.02 * (high - low)
    ax.set_ylim(low - pad, high + pad)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    ax.set_ylabel("Accuracy (%)")
    ax.grid(axis="y")


def round_axis(ax: Axes, rounds: npt.NDArray[np.float64]) -> None:
    """Let the x axis run from the first to the last of the rounds, in order, and name it."""
    first, last = rounds[0], rounds[-1]
    margin = 0.015 * (last - first) or 0.5
    ax.set_xlim(first - margin, last + margin)
    ax.xaxis.set_major_locator(whole_numbers(10))
    ax.xaxis.set_major_formatter(THOUSANDS)
    ax.set_xlabel("Round")


def class_legend(ax: Axes) -> None:
    """Explain the colours of the class groups, to the right of the axes."""
    ax.legend(
        title="Classes",
        alignment="left",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
    )


def label_ends(ax: Axes, labels: Sequence[tuple[float, str, str]], inches: float = 3.0) -> None:
    """Write (y, text, colour) at the right of the axes, beside the data and clear of each other.

    A line leads to what had to move. The axes must be at least ``inches`` high.
    """
    bottom, top = ax.get_ylim()
    gap = 13 / (inches * 72) * (top - bottom)  # a line of type takes 13 points
    heights = apart([y for y, _, _ in labels], gap, bottom, top)
    beside = ax.get_yaxis_transform()
    leading = any(abs(y - at) > 0.3 * gap for y, (at, _, _) in zip(heights, labels, strict=True))
    for y, (at, text, colour) in zip(heights, labels, strict=True):
        if leading:
            ends = ([1.003, 1.035], [at, y])
            ax.figure.add_artist(Line2D(*ends, color=colour, linewidth=0.8, transform=beside))
        ax.text(
            1.042 if leading else 1.015,
            y,
            text,
            color=colour,
            transform=beside,
            va="center",
            ha="left",
            parse_math=False,
        )


def apart(
    values: Sequence[float], gap: float, bottom: float, top: float
) -> npt.NDArray[np.float64]:
    """Move values as little as needed to be ``gap`` apart and, if they fit, inside the limits.

    >>> apart([5.0, 5.0, 9.0], 2.0, 0.0, 10.0).tolist()
    [4.0, 6.0, 9.0]
    """
    order = np.argsort(values, kind="stable")
    steps = gap * np.arange(len(values))
    # Without its step each value may only rise: the nearest rising row (isotonic regression)
    # pools neighbours that would cross.
    pools: list[tuple[float, int]] = []
    for value in np.asarray(values, dtype=np.float64)[order] - steps:
        mean, size = float(value), 1
        while pools and pools[-1][0] > mean:
            last, count = pools.pop()
            mean, size = (mean * size + last * count) / (size + count), size + count
        pools.append((mean, size))
    rising = np.repeat([m for m, _ in pools], [n for _, n in pools])
    rising = np.clip(rising, bottom, max(bottom, top - steps[-1])) if len(values) else rising
    out = np.empty(len(values))
    out[order] = rising + steps
    return out
