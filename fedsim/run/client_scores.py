"""What each client of a run reached in its last evaluated round."""

from __future__ import annotations

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
class ClientScores:
    """Each client's scores in the last evaluated round.

    Attributes
    ----------
    round : int
        That round.
    views : list of str
        The views that were tested, in the order in which clients.csv has them.
    ranking_view : str
        The view that clients are ranked by: ``personal``, or the first where there is none.
    by_client : DataFrame
        A row a client, by number: `COUNTS`, each view's accuracy, and `GROUP_SCORES` and `F1` of
        that view. NaN where a client has no test example, or no row of a view.
    """

    round: int
    views: list[str]
    ranking_view: str
    by_client: pd.DataFrame

    @classmethod
    def of(cls, clients: pd.DataFrame) -> ClientScores:
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
        ranking_view = "personal" if "personal" in views else views[0]
        accuracy = rows.pivot(index="client", columns="view", values="accuracy")[views]
        scores = rows[rows["view"] == ranking_view].set_index("client")[[*GROUP_SCORES, F1]]
        counts = rows.groupby("client")[list(COUNTS)].first()
        by_client = counts.join(accuracy.astype(np.float64)).join(scores.astype(np.float64))
        return cls(last, views, ranking_view, by_client)

    @property
    def ranking(self) -> pd.Series[float]:
        """Each client's accuracy in the ranking view; NaN where it has none."""
        return self.by_client[self.ranking_view]
