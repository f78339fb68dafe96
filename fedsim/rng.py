"""Random numbers that depend on what they are for, never on when they are drawn.

Every draw of a run comes from a generator keyed by (seed, purpose, round, client), so the
result doesn't change with the number of workers, the order in which clients finish, or a resume.
"""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, *, round: int = 0, client: int = 0) -> np.random.Generator:
    """Return the generator of one purpose in one round of one client.

    Parameters
    ----------
    seed : int
        The experiment's seed, >= 0.
    purpose : str
        What the numbers are for, for example ``"partition"``; two purposes never share numbers.
    round : int
        Round, from 1; 0 for what is drawn once for the run.
    client : int
        Client, from 0.

    Returns
    -------
    numpy.random.Generator
        The same key always gives the same numbers.

    Examples
    --------
    >>> a = generator(0, "batches", round=3, client=7).random(4)
    >>> b = generator(0, "batches", round=3, client=7).random(4)
    >>> c = generator(0, "batches", round=3, client=8).random(4)
    >>> bool((a == b).all()), bool((a == c).any())
    (True, False)
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), round, client])
