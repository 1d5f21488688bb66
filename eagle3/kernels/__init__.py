"""Kernels of the draft's step: each behind one function, with the torch twin that defines it beside it.

The function picks by the device of its tensors: Triton on a GPU, the twin everywhere else. The twins run in any
floating dtype, float64 included, which is how the whole step is checked against autograd.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

#: What Triton gives kernels to work with; its annotations are never read without it.
triton: Any = None
tl: Any = None

if find_spec("triton"):
    triton = import_module("triton")
    tl = import_module("triton.language")


def jit(kernel: Callable[..., Any]) -> Any:
    """Compile a kernel for the GPU; without Triton it is left alone, and nobody calls it."""
    return kernel if triton is None else triton.jit(kernel)


def widened(values: Tensor) -> Tensor:
    """The values in float32 or better, in which kernels compute, and so do twins."""
    return values.to(torch.promote_types(torch.float32, values.dtype))


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`: the width of a Triton block."""
    return 1 << max(number - 1, 0).bit_length()
