"""Random numbers that depend on what they are for, never on when they are drawn.

Every draw of a run comes from a generator keyed by (seed, purpose, round, client), so the
result doesn't change with the number of workers, the order in which clients finish, or a resume.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray


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
    return np.random.default_rng([seed, _code(purpose), round, client])


class Generators:
    """`generator` for the clients of a round.

    One by one, most of the time goes into NumPy's hash of the key; here it is worked out for all of
    them when one is asked for, unless they are few.

    Parameters
    ----------
    seed, round : int
        As for `generator`.
    clients : sequence of int
        Who is going to ask; others may, too.

    Examples
    --------
    >>> of_round = Generators(0, round=3, clients=range(10))
    >>> a = of_round.of("batches", 7).random()
    >>> a == generator(0, "batches", round=3, client=7).random()
    True
    """

    def __init__(self, seed: int, *, round: int, clients: Sequence[int]) -> None:
        self.round = round
        self._seed = seed
        self._clients = clients
        self._hashed: dict[str, dict[int, NDArray[np.uint64]]] = {}

    def of(self, purpose: str, client: int) -> np.random.Generator:
        """Return a new generator of one purpose of one client."""
        if purpose not in self._hashed:
            self._hashed[purpose] = self._hash(purpose)
        state = self._hashed[purpose].get(client)
        if state is None:
            return generator(self._seed, purpose, round=self.round, client=client)
        # NumPy's annotations know of no other seed sequence than its own.
        sequence: Any = _Hashed(state)
        return np.random.Generator(np.random.PCG64(sequence))

    def _hash(self, purpose: str) -> dict[int, NDArray[np.uint64]]:
        clients = self._clients
        if len(clients) < _MANY or max(*clients, self.round) > _WORD:
            return {}
        seed = self._seed
        words = [seed & _WORD]
        while seed := seed >> 32:
            words.append(seed & _WORD)
        words += [_code(purpose), self.round]
        key = [np.full(len(clients), word, np.uint32) for word in words]
        hashed = _hash([*key, np.array(clients, dtype=np.uint32)])
        return dict(zip(clients, hashed, strict=True))


def _code(purpose: str) -> int:
    return zlib.crc32(purpose.encode())


class _Hashed(ISeedSequence):
    """A seed sequence whose state is known."""

    def __init__(self, state: NDArray[np.uint64]) -> None:
        self._state = state

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        """Return the state that PCG64 asks for."""
        assert n_words == len(self._state)
        assert dtype is np.uint64
        return self._state


_WORD = 0xFFFFFFFF
_MANY = 8
_POOL = 4
_SHIFT = np.uint32(16)


def _hash(key: list[NDArray[np.uint32]]) -> NDArray[np.uint64]:
    """Return what ``numpy.random.SeedSequence`` makes of keys: for each four words, [keys, 4].

    M. O'Neill's seed_seq_fe128, as NumPy documents it: the words of a key are hashed into a pool of
    four, mixed with each other, and hashed once more.
    """
    multiplier = 0x43B0D7E5

    def scramble(value: NDArray[np.uint32]) -> NDArray[np.uint32]:
        nonlocal multiplier
        value = value ^ np.uint32(multiplier)
        multiplier = multiplier * 0x931E8875 & _WORD
        value *= np.uint32(multiplier)
        return value ^ (value >> _SHIFT)

    def mix(x: NDArray[np.uint32], y: NDArray[np.uint32]) -> NDArray[np.uint32]:
        mixed: NDArray[np.uint32] = x * np.uint32(0xCA01F9DD) - y * np.uint32(0x4973F715)
        mixed ^= mixed >> _SHIFT
        return mixed

    pool = [scramble(word) for word in key[:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = mix(pool[target], scramble(pool[source]))
    for word in key[_POOL:]:
        for target in range(_POOL):
            pool[target] = mix(pool[target], scramble(word))
    state = np.empty((len(key[0]), 2 * _POOL), np.uint32)
    multiplier = 0x8B51F9DD
    for place in range(2 * _POOL):
        value = pool[place % _POOL] ^ np.uint32(multiplier)
        multiplier = multiplier * 0x58F38DED & _WORD
        value *= np.uint32(multiplier)
        state[:, place] = value ^ (value >> _SHIFT)
    return state.view(np.uint64)
