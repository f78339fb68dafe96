"""The table of a run's clients as text, which the terminal and the page lay out each in its way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedsim.metrics import spread
from fedsim.report.text import percent
from fedsim.run.client_scores import COUNTS, F1, GROUP_SCORES, ClientScores

CLOSING = {"mean": "mean", "std": "std", "worst10": "worst 10 %"}
"""What of `fedsim.metrics.spread` the closing rows say -> what they are called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientRows:
    """The cells of the table, without the column that says whose they are.

    Attributes
    ----------
    heads : list of str
        The examples of a client, its accuracy in each view, that on head, medium and tail classes,
        and F1.
    parts : list of dict
        Client -> its cells: of all clients, or of the best, and of the worst.
    closing : dict
        ``mean``, ``std``, ``worst 10 %`` -> the cells, over all clients.
    caption : str
        Which clients are shown; "" where all are.
    """

    heads: list[str]
    parts: list[dict[int, list[str]]]
    closing: dict[str, list[str]]
    caption: str


def client_rows(scores: ClientScores, limit: int, mean: Callable[[float], str]) -> ClientRows:
    """Write the scores of the clients, of more than ``limit`` those of the best and the worst.

    Parameters
    ----------
    scores : ClientScores
        What the clients reached.
    limit : int
        How many are shown at most; >= 2.
    mean : callable
        Writes a mean number of examples.
    """
    shares = [*scores.views, *GROUP_SCORES]

    def cells(counts: Sequence[str], row: Mapping[Any, float]) -> list[str]:
        f1 = f"{row[F1]:.3f}" if math.isfinite(row[F1]) else "–"
        return [*counts, *(percent(row[name]) for name in shares), f1]

    parts = _shown(scores, limit)
    written = [
        {
            client: cells([f"{int(row[name]):,}" for name in COUNTS], row)
            for client, row in zip(part.index, part.to_dict("records"), strict=True)
        }
        for part in parts
    ]
    # Each column is summarised on its own.
    over = {name: spread(scores.by_client[name]) for name in (*shares, F1)}
    means, none = [mean(scores.by_client[name].mean()) for name in COUNTS], [""] * len(COUNTS)
    closing = {
        label: cells(
            means if key == "mean" else none, {name: of_one[key] for name, of_one in over.items()}
        )
        for key, label in CLOSING.items()
    }
    return ClientRows(
        heads=[*COUNTS.values(), *scores.views, *GROUP_SCORES.values(), "F1"],
        parts=written,
        closing=closing,
        caption=_caption(scores, *map(len, parts)) if len(parts) > 1 else "",
    )


def _shown(scores: ClientScores, limit: int) -> list[pd.DataFrame]:
    """Return all clients; of more than ``limit`` the best, and the worst, from high to low."""
    if len(scores.by_client) <= limit:
        return [scores.by_client]
    ranked = scores.by_client.dropna(subset=[scores.ranking_view])
    ranked = ranked.sort_values(scores.ranking_view, ascending=False, kind="stable")
    shown = min(limit, len(ranked))
    best = shown - shown // 2
    return [ranked.iloc[:best], ranked.iloc[len(ranked) - shown // 2 :]]


def _caption(scores: ClientScores, best: int, worst: int) -> str:
    """Say which clients are shown where not all are."""
    several = len(scores.views) > 1
    total, unscored = len(scores.ranking), int(scores.ranking.isna().sum())
    ranked_by = f"{scores.ranking_view} accuracy" if several else "accuracy"
    lacking = "one" if several else "test examples"
    note = f", {unscored:,} of them without {lacking}" if unscored else ""
    return (
        f"The {best:,} best and {worst:,} worst of {total:,} clients by {ranked_by}; "
        f"{total - best - worst:,} not shown{note}: see clients.csv"
    )
