"""How good the pseudo-labels of a run are, and how many are kept, over the rounds.

Shapes: R rounds with a pseudo-labelling pass. All counts are summed over the clients of a round
before one is divided by another, so a client weighs as much as it pseudo-labels.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedsim.data.class_groups import GROUPS
from fedsim.errors import DataError
from fedsim.report.figures import style
from fedsim.run import frames

__all__ = ["by_round", "pseudo_labels"]

_COUNTS = ["pseudo_seen"] + [
    f"pseudo_{what}{group}"
    for what in ("kept", "correct")
    for group in ("", *(f"_{name}" for name in GROUPS))
]
_ACCURACIES = {"accuracy": ("overall", style.INK)} | {
    f"{name}_accuracy": (name, style.GROUP_COLOURS[name]) for name in GROUPS
}
_SHARES = {
    "kept": ("kept", style.PALETTE[2]),
    "local": ("local expert", style.VIEW_COLOURS["personal"]),
}
_PLAIN_ROUNDS = 60  # above so many rounds a running mean is drawn over the rounds' own values
_PANEL_INCHES = (2.7, 1.7)


def by_round(training: pd.DataFrame) -> pd.DataFrame:
    """Return the quality and the number of pseudo-labels in each round.

    Parameters
    ----------
    training : DataFrame
        The frame of training.csv. Rows without a pseudo-labelling pass (``pseudo_seen`` 0 or
        NaN) don't count.

    Returns
    -------
    DataFrame
        R rows in order of the rounds, all but ``round`` in [0, 1]:

        - ``round``
        - ``kept``: the share of the examples seen whose pseudo-label is kept
        - ``local``: the share of the kept ones labelled by the client's own model, over the
          clients for which this is known; without labels (``has_labels`` 0, where the method
          says so) a client has no model of its own
        - ``accuracy``, ``head_accuracy``, ``medium_accuracy``, ``tail_accuracy``: the share of
          the kept ones that is correct, overall and by the group of the true class; of those
          whose true class is known

        A share of nothing is NaN. No rows where the frame lacks one of the counts (but
        ``pseudo_local``, which may be absent): its method doesn't pseudo-label.

    Examples
    --------
    >>> training = pd.DataFrame({"round": [1, 1], "pseudo_seen": [10, 30]})
    >>> training[["pseudo_kept", "pseudo_correct"]] = [[10, 9], [10, 6]]
    >>> training[["pseudo_kept_head", "pseudo_correct_head"]] = [[8, 8], [8, 4]]
    >>> training[["pseudo_kept_medium", "pseudo_correct_medium"]] = 0
    >>> training[["pseudo_kept_tail", "pseudo_correct_tail"]] = [[2, 1], [2, 2]]
    >>> by_round(training).loc[0, ["kept", "accuracy", "head_accuracy", "tail_accuracy"]].tolist()
    [0.5, 0.75, 0.75, 0.75]
    """
    names = ["round", *_SHARES, *_ACCURACIES]
    if not {"round", *_COUNTS} <= set(training.columns):
        return pd.DataFrame(columns=names, dtype=np.float64)
    rows = training[training["pseudo_seen"] > 0]
    counts = rows[_COUNTS].astype(np.float64)
    local = rows.get("pseudo_local", pd.Series(np.nan, rows.index)).astype(np.float64)
    local = local.where(rows.get("has_labels", pd.Series(1.0, rows.index)) > 0)
    counts["local"], counts["kept_known"] = local, counts["pseudo_kept"].where(local.notna())
    counts["checked"] = _checked(counts)
    sums = counts.groupby(rows["round"]).sum()

    def share(part: str, whole: str) -> pd.Series[float]:
        return sums[part] / sums[whole]  # 0 / 0 is NaN

    shares = {
        "kept": share("pseudo_kept", "pseudo_seen"),
        "local": share("local", "kept_known"),
        "accuracy": share("pseudo_correct", "checked"),
    } | {f"{g}_accuracy": share(f"pseudo_correct_{g}", f"pseudo_kept_{g}") for g in GROUPS}
    return pd.DataFrame(shares).reset_index()[names]


def _checked(training: pd.DataFrame) -> pd.Series[float]:
    """Return how many kept pseudo-labels each row has whose true class is known."""
    return training[[f"pseudo_kept_{g}" for g in GROUPS]].sum(axis=1)


def pseudo_labels(training: pd.DataFrame, title: str) -> Figure:
    """Draw the accuracy of the kept pseudo-labels and the shares of `by_round`, over the rounds.

    Up to 60 rounds are drawn as they are, with a gap where nothing was kept. Of more rounds the
    centred running mean over about 5 % of them is drawn, over their own values in a light tone.

    Parameters
    ----------
    training : DataFrame
        The frame of training.csv. A line of which nothing is known is left out.
    title : str
        Written above the picture as it is.

    Raises
    ------
    DataError
        No round has a pseudo-labelling pass.
    """
    rounds = by_round(training)
    if rounds.empty:
        raise DataError(
            "training.csv: no round with pseudo_seen > 0; choose a method that pseudo-labels"
        )
    count = len(rounds)
    window = max(5, 2 * (count // 40) + 1) if count > _PLAIN_ROUNDS else 1
    note = "Kept pseudo-labels against the hidden true labels, all clients of a round together."
    checked = _checked(training).sum()
    if (share := checked / max(training["pseudo_kept"].sum(), 1)) < 1 and checked:
        note += f" The true label is known of {100 * share:.0f} %."
    if window > 1:
        note += f" Light: each round. Full colour: centred mean over {window} rounds."
    with mpl.rc_context(style.STYLE):
        fig = style.new_figure(7.0, sum(_PANEL_INCHES) + 1.2, title, note)
        panels: tuple[Axes, Axes] = fig.subplots(2, sharex=True, height_ratios=_PANEL_INCHES)
        upper, lower = panels
        style.set_note(upper, "Correct among the kept, by the group of the true class")
        style.set_note(lower, "Kept among all seen")
        for ax, inches, lines in zip(panels, _PANEL_INCHES, (_ACCURACIES, _SHARES), strict=True):
            _draw(ax, rounds, lines, window, inches)
        lower.set_ylabel("Share (%)")
        if rounds["local"].notna().any():
            style.set_note(lower, "Kept among all seen; labelled by the local expert among kept")
        if rounds["accuracy"].isna().all():
            middle = float(rounds["round"].iloc[[0, -1]].mean())
            kept = (rounds["kept"] > 0).any()
            why = "Nobody knows the true labels" if kept else "Nothing was kept"
            upper.text(middle, 50, why, color=style.MUTED, ha="center")
        style.round_axis(lower, frames.floats(rounds, "round"))
        fig.align_ylabels(panels)
    return fig


def _draw(
    ax: Axes, rounds: pd.DataFrame, lines: dict[str, tuple[str, str]], window: int, inches: float
) -> None:
    """Draw those of the lines (column -> name, colour) that are known, in %."""
    x = frames.floats(rounds, "round")
    values = 100 * rounds[list(lines)].astype(np.float64)
    smooth = values.rolling(window, min_periods=1, center=True).mean()
    labels = []
    for place, (column, (name, colour)) in enumerate(lines.items()):
        y: npt.NDArray[np.float64] = smooth[column].to_numpy()
        if np.isnan(y).all():
            continue
        if window > 1:
            ax.plot(x, values[column], color=colour, alpha=0.3, linewidth=0.5, zorder=2)
        ax.plot(
            x,
            y,
            color=colour,
            linewidth=1.6,
            marker="o" if window == 1 else "",
            markersize=4.5 if len(x) <= 40 else 3,
            label=name,
            clip_on=False,
            zorder=4 - 0.1 * place,
        )
        last = float(y[~np.isnan(y)][-1])
        labels.append((last, f"{name} {last:.1f} %", colour))
    # Shares keep the whole axis: how far they are from nothing and from all is what they tell.
    whole = lines is _SHARES or not labels
    style.percent_axis(ax, np.array([0.0, 100.0]) if whole else values.to_numpy())
    style.label_ends(ax, labels, inches)
