"""Heat maps and histograms of who holds how much of what, however many clients there are.

K clients, B bins of clients, S strips of classes.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from fedsim.report.figures import style
from fedsim.report.figures.bubbles import MOST_BUBBLES
from fedsim.report.figures.counts import Counts, Floats, Ints, class_totals, largest_known

_ALL = "#C9C9C9"  # labelled and unlabelled together, in the histograms
_MOST_BINS = 200  # columns of a heat map: each still 3 pixels wide
_MOST_STEPS = 200  # of a histogram


def heat_maps(counts: Counts, title: str) -> Figure:
    """Draw the mean counts of clients grouped by their most frequent class, and histograms.

    However many clients and classes there are, the picture has as many parts: neighbours are drawn
    together.
    """
    total = counts.labelled + counts.unlabelled
    bins, bin_size = _bin_clients(counts, total)
    _, strip_size = counts.strips()
    panels = {
        name: _mean_counts(counts, values, bins, bin_size)
        for name, values in (("Labelled", counts.labelled), ("Unlabelled", counts.unlabelled))
        if values.any()
    }
    every = np.concatenate(list(panels.values()), axis=1)
    low, high = float(every[every > 0].min()), largest_known(every, counts.known_strips)
    # Four powers of ten are all that the eye tells apart; rarer than that is drawn as rarest.
    norm = LogNorm(max(low, high / 1e4), high if high > low else 10 * low)

    few = counts.num_clients <= MOST_BUBBLES[0]
    fit = counts.num_clients * 0.13 <= (2.8 if len(panels) > 1 else 7.0)  # inches of a panel
    clients = style.ticks(
        np.argsort(bins).tolist() if few else [], counts.client_names if fit else {}, 0.0
    )
    fig = style.new_figure(10.5, 7.0 + clients.height, title, counts.note())
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
        style.set_note(ax, f"{name} examples")
        ax.set_xlabel("Clients, by their most frequent class, then size")
        if few:
            clients._replace(rotation=90).place(ax, np.arange(counts.num_clients) + 0.5)
        else:
            ax.xaxis.set_major_locator(style.whole_numbers(5))
            ax.xaxis.set_major_formatter(style.THOUSANDS)
        ax.yaxis.set_major_locator(style.whole_numbers(20))
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
    class_totals(totals, counts, named=counts.num_classes <= 20)
    totals.set_ylim(counts.num_rows - 0.5, -0.5)
    several = len(strip_size) < counts.num_rows
    style.set_note(totals, "Mean total of a class" if several else "Total of the class")

    _size_histogram(fig.add_subplot(grid[1, 0]), counts, total)
    _class_histogram(fig.add_subplot(grid[1, 1]), counts, total)
    key = fig.add_subplot(grid[1, 2])
    key.axis("off")
    key.legend(
        handles=[
            Patch(color=style.LABELLED, label="labelled"),
            Patch(color=style.UNLABELLED, label="unlabelled"),
            Patch(color=_ALL, label="both together"),
        ],
        loc="center left",
        frameon=False,
    )
    return fig


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
    strips, strip_size = counts.strips()
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
        ax.xaxis.set_major_locator(style.whole_numbers(6))
    _two_histograms(ax, sizes, labelled, edges)
    ax.set_xlabel("Training examples of a client")
    ax.set_ylabel("Clients")
    ax.xaxis.set_major_formatter(style.THOUSANDS)
    style.set_note(ax, note)


def _class_histogram(ax: Axes, counts: Counts, total: Ints) -> None:
    """Draw how many classes the clients hold."""
    held = counts.by_client((total > 0) & counts.known)
    labelled = counts.by_client(counts.labelled > 0)
    step = max(1, int(held.max() / _MOST_STEPS))
    _two_histograms(ax, held, labelled, np.arange(0, held.max() + 1 + step, step) - 0.5)
    ax.set_xlabel("Classes of a client")
    ax.xaxis.set_major_locator(style.whole_numbers(8))
    style.set_note(
        ax,
        f"{held.min():.0f} to {held.max():.0f} of {counts.num_classes}, "
        f"median {np.median(held):.0f}",
    )


def _two_histograms(ax: Axes, together: Floats, labelled: Floats, edges: Floats) -> None:
    ax.stairs(np.histogram(together, edges)[0], edges, color=_ALL, fill=True)
    ax.stairs(np.histogram(labelled, edges)[0], edges, color=style.LABELLED, linewidth=1.4)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(style.whole_numbers(4))
    ax.yaxis.set_major_formatter(style.THOUSANDS)
