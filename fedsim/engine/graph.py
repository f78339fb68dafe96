"""A function's work on a GPU, begun as one.

A step's operations are begun one after the other, each of which takes the processor some
microseconds: for batches of a few examples longer than the GPU works. A CUDA graph begins all of
them in one go.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
"""Of a function whose work can be begun as one."""

Function = Callable[..., Outputs]


class Graphs:
    """Makes graphs that share the memory in which they work, and that from which they read."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._rooms: dict[Hashable, Tensor] = {}
        self._failed = False

    @property
    def failed(self) -> bool:
        """Whether a capture has failed, so that nothing is captured any more."""
        return self._failed

    def capture(self, function: Function, tensors: Sequence[Tensor], num_static: int) -> Function:
        """Return what does the same as ``function(*tensors)``, begun as one.

        Parameters
        ----------
        function : callable
            Does the same with any numbers, as a tape does. Its kernels have run before.
        tensors : sequence of torch.Tensor
            Its arguments. Their layout is that of the arguments of every later call.
        num_static : int
            So many of them, the first ones, are the same in every call. Others, [K, ...] of K
            clients, are brought to where the graph reads them.

        Returns
        -------
        callable
            ``function`` itself where it can't be captured, with a warning. Nothing is captured any
            more then, for a capture that fails may leave the allocator in the middle of it.
        """
        if self._failed:
            return function
        brought = [self._room(place, one) for place, one in enumerate(tensors[num_static:])]
        graph = torch.cuda.CUDAGraph()
        # A capture can't take back what PyTorch keeps for later.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # What was begun so far must have come first.
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream), torch._C._AutoDispatchBelowAutograd():
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    outputs = function(*tensors[:num_static], *brought)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self._failed = True
            cause = error.__context__ or error  # the end of a broken capture fails, too
            warnings.warn(f"steps are begun operation by operation ({cause})", stacklevel=2)
            return function

        def replay(*tensors: Tensor) -> Outputs:
            if brought:
                torch._foreach_copy_(brought, list(tensors[num_static:]))
            graph.replay()
            # The next replay writes to the same place.
            return {name: output.clone() for name, output in outputs.items()}

        return replay

    def _room(self, place: int, one: Tensor) -> Tensor:
        """Return memory that is laid out like an argument; graphs run one after the other."""
        key = (place, one.shape[1:], one.stride(), one.dtype)
        room = self._rooms.get(key)
        if room is None or len(room) < len(one):
            room = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=one.device)
            self._rooms[key] = room
        return room[: len(one)]
