"""What is read off the frames of a run (rounds, clients, partition): for figures and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedsim.data.class_groups import GROUPS
from fedsim.errors import DataError
from fedsim.metrics import accuracy_column

# In the order in which they are shown; a method has some of them.
VIEWS = ("generic", "generic-realigned", "personal", "personal-realigned")
NO_CLIENT_EVALUATED = (
    "clients.csv: no round has a client accuracy; evaluate at least one round "
    "on clients that hold test examples"
)


def require(frame: pd.DataFrame, columns: Iterable[str], name: str) -> None:
    """Raise `DataError` naming the first of ``columns`` that the frame lacks."""
    for wanted in columns:
        if wanted not in frame.columns:
            raise DataError(
                f"{name}: column {wanted!r} is missing; "
                f"it has {', '.join(map(str, frame.columns)) or 'no columns'}"
            )


def names_of(names: pd.DataFrame | None, kind: str) -> dict[int, str]:
    """Return number -> name of the classes or clients, from the frame of names.csv.

    >>> frame = pd.DataFrame({"kind": ["class", "client"], "number": [0, 0], "name": ["cat", "al"]})
    >>> names_of(frame, "client"), names_of(None, "client")
    ({0: 'al'}, {})
    """
    if names is None or names.empty:
        return {}
    require(names, ["kind", "number", "name"], "names.csv")
    of_kind = names[names["kind"] == kind]
    return dict(zip(of_kind["number"].tolist(), of_kind["name"].tolist(), strict=True))


def views_of(rounds: pd.DataFrame) -> list[str]:
    """Return the views there: ``generic`` and ``personal`` always, a method's own ones last.

    >>> views_of(pd.DataFrame(columns=["generic_cold_accuracy", "generic_realigned_accuracy"]))
    ['generic', 'generic-realigned', 'personal', 'generic-cold']
    """
    end, groups = "_accuracy", tuple(f"{group}_accuracy" for group in GROUPS)
    names = [name for name in rounds.columns if name.endswith(end) and not name.endswith(groups)]
    found = [name.removesuffix(end).replace("_", "-") for name in names]
    known = [view for view in VIEWS if view in ("generic", "personal") or view in found]
    return known + [view for view in found if view not in VIEWS]


def overall_columns(rounds: pd.DataFrame) -> dict[str, str]:
    """Return view -> column of its accuracy."""
    return {view: accuracy_column(view) for view in views_of(rounds)}


def group_columns(rounds: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Return view -> head, medium, tail -> column: ``generic`` and the other views there."""
    by_view = {view: {g: accuracy_column(view, g) for g in GROUPS} for view in views_of(rounds)}
    return {
        view: of_view
        for view, of_view in by_view.items()
        if view == "generic" or set(of_view.values()) & set(rounds.columns)
    }


def grouped(rounds: pd.DataFrame) -> pd.DataFrame:
    """Return the rounds, in order, with an accuracy of a view on head, medium or tail classes."""
    by_view = group_columns(rounds).values()
    return evaluated(rounds, [name for of_view in by_view for name in of_view.values()])


def evaluated(rounds: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Return the rounds, in order, where one of the accuracy ``columns`` isn't NaN."""
    if rounds.empty:  # perhaps without columns: the run stopped before its first round's end
        return rounds
    columns = list(columns)
    require(rounds, ["round", *columns], "rounds.csv")
    return rounds[rounds[columns].notna().any(axis=1)].sort_values("round")


def group_shares(row: pd.Series[float]) -> tuple[str, dict[str, float]]:
    """Return an evaluated round's accuracy by class group, and the view it is of.

    That is ``generic``, or ``personal`` where the method has no generic model.
    """
    view = "generic" if pd.notna(row.get(accuracy_column("generic"))) else "personal"
    return view, {group: row.get(accuracy_column(view, group), math.nan) for group in GROUPS}


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
