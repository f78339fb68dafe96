"""Convolutions and BatchNorm of many clients at once, on a GPU, in Triton.

The libraries' grouped convolutions, which ``vmap`` makes of convolutions with weights of their own
for each client, and their BatchNorm, which knows no padding, are slow or wrong where clients train
side by side. These kernels take the stack as it is.

They are operations of PyTorch's dispatcher, so that a tape can note them. Images and weights have
their channels innermost in memory. Sums are in float32.
"""

from fedsim.models.kernels.batch_norm import normalise, normalise_back
from fedsim.models.kernels.convolution import convolve, convolve_back, weigh

__all__ = ["convolve", "convolve_back", "normalise", "normalise_back", "weigh"]
