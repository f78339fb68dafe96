"""Arrays of many clients in one: their numbers, and a layout that is each client's own."""

import pytest
import torch

from fedsim.engine.stacks import Stacks


@pytest.mark.parametrize(
    "make",
    [
        lambda k: torch.full((2, 3), float(k)),
        lambda k: torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        lambda k: torch.randn(3, 4).t(),
        lambda k: torch.randn(3, 8)[:, ::2],
        lambda k: torch.randn(8)[::2],
        lambda k: torch.full((3, 1), float(k)).expand(3, 5),
        lambda k: torch.randn(5),
        lambda k: torch.tensor(k),
    ],
    ids=[
        "rows",
        "channels last",
        "transposed",
        "with gaps",
        "vector with gaps",
        "expanded",
        "vector",
        "number",
    ],
)
def test_stacked_arrays_are_apart_from_each_other(make):
    ws = [{"a": make(k)} for k in range(3)]

    stacked = Stacks().stack("w", ws)["a"]

    for k, w in enumerate(ws):
        assert torch.equal(stacked[k], w["a"])
    stacked += 1  # would fail where two entries share memory
    for k, w in enumerate(ws):
        assert torch.equal(stacked[k], w["a"] + 1)


def test_clients_that_start_alike_do_not_share_memory():
    w = {"a": torch.zeros(2)}
    stacked = Stacks().stack("w", [w, w])["a"]
    stacked[0] += 1
    assert stacked.tolist() == [[1, 1], [0, 0]]
    assert w["a"].tolist() == [0, 0]


def test_zeros_are_new_each_time():
    stacks, w = Stacks(), {"a": torch.ones(2, 3)}
    first = stacks.zeros("velocity", w)["a"]
    first += 1
    assert stacks.zeros("velocity", w)["a"].tolist() == [[0] * 3] * 2
