"""Does again what a pure function of tensors did, without working it out anew.

A step of SGD consists of the same operations each time: what autograd, and for many clients
``vmap``, make of the loss. Where batches are small, to work them out takes longer than to do them.
So the operations of a form, that is a function and the layout of its tensors, are noted on a tape
and from then on called one after the other: the same operations on the same numbers, and so the
same results, bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fedsim.engine.graph import Function, Graphs, Outputs

RECORD_AT = 3
"""Which use of a form is noted: to note one takes as long as some ten steps of a small model, so
that one that comes up once isn't worth it."""
FORMS = 2048
"""Most forms that are known; those not used for longest are forgotten."""


class Tapes:
    """The forms that were used so far.

    Examples
    --------
    >>> tapes = Tapes()
    >>> def double(x):
    ...     print("worked out")
    ...     return {"twice": 2 * x}
    >>> for step in range(4):
    ...     x = torch.full((2,), float(step))
    ...     found = tapes.call("double", double, [x])
    worked out
    worked out
    worked out
    >>> found
    {'twice': tensor([6., 6.])}
    """

    def __init__(self) -> None:
        self._forms: OrderedDict[Hashable, int | Function] = OrderedDict()
        self._numbers: dict[Hashable, int] = {}
        self._graphs: Graphs | None = None

    @property
    def graphs_failed(self) -> bool:
        """Whether what could be begun as one is called operation by operation on a GPU."""
        return self._graphs is not None and self._graphs.failed

    def number(self, part: Hashable) -> int:
        """Return a number that stands for a part of forms: it is looked up sooner."""
        return self._numbers.setdefault(part, len(self._numbers))

    def call(
        self, form: Hashable, function: Function, tensors: Sequence[Tensor], num_static: int = 0
    ) -> Outputs:
        """Return ``function(*tensors)``, without gradients.

        Parameters
        ----------
        form : hashable
            Stands for the function, and for all that its operations depend on besides the numbers
            in ``tensors``: their shapes, strides and dtypes.
        function : callable
            Must be pure: what it reads comes in ``tensors``, and nothing in Python depends on
            their numbers. It may change them in place. One that breaks this openly, by a number
            taken out of a tensor, a tensor from elsewhere or a random draw, is called each time.
        tensors : sequence of torch.Tensor
            Its arguments.
        num_static : int
            On a GPU, the first so many tensors of a form always lie where they lie now: its
            operations may be begun as one, see `fedsim.engine.graph`.
        """
        known = self._forms.get(form, 0)
        if not isinstance(known, int):
            self._forms.move_to_end(form)
            # They are those that autograd works out: it has nothing more to do.
            with torch._C._AutoDispatchBelowAutograd():
                return known(*tensors)
        # A graph is worth it even for a second use.
        is_due = known + 1 == (1 if num_static else RECORD_AT)
        outputs, tape = _record(function, tensors) if is_due else (function(*tensors), None)
        # Not before: one that failed, for want of memory perhaps, is as if it had not been used.
        self._forms[form] = known + 1 if tape is None else tape
        if len(self._forms) > FORMS:
            self._forms.popitem(last=False)
        if tape is not None and num_static:
            self._graphs = self._graphs or Graphs()
            self._forms[form] = self._graphs.capture(tape, tensors, num_static)
        return outputs


def _record(function: Function, tensors: Sequence[Tensor]) -> tuple[Outputs, Function | None]:
    """Call a function and note what it does; the tape is None where that can't be repeated."""
    # Each under a name of its own: what is one tensor now may be two the next time.
    arguments = [tensor.detach() for tensor in tensors]
    recorder = _Recorder(arguments)
    with recorder, _Boundary(recorder):
        outputs = function(*arguments)
    return outputs, recorder.tape(outputs)


def layout(tensors: Iterable[Tensor]) -> tuple[Hashable, ...]:
    """Return what a form must say of its tensors."""
    return tuple((one.shape, one.stride(), one.dtype) for one in tensors)


class _RefusedError(Exception):
    """An operation that can't be done again from its arguments."""


@dataclass(frozen=True, slots=True)
class _Line:
    """A noted operation."""

    call: str
    """Its source."""
    makes: list[str]
    """The tensors that it returns, by name; ``_`` for those that have one already."""
    many: bool
    """Whether they come as a tuple."""
    reads: set[str]
    changes: bool
    """Whether it changes what it reads."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that arrive below autograd and ``vmap``, on whole tensors.

    ``a0``, ``a1`` ... are the arguments, ``v1``, ``v2`` ... what the operations make of them, and
    ``c0``, ``c1`` ... the operations themselves and constants.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise PyTorch imports its compiler, which takes two seconds.
        return False

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refused = False
        # Weak: to note operations must not keep alive what they no longer need.
        self._names = WeakTensorKeyDictionary()
        for place, tensor in enumerate(arguments):
            self._names[tensor] = f"a{place}"
        self._num_arguments = len(arguments)
        self._num_made = 0
        self._lines: list[_Line] = []
        self._constants: dict[str, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Carry an operation out, and note it."""
        out = func(*args, **(kwargs or {}))
        if not self.refused:
            try:
                self._note(func, args, kwargs or {}, out)
            except _RefusedError:
                self.refused = True
        return out

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        many = isinstance(out, tuple | list)
        made = list(out) if many else [] if out is None else [out]
        if not _depends_on_arguments_only(func, args, made):
            raise _RefusedError
        changes = func._schema.is_mutable
        if len(made) == 1 and not changes and args and _is_same(made[0], args[0]):
            self._names[made[0]] = self._name_of(args[0])
            return
        reads: set[str] = set()
        written = [self._source(argument, reads) for argument in args]
        written += [f"{name}={self._source(value, reads)}" for name, value in kwargs.items()]
        call = f"{self._constant(_quickest(func))}({', '.join(written)})"
        self._lines.append(_Line(call, [self._name(one) for one in made], many, reads, changes))

    def _name(self, made: Tensor | None) -> str:
        if made is None or made in self._names:  # changed in place
            return "_"
        self._num_made += 1
        name = self._names[made] = f"v{self._num_made}"
        return name

    def _name_of(self, known: Tensor) -> str:
        if known not in self._names:  # it came from elsewhere
            raise _RefusedError
        name: str = self._names[known]
        return name

    def _source(self, value: Any, reads: set[str]) -> str:
        """Return the source of an argument, and add the tensors in it to ``reads``."""
        if isinstance(value, Tensor):
            name = self._name_of(value)
            reads.add(name)
            return name
        if isinstance(value, tuple | list):
            return f"[{', '.join(self._source(one, reads) for one in value)}]"
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        for name, known in self._constants.items():
            if known is value:
                return name
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def tape(self, outputs: Outputs) -> Function | None:
        """Return the noted operations as a function; None where they can't be done again."""
        if self.refused or any(one not in self._names for one in outputs.values()):
            return None
        needed = {self._names[tensor] for tensor in outputs.values()}
        named = [f"{key!r}: {self._names[tensor]}" for key, tensor in outputs.items()]
        source = [f"    return {{{', '.join(named)}}}"]
        # From the end: what nobody reads any more isn't made, or is let go where it was read last.
        for line in reversed(self._lines):
            if not line.changes and needed.isdisjoint(line.makes):
                continue
            over = (line.reads | {*line.makes}) - needed
            text = line.call
            if line.makes:
                text = f"{', '.join(line.makes)}{',' * line.many} = {text}"
            if gone := sorted(name for name in over if name.startswith("v")):
                text += f"; del {', '.join(gone)}"
            source.append(f"    {text}")
            needed = (needed | line.reads) - {*line.makes}
        arguments = ", ".join(f"a{place}" for place in range(self._num_arguments))
        source.append(f"def tape({arguments}):")
        space = dict(self._constants)
        exec("\n".join(reversed(source)), space)
        made: Function = space["tape"]
        return made


class _Boundary(TorchFunctionMode):
    """Refuses what takes numbers out of tensors behind PyTorch's dispatcher."""

    _WAYS_OUT = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__})

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Pass a call on, and see what it is."""
        if func in self._WAYS_OUT:
            self._recorder.refused = True
        return func(*args, **(kwargs or {}))


_BOUND = frozenset({
    "_foreach_add_", "_foreach_mul_", "_log_softmax", "_log_softmax_backward_data", "_softmax",
    "_softmax_backward_data", "add", "addmm", "bmm", "clamp", "clone", "div", "exp", "expand",
    "gather", "log", "mean", "mm", "mul", "neg", "new_zeros", "ones_like", "relu", "scatter_add",
    "select", "squeeze", "sub", "sum", "t", "transpose", "unsqueeze", "view", "where", "zeros_like",
})  # fmt: skip
"""Operations of which ``torch`` or ``Tensor`` has a function that takes the same arguments."""


def _quickest(func: Any) -> Any:
    """Return the function that takes least time to begin with an operation."""
    name = func._schema.name.removeprefix("aten::")
    if name in _BOUND:
        return getattr(torch, name, None) or getattr(Tensor, name)
    return func._op


def _depends_on_arguments_only(func: Any, args: tuple[Any, ...], made: list[Any]) -> bool:
    """Tell whether an operation gives tensors whose layout doesn't depend on any numbers."""
    if not isinstance(func, torch._ops.OpOverload):
        return False
    if not all(one is None or isinstance(one, Tensor) for one in made):
        return False
    if func is torch.ops.aten.index.Tensor:  # but for a mask
        return all(one is None or one.dtype not in (torch.bool, torch.uint8) for one in args[1])
    return _NUMBERS_OR_CHANCE.isdisjoint(func.tags)


_NUMBERS_OR_CHANCE = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}


def _is_same(made: Any, argument: Any) -> bool:
    """Tell whether an operation only gave a tensor a new name."""
    return (
        isinstance(made, Tensor)
        and isinstance(argument, Tensor)
        and made.numel() > 0
        and made.data_ptr() == argument.data_ptr()
        and (made.shape, made.stride(), made.dtype)
        == (argument.shape, argument.stride(), argument.dtype)
    )
