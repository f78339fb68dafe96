"""The generators of a round's clients are those of one at a time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedsim.rng import Generators, generator

PURPOSES = st.sampled_from(["pass 0.0", "pass 0.1", "partition", ""])


@given(
    st.integers(0, 2**100),
    st.integers(0, 2**33),
    st.lists(st.integers(0, 2**33), max_size=20),
    st.lists(PURPOSES, min_size=1, max_size=3),
)
def test_those_of_many_clients_give_the_numbers_of_one(seed, round, clients, purposes):
    of_round = Generators(seed, round=round, clients=clients)
    for client in [*clients, 2]:
        for purpose in purposes:
            found = of_round.of(purpose, client)
            alone = generator(seed, purpose, round=round, client=client)
            numbers = alone.integers(2**63, size=5)
            np.testing.assert_array_equal(found.integers(2**63, size=5), numbers)
            np.testing.assert_array_equal(found.permutation(9), alone.permutation(9))
