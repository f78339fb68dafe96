"""The arrays of many clients, one after the other in memory.

Shapes: K clients side by side.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fedsim.models.net import Weights


class Stacks:
    """Stacks the arrays of clients.

    On a GPU every pass gets the same memory, where a CUDA graph can find its arrays again (see
    `fedsim.engine.graph`); what should outlast the next pass must be copied.
    """

    def __init__(self) -> None:
        self._room: dict[Hashable, Tensor] = {}

    @staticmethod
    def are_static(device: torch.device) -> bool:
        """Tell whether every pass on a device gets the same memory."""
        return device.type == "cuda"

    def stack(self, role: str, ws: Sequence[Weights]) -> Weights:
        """Return the arrays of K clients as arrays [K, ...].

        Parameters
        ----------
        role : str
            What they are in a pass; those of other roles have other memory.
        ws : sequence of Weights
            Arrays of the same names, shapes and layouts, of each client.
        """
        return {name: self._stack(f"{role} {name}", [w[name] for w in ws]) for name in ws[0]}

    def zeros(self, role: str, w: Weights) -> Weights:
        """Return zeros like stacked arrays."""
        return {n: self._like(f"{role} {n}", t[0], len(t)).zero_() for n, t in w.items()}

    def _stack(self, role: str, tensors: Sequence[Tensor]) -> Tensor:
        first = tensors[0].detach()
        stacked = self._like(role, first, len(tensors))
        if all(tensor is tensors[0] for tensor in tensors):  # all start from the global weights
            return stacked.copy_(first)
        torch._foreach_copy_(list(stacked.unbind()), [tensor.detach() for tensor in tensors])
        return stacked

    def _like(self, role: str, one: Tensor, count: int) -> Tensor:
        """Return memory for so many tensors that are laid out like one."""
        if not (one.is_contiguous() or (one.dim() > 2 and one.movedim(1, -1).is_contiguous())):
            one = torch.empty_like(one)  # with gaps, or the same numbers several times
        shape, stride = (count, *one.shape), (one.numel(), *one.stride())
        if not self.are_static(one.device):
            return torch.empty_strided(shape, stride, dtype=one.dtype)
        key = (role, one.shape, one.stride(), one.dtype)
        room = self._room.get(key)
        if room is None or len(room) < count:
            room = torch.empty_strided(shape, stride, dtype=one.dtype, device=one.device)
            self._room[key] = room
        return room[:count]
