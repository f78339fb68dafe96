"""Generators of many clients at once are those of one at a time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedsim.rng import generator, generators

PURPOSES = st.sampled_from(["pass 0.0", "pass 0.1", "partition", ""])


@given(
    st.integers(0, 2**100),
    st.integers(0, 2**33),
    st.lists(st.tuples(PURPOSES, st.integers(0, 2**32 - 1)), max_size=20),
)
def test_several_at_once_give_the_numbers_of_one(seed, round, keys):
    purposes, clients = [purpose for purpose, _ in keys], [client for _, client in keys]
    together = generators(seed, purposes, clients, round=round)
    assert len(together) == len(keys)
    for found, (purpose, client) in zip(together, keys, strict=True):
        alone = generator(seed, purpose, round=round, client=client)
        np.testing.assert_array_equal(found.integers(2**63, size=5), alone.integers(2**63, size=5))
        np.testing.assert_array_equal(found.permutation(9), alone.permutation(9))
