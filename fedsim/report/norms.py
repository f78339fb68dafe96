"""How long the class vectors of a run's heads are: the table class_norms.csv.

C classes, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedsim.metrics import accuracy_column

if TYPE_CHECKING:
    from fedsim.run.saved import SavedRun

_HEADS = {
    "head.weight": "global head",
    "etf.weight": "fixed ETF",
    "retrained.weight": "re-trained head",
}
_OWN_HEADS = ("personal.weight", "head.weight")
_MOST_CLIENTS = 1000  # of twice as many or more only every so-manieth is read


def class_norms(run: SavedRun) -> pd.DataFrame:
    """Return the norm of each class's vector in each head, and the class's training examples.

    Of the clients' own heads it is the mean over the clients that have one, or a sample of them.

    Returns
    -------
    DataFrame
        ``head``, ``class``, ``examples``, ``norm``: C rows a head.
    """
    own = _own_heads(run)
    has_generic = accuracy_column("generic") in run.rounds.dropna(axis=1, how="all")
    heads = {
        head: _lengths(run.arrays[name])
        for name, head in _HEADS.items()
        if name in run.arrays and _is_head(run.arrays[name], run.num_classes)
        # Where nobody tests the global model, what clients keep is of no use in it.
        if name not in own or has_generic
    }
    for norms in own.values():
        heads["personal heads (mean)"] = np.mean(norms, axis=0)
    counts = run.class_counts
    return pd.DataFrame(
        {
            "head": np.repeat(list(heads), len(counts)),
            "class": np.tile(np.arange(len(counts)), len(heads)),
            "examples": np.tile(counts, len(heads)),
            "norm": np.concatenate([*heads.values(), np.empty(0)]),
        }
    )


def _own_heads(run: SavedRun) -> dict[str, list[NDArray[np.float64]]]:
    """Return the lengths in the heads that clients keep: array name -> an entry a client."""
    own: dict[str, list[NDArray[np.float64]]] = {}
    if run.states is None:
        return own
    trained = run.states.trained
    for client in trained[:: max(1, len(trained) // _MOST_CLIENTS)].tolist():
        for name, array in run.states.read(client).items():
            if name in _OWN_HEADS and _is_head(array, run.num_classes):
                own.setdefault(name, []).append(_lengths(array))
    return own


def _is_head(array: NDArray[Any], num_classes: int) -> bool:
    """Tell whether an array has a vector a class: a user's may be of any shape."""
    return array.ndim == 2 and len(array) == num_classes


def _lengths(rows: NDArray[Any]) -> NDArray[np.float64]:
    # The squares of a diverging model's weights are beyond float32.
    lengths: NDArray[np.float64] = np.linalg.norm(rows.astype(np.float64), axis=1)
    return lengths
