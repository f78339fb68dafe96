"""Figures of the heads of a model: how long their class vectors are, and how far apart.

C classes, D features, H heads.
"""

from __future__ import annotations

from itertools import cycle
from math import ceil, cos, radians

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedsim.errors import DataError
from fedsim.report.figures import style
from fedsim.run import frames

__all__ = ["etf_angles", "norms_by_frequency"]

_MARKED_CLASSES = 40  # up to so many classes each one is marked and its number written
_LABELLED_CLASSES = 20  # up to so many classes each one has a tick of its own at the cosines
_WRITTEN_COSINES = 12  # up to so many classes the numbers stand in the cells
_MOST_CELLS = 1000  # in a row of the picture, which has fewer pixels
_PANEL_INCHES = (2.9, 1.1)
_ROW, _SIDE = 5.2, 3.7  # inches, at least: the classes in a row, the side of the square of cosines
_BARS, _DIAGONAL = "#C9C9C9", "#D9D9D9"


def norms_by_frequency(
    norms: pd.DataFrame, title: str, names: pd.DataFrame | None = None
) -> Figure:
    """Draw the length of each head's class vectors against how frequent the classes are.

    A head that is trained on long-tailed data gets longer vectors for the frequent classes; this
    is what realigning evens out (FedLoGe, Xiao et al., ICLR 2024).

    Parameters
    ----------
    norms : DataFrame
        A row for each head and class (H x C), with ``head`` (its name), ``class``,
        ``examples`` (training examples of the class, over all clients) and ``norm`` (L2 norm
        of the class's weight vector; NaN is a gap in the line).
    title : str
        Written above the picture as it is.
    names : DataFrame, optional
        The frame of names.csv; what has no name is called by its number.

    Raises
    ------
    DataError
        A column is missing, no norm is known, a head has a class twice, or a class has
        different numbers of examples.
    """
    frames.require(norms, ["head", "class", "examples", "norm"], "class norms")
    if not norms["norm"].notna().any():
        raise DataError("class norms: no norm is known; give at least one head")
    twice = norms[norms.duplicated(["head", "class"])]
    if len(twice):
        head, klass = twice.iloc[0][["head", "class"]]
        raise DataError(f"class norms: {head!r} has class {klass} twice; give one row for each")
    sizes = norms[["class", "examples"]].drop_duplicates()
    differing = sizes.loc[sizes["class"].duplicated(), "class"]
    if len(differing):
        klass = differing.iloc[0]
        found = ", ".join(f"{n:,}" for n in sizes.loc[sizes["class"] == klass, "examples"])
        raise DataError(f"class norms: class {klass} has {found} examples; give the same number")
    sizes = sizes.sort_values(["examples", "class"], ascending=[False, True])
    table = norms.pivot(index="class", columns="head", values="norm").reindex(sizes["class"])
    count = len(sizes)
    few = count <= _MARKED_CLASSES
    ticks = style.ticks(sizes["class"].tolist(), frames.names_of(names, "class"), _ROW)
    with mpl.rc_context(style.STYLE):
        note = (
            "Length (L2 norm) of each class's weight vector, "
            "classes from most to least frequent in training"
        )
        height = sum(_PANEL_INCHES) + 0.6 + few * ticks.height
        fig = style.new_figure(7.5, height, title, note)
        panels: tuple[Axes, Axes] = fig.subplots(2, sharex=True, height_ratios=_PANEL_INCHES)
        upper, lower = panels
        x = np.arange(1, count + 1)
        labels = []
        for head, colour in _head_colours(list(pd.unique(norms["head"]))).items():
            y = frames.floats(table, head)
            if np.isnan(y).all():
                continue
            upper.plot(
                x,
                y,
                color=colour,
                linewidth=1.6,
                marker="o" if few else "",
                markersize=4.5,
                label=head,
                clip_on=False,
                zorder=3,
            )
            labels.append((float(y[~np.isnan(y)][-1]), head, colour))
        # From 0, so that a profile looks as flat or as steep as it is.
        upper.set_ylim(0, 1.04 * float(np.nanmax(table.to_numpy())) or 1.0)
        upper.set_ylabel("Norm")
        upper.grid(axis="y")
        if few:
            lower.bar(x, sizes["examples"], width=0.72, color=_BARS)
        else:  # as one outline: of many bars each takes milliseconds
            edges = np.arange(count + 1) + 0.5
            lower.stairs(sizes["examples"], edges, fill=True, color=_BARS, snap=True)
        lower.set_ylabel("Examples")
        lower.yaxis.set_major_locator(style.whole_numbers(3))
        lower.yaxis.set_major_formatter(style.THOUSANDS)
        lower.set_xlim(0.4, count + 0.6)
        if few:
            ticks.place(lower, x)
            lower.set_xlabel("Class, from most to least frequent")
        else:
            lower.xaxis.set_major_locator(style.whole_numbers(10))
            lower.set_xlabel("Classes, from most to least frequent")
        upper.tick_params(axis="x", length=0)
        style.label_ends(upper, labels, _PANEL_INCHES[0])
        fig.align_ylabels(panels)
    return fig


def etf_angles(
    weight: npt.NDArray[np.floating], title: str, names: pd.DataFrame | None = None
) -> Figure:
    """Draw the cosines between the class vectors of a classifier, all pairs.

    In a simplex equiangular tight frame (ETF) every pair has the same cosine, -1/(C-1), the
    least that C vectors can all have. Of more than 1,000 classes every second is drawn, of more
    than 2,000 every third, and so on; the numbers above the picture are those of all.

    Parameters
    ----------
    weight : float [C, D]
        A row for each class, none of them zero; C >= 2.
    title : str
        Written above the picture as it is.
    names : DataFrame, optional
        The frame of names.csv; what has no name is called by its number.

    Raises
    ------
    DataError
        ``weight`` isn't two-dimensional, has fewer than 2 rows, or a row is zero or not finite.
    """
    # Only here: the other pictures don't need PyTorch, which takes a second to load.
    import torch

    from fedsim.models.etf import geometry

    measured = geometry(torch.tensor(weight))
    count, ideal = len(weight), -1 / (len(weight) - 1)
    step = ceil(count / _MOST_CELLS)
    rows = weight[::step].astype(np.float64)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, np.nan)
    widest = max(abs(cos(radians(angle))) for angle in (measured.angle_min, measured.angle_max))
    # At least so wide that the ideal isn't the darkest colour.
    limit = min(1.0, max(widest, -2 * ideal))
    few = count <= _LABELLED_CLASSES
    class_names = frames.names_of(names, "class") if few else {}
    ticks = style.ticks(range(count), class_names, _SIDE)
    aside = max(0.0, style.width(ticks.labels) - 0.2) if class_names else 0.0
    with mpl.rc_context(style.STYLE):
        parts = (
            f"{count:,} classes",
            f"angles: ideal {measured.angle_ideal:.2f}° (cosine {ideal:.4f})",
            f"mean {measured.angle_mean:.2f}°",
            f"min {measured.angle_min:.2f}°",
            f"std {measured.angle_std:.2f}°",
            f"norms {measured.norm_min:.4f} to {measured.norm_max:.4f}",
            f"sparsity {100 * measured.sparsity:.1f} %",
        )
        # Spaces that don't break: a number stays with its word.
        note = ", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
        note = note.replace("-", "−")
        fig = style.new_figure(6.4 + aside, 4.9 + ticks.height, title, note)
        ax = fig.add_subplot()
        ax.set_facecolor(_DIAGONAL)
        end = len(rows) * step - 0.5
        image = ax.imshow(
            np.ma.masked_invalid(cosines),
            extent=(-0.5, end, end, -0.5),
            cmap=mpl.colormaps["RdBu_r"],
            vmin=-limit,
            vmax=limit,
            interpolation="nearest",
        )
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.tick_params(length=0)
        label = "Class" if step == 1 else f"Class (one in {step} is drawn)"
        ax.set_xlabel(label)
        ax.set_ylabel(label)
        if few:
            ticks.place(ax, np.arange(count))
            ax.set_yticks(np.arange(count), ticks.labels)
        else:
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(style.whole_numbers(10))
        if count <= _WRITTEN_COSINES:
            for (i, j), value in np.ndenumerate(cosines):
                if i != j:
                    ink = "white" if abs(value) > 0.65 * limit else style.INK
                    text = f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # never -0.00
                    ax.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
        bar = fig.colorbar(image, ax=ax, shrink=0.85, pad=0.08)
        bar.outline.set_visible(False)
        bar.set_label("Cosine of two classes' vectors (grey: of one with itself)")
        bar.ax.axhline(ideal, color=style.INK, linewidth=1.2)
        bar.ax.text(
            -0.25,
            ideal,
            "ideal",
            transform=bar.ax.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=8,
        )
    return fig


def _head_colours(heads: list[str]) -> dict[str, str]:
    """Give global and personal heads the colours of their views, and the others the rest."""
    views = {"global": "generic", "personal": "personal"}
    known = {first: style.VIEW_COLOURS[view] for first, view in views.items()}
    spare = cycle(colour for colour in style.PALETTE[2:] if colour not in known.values())
    return {head: known.get(head.partition(" ")[0]) or next(spare) for head in heads}
