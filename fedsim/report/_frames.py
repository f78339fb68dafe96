"""What figures and tables take from the frames of a run (rounds, clients, partition)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedsim.errors import DataError

NO_CLIENT_EVALUATED = (
    "clients.csv: no round has a client accuracy; evaluate at least one round "
    "on clients that hold test examples"
)


def require(frame: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    """Raise `DataError` naming the first of ``columns`` that the frame lacks."""
    for column in columns:
        if column not in frame.columns:
            raise DataError(
                f"{name}: column {column!r} is missing; "
                f"it has {', '.join(map(str, frame.columns)) or 'no columns'}"
            )


def evaluated(rounds: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return the rounds, in order, where one of the accuracy ``columns`` isn't NaN."""
    if rounds.empty:  # perhaps without columns: the run stopped before its first round's end
        return rounds
    require(rounds, ["round", *columns], "rounds.csv")
    return rounds[rounds[list(columns)].notna().any(axis=1)].sort_values("round")


def last_round(clients: pd.DataFrame) -> pd.DataFrame:
    """Return the clients of the last round with a client accuracy: empty where there is none."""
    if clients.empty:  # perhaps without columns: no client was ever evaluated
        return clients
    require(clients, ["round", "client", "view", "accuracy"], "clients.csv")
    scored = clients.loc[clients["accuracy"].notna(), "round"]
    last = scored.max() if len(scored) else None
    return clients[clients["round"] == last].sort_values(["client", "view"], kind="stable")


def floats(frame: pd.DataFrame, column: str) -> npt.NDArray[np.float64]:
    """Return a column as float64, whatever type the CSV reader gave it."""
    return frame[column].to_numpy(dtype=np.float64)
