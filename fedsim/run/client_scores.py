"""Where the clients of a run stand after its last evaluated round."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fedsim.data.class_groups import GROUPS
from fedsim.errors import DataError
from fedsim.run import frames

COUNTS = {"num_train": "train", "num_labelled": "labels", "num_test": "test"}
GROUP_SCORES = {f"{name}_accuracy": name for name in GROUPS}
F1 = "f1_macro"


@dataclass(frozen=True)
class Standing:
    """Each client's scores in the last evaluated round.

    Attributes
    ----------
    round : int
        That round.
    views : list of str
        The views that were tested, in the order in which clients.csv has them.
    main : str
        The view that clients are ranked by: ``personal``, or the first where there is none.
    by_client : DataFrame
        A row a client, by number: `COUNTS`, each view's accuracy, and `GROUP_SCORES` and `F1` of
        the main view. NaN where a client has no test example, or no row of a view.
    """

    round: int
    views: list[str]
    main: str
    by_client: pd.DataFrame

    @classmethod
    def of(cls, clients: pd.DataFrame) -> Standing:
        """Read it off the frame of clients.csv.

        Raises
        ------
        DataError
            No round has a client accuracy, a column is missing, or a client has two rows of a view
            in that round.
        """
        rows = frames.last_round(clients)
        if rows.empty:
            raise DataError(frames.NO_CLIENT_EVALUATED)
        frames.require(rows, [*COUNTS, *GROUP_SCORES, F1], "clients.csv")
        last = int(rows["round"].iloc[0])
        again = rows[rows.duplicated(["client", "view"])]
        if len(again):
            client, view = again[["client", "view"]].iloc[0]
            raise DataError(
                f"clients.csv: client {client} has two rows of view {view!r} in round {last}; "
                "leave one"
            )
        views = list(pd.unique(clients.loc[clients["round"] == last, "view"]))
        main = "personal" if "personal" in views else views[0]
        accuracy = rows.pivot(index="client", columns="view", values="accuracy")[views]
        scores = rows[rows["view"] == main].set_index("client")[[*GROUP_SCORES, F1]]
        counts = rows.groupby("client")[list(COUNTS)].first()
        by_client = counts.join(accuracy.astype(np.float64)).join(scores.astype(np.float64))
        return cls(last, views, main, by_client)

    def shown(self, limit: int) -> list[pd.DataFrame]:
        """Return all clients; of more than ``limit`` the best, and the worst, from high to low."""
        if len(self.by_client) <= limit:
            return [self.by_client]
        ranked = self.by_client.dropna(subset=[self.main])
        ranked = ranked.sort_values(self.main, ascending=False, kind="stable")
        shown = min(limit, len(ranked))
        best = shown - shown // 2
        return [ranked.iloc[:best], ranked.iloc[len(ranked) - shown // 2 :]]

    def caption(self, best: int, worst: int) -> str:
        """Say which clients are shown where not all are."""
        several = len(self.views) > 1
        unscored = int(self.by_client[self.main].isna().sum())
        hidden = len(self.by_client) - best - worst
        lacking = "one" if several else "test examples"
        note = f", {unscored:,} of them without {lacking}" if unscored else ""
        return (
            f"The {best:,} best and {worst:,} worst of {len(self.by_client):,} clients by "
            f"{f'{self.main} ' if several else ''}accuracy; {hidden:,} not shown{note}: see "
            "clients.csv"
        )


def percent(share: float) -> str:
    """Write a share in %, "–" for NaN.

    >>> percent(0.9312), percent(float("nan"))
    ('93.1', '–')
    """
    return f"{100 * share:.1f}" if math.isfinite(share) else "–"
