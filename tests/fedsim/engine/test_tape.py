"""A noted function: the same bits as calling it, for other numbers of the same form."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedsim.engine.tape import FORMS, RECORD_AT, Tapes, _record, layout

CALLS = RECORD_AT + 2


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *tensors):
        self.calls += 1
        return self.function(*tensors)


def squares(x):
    return {"sum": x.square().sum()}


def logits_and_gradient(x, w, y):
    w = w.detach().requires_grad_()
    loss = F.cross_entropy(torch.relu(x @ w.t()), y)
    (gradient,) = torch.autograd.grad(loss, [w])
    return {"loss": loss.detach(), "gradient": gradient}


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 4), st.booleans())
def test_what_is_done_again_gives_the_same_bits(batch, features, classes, transposed):
    tapes, function = Tapes(), Counted(logits_and_gradient)
    for step in range(CALLS):
        torch.manual_seed(step)
        x = torch.randn(features, batch).t() if transposed else torch.randn(batch, features)
        tensors = [x, torch.randn(classes, features), torch.randint(classes, (batch,))]
        named = tapes.call(layout(tensors), function, tensors)
        expected = logits_and_gradient(*tensors)
        assert torch.equal(named["loss"], expected["loss"])
        assert torch.equal(named["gradient"], expected["gradient"])
    assert function.calls == RECORD_AT


def test_a_form_has_one_layout():
    tapes, function = Tapes(), Counted(squares)
    for _ in range(CALLS):
        for shape in ((2,), (3,), (1, 2)):
            tensors = [torch.ones(shape)]
            named = tapes.call(layout(tensors), function, tensors)
            assert float(named["sum"]) == np.prod(shape)
    assert function.calls == 3 * RECORD_AT


def test_tensors_are_changed_in_place_as_ever():
    def norm(x, mean, variance):
        y = F.batch_norm(x, mean, variance, training=True)
        return {"y": y}

    tapes, function = Tapes(), Counted(norm)
    mean, variance = torch.zeros(3), torch.ones(3)
    same_mean, same_variance = mean.clone(), variance.clone()
    for step in range(CALLS):
        torch.manual_seed(step)
        x = torch.randn(8, 3)
        named = tapes.call("norm", function, [x, mean, variance])
        expected = norm(x, same_mean, same_variance)
        assert torch.equal(named["y"], expected["y"])
        assert torch.equal(mean, same_mean)
        assert torch.equal(variance, same_variance)
    assert function.calls == RECORD_AT


def test_what_is_one_tensor_at_first_may_become_two():
    tapes = Tapes()
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    for step in range(CALLS):
        other = one if step < RECORD_AT else two
        named = tapes.call("sum", lambda a, b: {"sum": a + 10 * b}, [one, other])
        assert float(named["sum"]) == 1 + 10 * float(other)


def test_an_argument_may_come_back():
    tapes = Tapes()
    for step in range(CALLS):
        x = torch.full((2,), float(step))
        named = tapes.call("x", lambda a: {"x": a.detach(), "again": a.view(2)}, [x])
        assert torch.equal(named["x"], x)
        assert torch.equal(named["again"], x)


OUTSIDE = torch.tensor([1.0, 2.0])

OPENLY_IMPURE = {
    "a number taken out": lambda x: {"y": x * float(x.sum())},
    "by item": lambda x: {"y": x * x[0].item()},
    "by numpy": lambda x: {"y": x * float(x.numpy().max())},
    "by asarray": lambda x: {"y": x * float(np.asarray(x).max())},
    "by tolist": lambda x: {"y": x * x.tolist()[0]},
    "a branch": lambda x: {"y": x if x.sum() > 6 else -x},
    "a mask": lambda x: {"y": x[x > 3].sum()},
    "nonzero": lambda x: {"y": x.nonzero().sum()},
    "a tensor from elsewhere": lambda x: {"y": x + OUTSIDE},
    "nothing but one": lambda x: {"y": OUTSIDE + 0},
}


@pytest.mark.parametrize("name", OPENLY_IMPURE)
def test_what_depends_on_more_than_its_tensors_is_called_each_time(name):
    tapes, function = Tapes(), Counted(OPENLY_IMPURE[name])
    for step in range(CALLS):
        x = torch.tensor([step + 1.0, step - 1.0])
        named = tapes.call(name, function, [x])
        assert torch.equal(named["y"], OPENLY_IMPURE[name](x)["y"])
    assert function.calls == CALLS


def test_random_draws_are_drawn_anew():
    tapes = Tapes()
    drawn = [
        tapes.call("dropout", lambda x: {"y": F.dropout(x, 0.5)}, [torch.ones(64)])["y"]
        for _ in range(CALLS)
    ]
    assert not torch.equal(drawn[-1], drawn[-2])


def test_a_function_that_fails_does_so_each_time():
    def fail(x):
        raise RuntimeError("no power")

    tapes = Tapes()
    for _ in range(CALLS):
        with pytest.raises(RuntimeError, match="no power"):
            tapes.call("fail", fail, [torch.ones(1)])


def test_what_is_not_needed_is_not_done_again():
    def waste(x):
        x.exp().log()
        return {"y": x + 1}

    tapes = Tapes()
    for _ in range(RECORD_AT):
        tapes.call("waste", waste, [torch.ones(2)])
    with torch.profiler.profile() as profile:
        tapes.call("waste", waste, [torch.ones(2)])
    done = {event.key for event in profile.key_averages()}
    assert "aten::add" in done
    assert not done & {"aten::exp", "aten::log"}


def test_the_forms_not_used_for_longest_are_forgotten():
    tapes, often, once = Tapes(), Counted(squares), Counted(squares)
    for form in range(FORMS + 10):
        tapes.call("often", often, [torch.ones(1)])
        tapes.call(form, once, [torch.ones(1)])
    assert often.calls == RECORD_AT
    assert once.calls == FORMS + 10
    assert len(tapes._forms) <= FORMS


def test_where_tensors_lie_still_a_form_becomes_a_graph_at_once(monkeypatch):
    captured = []

    class Graphs:
        def capture(self, function, tensors, still):
            captured.append(still)
            return lambda *tensors: {"graph": function(*tensors)["sum"]}

    monkeypatch.setattr("fedsim.engine.tape.Graphs", Graphs)
    tapes, function = Tapes(), Counted(squares)
    for step in range(3):
        found = tapes.call("form", function, [torch.full((2,), float(step))], num_static=1)
        assert {key: float(value) for key, value in found.items()} == {
            "graph" if step else "sum": 2 * step**2
        }
    assert function.calls == len(captured) == 1
    # A first use that failed, for want of memory, was none.
    calls = []

    def short_of_memory(x):
        calls.append(x)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return {"sum": x.sum()}

    with pytest.raises(torch.OutOfMemoryError):
        tapes.call("short", short_of_memory, [torch.ones(2)], num_static=1)
    for _ in range(2):
        found = tapes.call("short", short_of_memory, [torch.ones(2)], num_static=1)
    assert (len(calls), len(captured), *found) == (2, 2, "graph")
    # What can't be noted isn't tried again and again.
    function = Counted(OPENLY_IMPURE["by item"])
    with patch("fedsim.engine.tape._record", wraps=_record) as noting:
        for _ in range(CALLS):
            tapes.call("impure", function, [torch.ones(2)], num_static=1)
    assert function.calls == CALLS
    assert noting.call_count == 1
    assert len(captured) == 2
