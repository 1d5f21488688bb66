"""Triton where it is installed. The CPU builds of torch bring none, and there every kernel's torch twin runs."""

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None


def jit(kernel: Callable[..., Any]) -> Any:
    """Compile a kernel for the GPU; without Triton it is left alone, and nobody calls it."""
    return kernel if triton is None else triton.jit(kernel)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`: the width of a Triton block."""
    return 1 << max(number - 1, 0).bit_length()
