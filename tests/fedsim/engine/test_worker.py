"""Whom a worker trains at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.engine import worker as module
from fedsim.engine.worker import Order, Worker

SHARE = [
    (4, [(client, -1) for client in (1, 5, 6)]),
    (5, [(client, -1) for client in (0, 2)]),
]


def clients_at_a_time(worker, share=SHARE):
    return [[client for _, client, _ in some] for some in worker._stacks(share, {})]


def test_one_by_one_a_client_at_a_time(make_task):
    assert clients_at_a_time(Worker(make_task())) == [[1], [5], [6], [0], [2]]


def test_on_the_processor_leaves_stay_apart(make_task, monkeypatch):
    worker = Worker(make_task(stacked=True))
    assert clients_at_a_time(worker) == [[1, 5, 6], [0, 2]]
    monkeypatch.setattr(module, "MAX_STACKED_CLIENTS", 2)
    assert clients_at_a_time(worker) == [[1, 5], [6], [0, 2]]


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (6, [[1, 5, 6], [0, 2]]),
        (8, [[1, 5, 6], [0, 2]]),  # four would leave one alone
        (10, [[1, 5, 6, 0, 2]]),
        (1, [[1]]),
    ],
)
def test_on_a_gpu_as_many_as_fit(make_task, monkeypatch, memory, expected):
    # "meta" stands for a GPU; half of what it has is for the clients.
    task = replace(make_task(stacked=True), device="meta", device_share=0.5)
    worker = Worker(task)
    properties = type("Properties", (), {"total_memory": 2 * 1000 * memory})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(module, "client_bytes", lambda *arguments: 1000)
    assert clients_at_a_time(worker)[: len(expected)] == expected


def test_what_has_not_fitted_is_not_tried_again(make_task, monkeypatch):
    worker = Worker(replace(make_task(stacked=True), device="meta"))
    properties = type("Properties", (), {"total_memory": 2 * 1000 * 10})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(module, "client_bytes", lambda *arguments: 1000)
    assert clients_at_a_time(worker) == [[1, 5, 6, 0, 2]]
    worker._trainer.max_stack = 2
    assert clients_at_a_time(worker) == [[1, 5], [6, 0], [2]]


def test_a_sum_does_not_depend_on_who_trains_side_by_side(make_task, monkeypatch):
    """Leaves are summed apart even where their clients train in one stack."""
    arrays = {"head.weight": np.ones((3, 16), np.float32), "head.bias": np.ones(3, np.float32)}
    share = [(2, [(0, (-1, 0)), (1, (-1, 0))]), (6, [(2, (-1, 0))]), (7, [(3, (-1, 0))])]
    worker = Worker(make_task())
    _, alone, _ = worker.train(arrays, Order(1, {"arrays": "num_examples"}), share)
    apart = [[(n, *one) for n, leaf in share for one in leaf]]
    monkeypatch.setattr(worker, "_stacks", lambda *arguments: iter(apart))
    _, together, _ = worker.train(arrays, Order(1, {"arrays": "num_examples"}), share)
    assert list(together) == list(alone) == [1]
    assert torch.equal(alone[1].vectors["arrays"], together[1].vectors["arrays"])
