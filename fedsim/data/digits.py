"""Scikit-learn's handwritten digits, which need no download.

Shapes: N examples of a split, C classes.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fedsim.data.source import Source

_TEST_EXAMPLES = 36  # of each class


def digits() -> Source:
    """Return scikit-learn's handwritten digits: 1,797 images of 8 x 8 with values 0..16.

    The test set has 36 examples of each class, 360 in all; 1,437 are left for training, 138 to 147
    a class. The split is fixed, whatever the experiment's seed: of a class's n examples those in
    places floor(i * n / 36), i = 0..35, are for testing, so that they are spread over the file
    and its writers.

    Returns
    -------
    Source
        Images uint8 [N, 1, 8, 8], C = 10.

    References
    ----------
    Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
    1998 (its test set).

    Examples
    --------
    >>> source = digits()
    >>> source.x_train.shape, source.x_test.shape
    ((1437, 1, 8, 8), (360, 1, 8, 8))
    """
    # The file that load_digits() reads; to import scikit-learn for it takes a second.
    package = find_spec("sklearn")
    assert package is not None, "scikit-learn is required"
    folder = Path(str(package.origin)).parent / "datasets" / "data"
    with gzip.open(folder / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    x = table[:, :-1].astype(np.uint8).reshape(-1, 1, 8, 8)
    y = table[:, -1]
    test = np.zeros(len(y), bool)
    for c in range(10):
        members = np.flatnonzero(y == c)
        test[members[np.arange(_TEST_EXAMPLES) * len(members) // _TEST_EXAMPLES]] = True
    return Source(
        name="digits",
        x_train=x[~test],
        y_train=y[~test],
        x_test=x[test],
        y_test=y[test],
        num_classes=10,
    )
