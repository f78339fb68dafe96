"""Which classes of a long-tailed training set are frequent, and which are rare.

C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedsim.errors import DataError

GROUPS = ("head", "medium", "tail")


def class_groups(class_counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Tell the head, medium and tail classes of a long-tailed training set apart.

    Classes are taken from the most to the least frequent (the lower number first in a tie).
    A class is head while the classes before it hold less than 75 % of all training examples,
    medium while they hold less than 95 %, and tail after that: the class with which the sum
    passes 75 % still belongs to the head.

    Parameters
    ----------
    class_counts : int [C]
        Training examples of each class, over all clients; >= 0.

    Returns
    -------
    int64 [C]
        For each class its position in `GROUPS`: 0 head, 1 medium, 2 tail.

    Raises
    ------
    DataError
        The counts aren't one row of whole numbers >= 0, or all are 0.

    References
    ----------
    Xiao et al., "FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data",
    ICLR 2024: the split used for its many-, medium- and few-shot accuracies.

    Examples
    --------
    >>> class_groups([10, 60, 30]).tolist()
    [1, 0, 0]
    """
    counts = np.asarray(class_counts)
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer):
        raise DataError(
            f"class counts: got {counts.dtype} of shape {counts.shape}; "
            "give one whole number for each class"
        )
    counts = counts.astype(np.int64)
    if (counts < 0).any():
        c = int(np.argmax(counts < 0))
        raise DataError(f"class counts: class {c} has {counts[c]} examples; give 0 or more")
    total = counts.sum()
    if total == 0:
        raise DataError("class counts: no class has a training example; give at least one")
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    groups = np.empty(len(counts), dtype=np.int64)
    # 3/4 and 19/20 as whole numbers: a share of exactly 75 % must not depend on rounding.
    groups[order] = (4 * before >= 3 * total).astype(np.int64) + (20 * before >= 19 * total)
    return groups
