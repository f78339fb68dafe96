"""Bringing arrays to the device on which a client trains."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device.

    A GPU takes it when it comes to it, and nobody waits until then; on the processor the tensor
    shares the array's memory, if that can be written to.
    """
    # PyTorch has no tensors that can't be written to, such as of memory that workers share.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if device.type != "cuda":
        return tensor.to(device)
    # From memory that isn't pinned, a copy would wait for all that the GPU has yet to do.
    return tensor.pin_memory().to(device, non_blocking=True)
