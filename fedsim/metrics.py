"""How good a model is: overall, for each client, and on frequent and rare classes.

K clients, M entries of all local test sets, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedsim.data.class_groups import GROUPS
from fedsim.errors import DataError


def accuracy_column(view: str, group: str = "") -> str:
    """Name the column of rounds.csv with a view's accuracy, on all classes or on a group.

    >>> accuracy_column("personal-realigned"), accuracy_column("personal-realigned", "tail")
    ('personal_realigned_accuracy', 'personal_realigned_tail_accuracy')
    >>> accuracy_column("generic"), accuracy_column("generic", "tail")
    ('generic_accuracy', 'tail_accuracy')
    """
    if not group:
        return f"{view.replace('-', '_')}_accuracy"
    return f"{group}_accuracy" if view == "generic" else accuracy_column(f"{view}-{group}")


def client_metrics(
    *,
    predicted: npt.NDArray[np.int64],
    loss: npt.NDArray[np.floating],
    y: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.integer],
    groups: npt.NDArray[np.int64],
) -> pd.DataFrame:
    """Score one model on the local test set of every client.

    The local test sets stand one after the other; an example may be in several of them.
    Memory grows with M and K, never with K x C.

    Parameters
    ----------
    predicted : int64 [M]
        Predicted class of each entry, in [0, C).
    loss : float [M]
        Its cross-entropy, in nats.
    y : int64 [M]
        Its true class, in [0, C).
    offsets : int [K + 1]
        Client k's local test set are the entries ``offsets[k]:offsets[k + 1]``.
    groups : int64 [C]
        Head, medium or tail, see `fedsim.data.class_groups`.

    Returns
    -------
    DataFrame
        A row for each client, with ``num_test`` (int64), ``accuracy``, ``loss``,
        ``head_accuracy``, ``medium_accuracy``, ``tail_accuracy`` and ``f1_macro`` (float64;
        NaN where the client has no test example, or none of that group). ``f1_macro`` is the
        mean F1 over the classes among the client's truths or predictions, which is
        ``sklearn.metrics.f1_score(average="macro", zero_division=0)``.

    Raises
    ------
    DataError
        Lengths don't agree, or an entry of an array is outside its range.

    Examples
    --------
    >>> client_metrics(
    ...     predicted=np.array([0, 1, 1]), loss=np.array([0.1, 0.2, 0.9]), y=np.array([0, 1, 0]),
    ...     offsets=np.array([0, 2, 3, 3]), groups=np.array([0, 2]),
    ... )[["num_test", "accuracy", "tail_accuracy", "f1_macro"]]
       num_test  accuracy  tail_accuracy  f1_macro
    0         2       1.0            1.0       1.0
    1         1       0.0            NaN       0.0
    2         0       NaN            NaN       NaN
    """
    _check(predicted, loss, y, offsets, groups)
    num_clients = len(offsets) - 1
    num_test = np.diff(offsets).astype(np.int64)
    client = np.repeat(np.arange(num_clients), num_test)
    right = y == predicted

    cell = client * len(GROUPS) + groups[y]
    cells = num_clients * len(GROUPS)
    group_accuracy = _ratio(
        np.bincount(cell[right], minlength=cells), np.bincount(cell, minlength=cells)
    ).reshape(num_clients, len(GROUPS))
    return pd.DataFrame(
        {
            "num_test": num_test,
            "accuracy": _ratio(np.bincount(client[right], minlength=num_clients), num_test),
            "loss": _ratio(np.bincount(client, loss, minlength=num_clients), num_test),
            **{f"{name}_accuracy": group_accuracy[:, g] for g, name in enumerate(GROUPS)},
            "f1_macro": _f1_macro(client, y, predicted, num_clients, len(groups)),
        }
    )


def global_metrics(
    *,
    predicted: npt.NDArray[np.int64],
    loss: npt.NDArray[np.floating],
    y: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
) -> dict[str, float]:
    """Score one model on the whole global test set.

    Parameters, errors and keys of the result are those of `client_metrics`, for a single client
    that holds every test example.

    Examples
    --------
    >>> scores = global_metrics(
    ...     predicted=np.array([0, 1, 1, 1]), loss=np.array([0.1, 0.2, 0.9, 0.4]),
    ...     y=np.array([0, 1, 0, 1]), groups=np.array([0, 2]),
    ... )
    >>> scores["accuracy"], scores["head_accuracy"], scores["tail_accuracy"]
    (0.75, 0.5, 1.0)
    """
    scores = client_metrics(
        predicted=predicted,
        loss=loss,
        y=y,
        offsets=np.array([0, len(y)]),
        groups=groups,
    )
    return {str(name): float(scores[name].iloc[0]) for name in scores.columns}


def client_mean(values: npt.ArrayLike, weights: npt.ArrayLike) -> float:
    """Return the mean of a number that some clients report, weighted by their examples, say.

    Parameters
    ----------
    values : float [K]
        The clients' numbers; NaN where a client has none.
    weights : float [K]
        >= 0. A client of weight 0 doesn't count, whatever its number.

    Returns
    -------
    float
        NaN where no client counts.

    Examples
    --------
    >>> client_mean([0.5, 0.1, float("nan"), 7.0], [1, 3, 4, 0])
    0.2
    """
    of_each, weight = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    counted = (weight > 0) & ~np.isnan(of_each)
    if not counted.any():
        return float("nan")
    return float(np.average(of_each[counted], weights=weight[counted]))


def spread(accuracy: npt.ArrayLike) -> dict[str, float]:
    """Summarise how evenly a model serves the clients.

    Parameters
    ----------
    accuracy : float [K]
        Accuracy of each client; NaN (a client without test examples) is left out.

    Returns
    -------
    dict
        ``mean``, ``std`` (population, divided by the number of clients), ``worst10`` (mean over
        the worst tenth of the clients, rounded down, at least one), ``min``, ``max``; all NaN
        where no client has a test example.

    Examples
    --------
    >>> spread([0.5, 1.0, float("nan")])
    {'mean': 0.75, 'std': 0.25, 'worst10': 0.5, 'min': 0.5, 'max': 1.0}
    """
    values = np.asarray(accuracy, dtype=np.float64)
    values = np.sort(values[~np.isnan(values)])
    if len(values) == 0:
        return dict.fromkeys(("mean", "std", "worst10", "min", "max"), float("nan"))
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "worst10": float(values[: worst_tenth(len(values))].mean()),
        "min": float(values[0]),
        "max": float(values[-1]),
    }


def worst_tenth(num_clients: int) -> int:
    """Count the clients in the worst tenth of ``num_clients`` >= 1: rounded down, at least one.

    >>> worst_tenth(3), worst_tenth(19), worst_tenth(20)
    (1, 1, 2)
    """
    return max(1, num_clients // 10)


def _f1_macro(
    client: npt.NDArray[np.int64],
    truth: npt.NDArray[np.int64],
    guess: npt.NDArray[np.int64],
    num_clients: int,
    num_classes: int,
) -> npt.NDArray[np.float64]:
    """Macro F1 of each client [K] from the client, truth and guess of each entry [M].

    F1 of a class is 2 TP / (2 TP + FP + FN). A right entry counts as one TP for its
    (client, class) pair; a wrong one as an FN for the true pair and an FP for the guessed one.
    """
    wrong = truth != guess
    base = client * num_classes
    # Pair and "is a TP" in one number, so that a single sort groups the pairs.
    code = np.concatenate([2 * (base + truth) + ~wrong, 2 * (base + guess)[wrong]])
    code.sort()
    pair = code >> 1
    start = np.flatnonzero(np.diff(pair, prepend=-1))
    if len(start) == 0:
        return np.full(num_clients, np.nan)
    hits = np.add.reduceat(code & 1, start)
    entries = np.diff(start, append=len(code))
    f1 = 2 * hits / (hits + entries)
    owner = pair[start] // num_classes
    return _ratio(
        np.bincount(owner, f1, minlength=num_clients), np.bincount(owner, minlength=num_clients)
    )


def _ratio(
    part: npt.NDArray[np.int64] | npt.NDArray[np.float64], whole: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Elementwise part / whole; NaN where whole is 0."""
    out = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=out, where=whole > 0)
    return out


def _check(
    predicted: npt.NDArray[np.int64],
    loss: npt.NDArray[np.floating],
    y: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.integer],
    groups: npt.NDArray[np.int64],
) -> None:
    """Raise `DataError` where the arrays don't fit together."""
    if not len(predicted) == len(loss) == len(y):
        raise DataError(
            f"test scores: {len(predicted)} predictions and {len(loss)} losses "
            f"for {len(y)} test examples; give one of each for every example"
        )
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(y):
        ends = f"{offsets[0]} to {offsets[-1]}" if len(offsets) else "nothing"
        raise DataError(f"local test sets: offsets run from {ends}; must be 0 to {len(y)}")
    if (np.diff(offsets) < 0).any():
        k = int(np.argmax(np.diff(offsets) < 0))
        raise DataError(
            f"local test sets: client {k} runs from {offsets[k]} to {offsets[k + 1]}; "
            "offsets must not fall"
        )
    for what, values, stop in (
        ("predicted classes", predicted, len(groups)),
        ("test labels", y, len(groups)),
        ("class groups", groups, len(GROUPS)),
    ):
        outside = (values < 0) | (values >= stop)
        if outside.any():
            i = int(np.argmax(outside))
            raise DataError(f"{what}: entry {i} is {values[i]}; must be in [0, {stop})")
