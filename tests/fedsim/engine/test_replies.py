"""Replies of several workers, put together."""

import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedsim.engine.replies import Replies, columns

ANSWERS = st.dictionaries(
    st.integers(0, 30),
    st.one_of(
        st.just("failed"),
        st.fixed_dictionaries({"num_examples": st.integers(0, 9)}, optional={"loss": st.floats()}),
    ),
)


def of_a_worker(answers):
    rows = {client: row for client, row in answers.items() if row != "failed"}
    return Replies(
        clients=list(rows),
        metrics=columns(list(rows.values())),
        audit=columns([{"seen": client} for client in rows]),
        arrays=[{"arrays": {"w": np.float32([client])}} for client in rows],
        num_bytes=[4 * client for client in rows],
        keeps=[client % 2 == 0 for client in rows],
        failures={client: f"why {client}" for client in answers.keys() - rows.keys()},
    )


@given(answers=ANSWERS, workers=st.integers(1, 3), data=st.data())
def test_every_number_stays_with_its_client(answers, workers, data):
    asked = data.draw(st.permutations(list(answers)))
    shares = [{c: answers[c] for c in answers if c % workers == w} for w in range(workers)]
    parts = [pickle.loads(pickle.dumps(of_a_worker(share))) for share in shares]
    found = Replies.joined(parts, asked)
    assert found.clients == [client for client in asked if answers[client] != "failed"]
    assert list(found.failures) == [client for client in asked if answers[client] == "failed"]
    assert all(why == f"why {client}" for client, why in found.failures.items())
    for name, column in found.metrics.items():
        expected = [answers[client].get(name) for client in found.clients]
        np.testing.assert_array_equal(np.array(column, float), np.array(expected, float))
    assert found.audit.get("seen", []) == found.clients
    assert [groups["arrays"]["w"].item() for groups in found.arrays] == found.clients
    assert found.num_bytes == [4 * client for client in found.clients]
    assert found.keeps == [client % 2 == 0 for client in found.clients]
