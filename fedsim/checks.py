"""Checks of the user's settings, each failing with one line that names the key and the value."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TypeGuard

from fedsim.errors import ConfigError, DataError


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite real number; a bool is none."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer (Python's or NumPy's); a bool is none."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def check(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise `DataError` unless `ok`; the line reads ``key = value: must be allowed``."""
    if not ok:
        raise DataError(f"{key} = {value!r}: must be {allowed}")


# ----- hyperparameters of a method ---------------------------------------------------------


def check_hyperparameter(ok: bool, name: str, value: float, allowed: str) -> None:
    """Raise `ConfigError` unless `ok`; the line reads ``method.name = value: must be allowed``."""
    if not ok:
        raise ConfigError(f"method.{name} = {value}: must be {allowed}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise a ConfigError unless a hyperparameter is finite and at least ``least``."""
    ok = value >= least and math.isfinite(value)
    check_hyperparameter(ok, name, value, f"at least {least:g}")


def check_above(name: str, value: float, bound: float) -> None:
    """Raise a ConfigError unless a hyperparameter is finite and above ``bound``."""
    ok = value > bound and math.isfinite(value)
    check_hyperparameter(ok, name, value, f"above {bound:g}")


def check_share(name: str, value: float) -> None:
    """Raise a ConfigError unless a hyperparameter lies in [0, 1]."""
    check_hyperparameter(0 <= value <= 1, name, value, "in [0, 1]")
