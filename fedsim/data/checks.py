"""Checks of the user's settings, each failing with one line that names the key and the value."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TypeGuard

from fedsim.errors import DataError


def check(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise `DataError` unless `ok`; the line reads ``key = value: must be allowed``."""
    if not ok:
        raise DataError(f"{key} = {value!r}: must be {allowed}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite real number; a bool is none."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer (Python's or NumPy's); a bool is none."""
    return not isinstance(value, bool) and isinstance(value, Integral)
