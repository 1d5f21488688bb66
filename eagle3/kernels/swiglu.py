"""The gated activation of the MLP and its gradient.

Shape suffixes: M rows, I intermediate width. Gate and up stand side by side: (M, 2I), the gate first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from eagle3.kernels import jit, tl, widened

_BLOCK = 1024


def swiglu(gate_up_M2I: Tensor, *, out_MI: Tensor) -> None:
    """Writes silu(gate) * up to `out_MI`."""
    num_rows, width = out_MI.shape
    if not out_MI.is_cuda:
        gate, up = widened(gate_up_M2I).chunk(2, dim=-1)
        out_MI.copy_(functional.silu(gate) * up)
    elif num_rows:
        _swiglu_kernel[(num_rows, -(-width // _BLOCK))](gate_up_M2I, out_MI, width, BLOCK=_BLOCK)


def swiglu_backward_(gate_up_M2I: Tensor, grad_MI: Tensor) -> None:
    """Replaces gate and up by their gradients, given that of the activation."""
    num_rows, width = grad_MI.shape
    if not grad_MI.is_cuda:
        gate, up = widened(gate_up_M2I).chunk(2, dim=-1)
        share = torch.sigmoid(gate)
        grad_gate = grad_MI * up * share * (1 + gate * (1 - share))
        gate_up_M2I.copy_(torch.cat((grad_gate, grad_MI * gate * share), dim=-1))
    elif num_rows:
        _swiglu_backward_kernel[(num_rows, -(-width // _BLOCK))](gate_up_M2I, grad_MI, width, BLOCK=_BLOCK)


@jit
def _swiglu_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


@jit
def _swiglu_backward_kernel(gate_up_ptr, grad_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_place = gate_up_ptr + row * 2 * width + column
    gate = tl.load(gate_place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_place + width, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(gate_place, grad * up * share * (1 + gate * (1 - share)), mask=inside)
    tl.store(gate_place + width, grad * gate * share, mask=inside)
