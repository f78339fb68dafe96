"""What workers need to know of the whole training data, worked out once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.data.class_groups import class_groups
from fedsim.data.federation import Federation
from fedsim.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Statistics:
    """Facts about a federation's training data.

    Attributes
    ----------
    mean, std : ndarray of float32
        Of the source's training inputs, those that a long tail leaves out among them, in raw units:
        [channels] of images, [D] of vectors.
    low, high : float
        Smallest and largest value of the same inputs.
    groups : ndarray of int64 [C]
        Whether a class is head (0), medium (1) or tail (2); see `class_groups`.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    low: float
    high: float
    groups: NDArray[np.int64]

    @classmethod
    def of(cls, federation: Federation) -> Statistics:
        """Work the facts out."""
        mean, std = federation.source.normalisation()
        x = federation.source.x_train
        _check_std(federation.source.name, std, "channel" if x.ndim == 4 else "feature")
        return cls(
            mean=mean,
            std=std,
            low=float(x.min()),
            high=float(x.max()),
            groups=class_groups(federation.class_counts),
        )


def _check_std(name: str, std: NDArray[np.float32], what: str) -> None:
    """Raise DataError if inputs lie so close that to divide by their deviation isn't safe.

    Below the smallest normal number processors may take a deviation for 0.
    """
    least = np.finfo(np.float32).tiny
    if std.min() < least:
        place = int(std.argmin())
        raise DataError(
            f"{name}: {what} {place} of x_train has a standard deviation of {std[place]:.1e}; must"
            f" be 0 or at least {least:.1e} in float32; scale it up, or set data.normalise = false"
        )
