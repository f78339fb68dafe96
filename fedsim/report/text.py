"""Numbers as people read them, in figures, in tables and on pages."""

from __future__ import annotations

import math


def percent(share: float) -> str:
    """Write a share in %, "–" for NaN.

    >>> percent(0.9312), percent(float("nan"))
    ('93.1', '–')
    """
    return f"{100 * share:.1f}" if math.isfinite(share) else "–"


def counted(number: int, what: str) -> str:
    """Return a number of things.

    >>> counted(1, "client"), counted(1200, "client")
    ('1 client', '1,200 clients')
    """
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
