"""Long tails: training sets in which some classes are rare.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import check, is_number
from fedsim.data.segments import sort_by


def long_tail(
    y: NDArray[np.int64],
    num_classes: int,
    imbalance: float,
    profile: str,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Choose the training examples that make the class counts long-tailed.

    With n_max the count of the largest class, class c keeps

    - ``"exponential"``: n_max * imbalance^(c / (C-1)), which falls from class 0 on;
    - ``"step"``: n_max for the first half of the classes (the larger half when C is odd) and
      n_max * imbalance for the others;

    rounded down, at least 1, and never more than the class has. Examples of unknown label are all
    kept, for nobody can say which would have to go. Where the classes of a source
    differ in size, class 0 need not be the most frequent, nor the last the rarest, and the ratio of
    the two may be another than `imbalance`.

    Parameters
    ----------
    y : int64 [N]
        Labels of the training set, -1 where unknown.
    num_classes : int
        C, at least 2.
    imbalance : float
        Examples of the rarest class / of the most frequent one where all classes of `y` are
        equal, in (0, 1]; 1 keeps everything.
    profile : str
        ``"exponential"`` or ``"step"``.
    rng : numpy.random.Generator
        Chooses which examples of a class are kept.

    Returns
    -------
    int64 [n]
        Indices of the examples kept, sorted.

    Raises
    ------
    DataError
        If `imbalance` or `profile` isn't one of the above.

    References
    ----------
    Exponential: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
    Sec. 5.1. Step: Buda et al., "A systematic study of the class imbalance problem in
    convolutional neural networks", Neural Networks 106, 2018, Sec. 3.1.

    Examples
    --------
    >>> y = np.repeat(np.arange(3), 100)
    >>> kept = long_tail(y, 3, 0.01, "exponential", np.random.default_rng(0))
    >>> np.bincount(y[kept]).tolist()
    [100, 10, 1]
    """
    check(
        is_number(imbalance) and 0 < imbalance <= 1,
        "data.imbalance",
        imbalance,
        "a number above 0 and at most 1 (1: balanced)",
    )
    classes = np.arange(num_classes)
    if profile == "exponential":
        exponent = classes / (num_classes - 1)
    else:
        check(profile == "step", "data.profile", profile, '"exponential" or "step"')
        exponent = (classes >= (num_classes + 1) // 2).astype(np.float64)
    known, unknown = np.flatnonzero(y >= 0), np.flatnonzero(y < 0)
    order, offsets = sort_by(y[known], num_classes)
    available = np.diff(offsets)
    # The factor keeps 0.29 * 100, which is 28.999999999999996, from being rounded down to 28.
    wanted = np.floor(available.max() * imbalance**exponent * (1 + 1e-12)).astype(np.int64)
    counts = np.minimum(np.maximum(wanted, 1), available)
    kept = [
        rng.permutation(order[offsets[c] : offsets[c + 1]])[: counts[c]] for c in range(num_classes)
    ]
    return np.sort(np.concatenate([known[np.concatenate(kept)], unknown]))
