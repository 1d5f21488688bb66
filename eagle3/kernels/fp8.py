"""Matrices in FP8 whose scales are powers of two, their products, and what makes them of wider numbers.

Numbers in FP8 have exponents of their own, so a scale need not be tight: one power of two for a whole weight or for a
row is enough, and multiplying by it rounds nothing. Hence a scale may move from a factor to the product, or from one
factor of a product over rows to the other, and libraries need to know no other scaling than that of whole matrices.
Formats: Micikevicius et al., arXiv 2209.05433. E4M3 where values stand near the largest of their row; E5M2, with less
precision and more range, for the gradients of logits, which span as much as a softmax does.

Shape suffixes: M rows, K and N columns, I intermediate width, U = M rounded up to what products ask for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eagle3.kernels import jit, tl, widened

_aten: Any = torch.ops.aten

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

#: Rows and columns of factors must be multiples of it.
ALIGNMENT = 16

#: The largest number of each format.
_LARGEST, LARGEST_E5M2 = 448.0, 57344.0

#: A row with nothing larger counts as one with this, so that scales and their products stay normal numbers.
_SMALLEST_PEAK = 2.0**-40

_BLOCK, _TILE = 4096, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """A matrix as FP8 numbers times a scale.

    Attributes:
        values_MK: The numbers.
        scale: float32 powers of two: a scalar, or one for each row (M, 1).
    """

    values_MK: Tensor
    scale: Tensor

    def rows(self, rows: slice) -> Scaled:
        """Some rows: a view."""
        return Scaled(values_MK=self.values_MK[rows], scale=self.scale[rows] if self.scale.dim() else self.scale)


def obstacle(device: torch.device) -> str | None:
    """Why a device has no products of FP8 numbers, as the end of a sentence; None if it has. The CPU imitates them."""
    if device.type != "cuda":
        return None
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has no FP8"
    if not hasattr(_aten, "_scaled_mm"):
        return f"torch {torch.__version__} has no _scaled_mm"
    return None


def factor_of(peak: Tensor) -> Tensor:
    """The largest power of two that numbers up to `peak` can be multiplied with and still fit into E4M3.

    Args:
        peak: Non-negative, of any shape.

    Returns:
        float32, of that shape. The scale of the numbers is its reciprocal.
    """
    factor = _LARGEST / peak.float().clamp(min=_SMALLEST_PEAK)
    # Of a float32 the bits of its exponent alone.
    return factor.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)


def quantise_rows(x_MK: Tensor, *, out: Scaled) -> None:
    """Writes a matrix to `out` as E4M3 numbers with a scale for each row."""
    num_rows, width = x_MK.shape
    if not x_MK.is_cuda:
        _quantise_rows_twin(x_MK, out)
    elif num_rows:
        _quantise_rows_kernel[(num_rows,)](
            x_MK, out.values_MK, out.scale, width, _LARGEST, _SMALLEST_PEAK, BLOCK=_BLOCK, num_warps=8
        )


def _quantise_rows_twin(x_MK: Tensor, out: Scaled) -> None:
    factor_M1 = factor_of(x_MK.abs().amax(dim=-1, keepdim=True))
    out.values_MK.copy_(x_MK * factor_M1)
    out.scale.copy_(1 / factor_M1)


def swiglu_rows(gate_up_M2I: Tensor, *, out: Scaled) -> None:
    """Writes silu(gate) * up to `out` as E4M3 numbers with a scale for each row."""
    num_rows, width = out.values_MK.shape
    if not gate_up_M2I.is_cuda:
        gate, up = widened(gate_up_M2I).chunk(2, dim=-1)
        _quantise_rows_twin(functional.silu(gate) * up, out)
    elif num_rows:
        _swiglu_rows_kernel[(num_rows,)](
            *(gate_up_M2I, out.values_MK, out.scale, width, _LARGEST, _SMALLEST_PEAK), BLOCK=_BLOCK, num_warps=8
        )


def swiglu_backward_rows(gate_up_M2I: Tensor, grad_MI: Tensor, grad_scale_M1: Tensor, *, out: Scaled) -> None:
    """Writes the gradients of gate and up to `out` as E4M3 numbers with a scale for each row of both.

    Args:
        gate_up_M2I: Of the forward pass, the gate first.
        grad_MI: Gradient of the activation, but for its scale.
        grad_scale_M1: float32; the gradient is the product of both.
        out: (M, 2I).
    """
    num_rows, width = grad_MI.shape
    if not gate_up_M2I.is_cuda:
        gate, up = widened(gate_up_M2I).chunk(2, dim=-1)
        grad, share = grad_MI * grad_scale_M1, torch.sigmoid(gate)
        both = torch.cat((grad * up * share * (1 + gate * (1 - share)), grad * gate * share), dim=-1)
        _quantise_rows_twin(both, out)
    elif num_rows:
        _swiglu_backward_rows_kernel[(num_rows,)](
            *(gate_up_M2I, grad_MI, grad_scale_M1, out.values_MK, out.scale),
            *(width, _LARGEST, _SMALLEST_PEAK),
            BLOCK=_BLOCK,
            num_warps=8,
        )


def quantise_weight(weight_NK: Tensor, factor: Tensor, *, out_NK: Tensor, transposed_KN: Tensor) -> None:
    """Writes a weight times a scalar `factor` as E4M3 numbers, and the same transposed."""
    num_rows, width = weight_NK.shape
    if not weight_NK.is_cuda:
        out_NK.copy_(weight_NK * factor)
        transposed_KN.copy_(out_NK.T)
    else:
        _quantise_weight_kernel[(-(-num_rows // _TILE), -(-width // _TILE))](
            *(weight_NK, factor, out_NK, transposed_KN, num_rows, width), TILE=_TILE, num_warps=8
        )


def aligned(number: int) -> int:
    """The number rounded up to a multiple of `ALIGNMENT`."""
    return number + -number % ALIGNMENT


def transpose(values_MK: Tensor, factor_M: Tensor | None = None, *, out_KU: Tensor) -> None:
    """Writes FP8 numbers transposed, behind them zeros up to the width of `out_KU`, whose rows need not be adjacent.

    Args:
        values_MK: The numbers.
        factor_M: float32 powers of two, at most 1, that the rows of E4M3 numbers are multiplied with; None for 1.
        out_KU: Of the same dtype.
    """
    num_rows, width = values_MK.shape
    num_columns = out_KU.shape[1]
    if not values_MK.is_cuda:
        # Arithmetic on FP8 numbers is that of float32, which holds them.
        wide_MK = values_MK.float() if factor_M is None else values_MK.float() * factor_M[:, None]
        out_KU.copy_(functional.pad(wide_MK.T, (0, num_columns - num_rows)))
    elif num_columns:
        assert factor_M is None or values_MK.dtype == E4M3
        _transpose_kernel[(-(-num_columns // _TILE), -(-width // _TILE))](
            *(values_MK.view(torch.uint8), factor_M, out_KU.view(torch.uint8)),
            *(num_rows, width, num_columns, out_KU.stride(0)),
            TILE=_TILE,
            HAS_FACTOR=factor_M is not None,
            num_warps=8,
        )


def transposed(values_MK: Tensor, factor_M: Tensor | None = None) -> Tensor:
    """What `transpose` writes, U columns wide, in a new tensor."""
    num_rows, width = values_MK.shape
    out_KU = values_MK.new_empty((width, aligned(num_rows)))
    transpose(values_MK, factor_M, out_KU=out_KU)
    return out_KU


def product(
    a: Scaled, b: Scaled, *, dtype: torch.dtype, with_row_scale: bool = True, out: Tensor | None = None
) -> Tensor:
    """Multiplies two matrices whose rows are both what is summed over: a @ b.T.

    Args:
        a: (M, K), K a multiple of `ALIGNMENT`.
        b: (N, K), N a multiple as well, with one scale. Not both may be E5M2.
        dtype: Of the product; on a GPU bfloat16.
        with_row_scale: Whether the scales of a's rows are part of the product, if it has one for each.
        out: (M, N), where the product goes; a new tensor if None.

    Returns:
        The product.
    """
    a_MK, b_NK = a.values_MK, b.values_MK
    if out is None:
        out = a_MK.new_empty((len(a_MK), len(b_NK)), dtype=dtype)
    if not a_MK.numel():
        return out.zero_()
    scale = a.scale if not a.scale.dim() else _one(b.scale.device)
    if a_MK.is_cuda:
        library_product(a_MK, b_NK, scale, b.scale, out=out)
    else:
        precise = torch.promote_types(torch.float32, dtype)
        torch.mul(a_MK.to(precise) @ b_NK.to(precise).T, scale * b.scale, out=out)
    # Powers of two round nothing here, and are themselves whole in any of these types.
    return out.mul_(a.scale.to(dtype)) if a.scale.dim() and with_row_scale else out


def library_product(a_MK: Tensor, b_NK: Tensor, scale_a: Tensor, scale_b: Tensor, *, out: Tensor) -> None:
    """Writes a @ b.T times two scalars to `out`; the one place that needs torch's private name."""
    _aten._scaled_mm.out(a_MK, b_NK.T, scale_a, scale_b, out_dtype=out.dtype, use_fast_accum=True, out=out)  # noqa: SLF001 - torch.nn.functional.scaled_mm has no `out`


def weight_gradient(a: Scaled, b: Scaled, *, out_NK: Tensor) -> None:
    """Writes a.T @ b, summed over the rows (M, N) and (M, K) of both, to `out_NK`."""
    num_rows = len(a.values_MK)
    if not num_rows:
        out_NK.zero_()
        return
    # The scales of the rows all go to the narrower one, the largest of them to the product.
    scale_M = (a.scale * b.scale).expand(num_rows, 1).squeeze(1)
    most = scale_M.max()
    factor_M = scale_M / most
    folds_a = a.values_MK.shape[1] < b.values_MK.shape[1]
    a_NU, b_KU = (transposed(x.values_MK, factor_M if folds else None) for x, folds in ((a, folds_a), (b, not folds_a)))
    one = Scaled(values_MK=a_NU, scale=_one(most.device))
    product(one, Scaled(values_MK=b_KU, scale=most), dtype=out_NK.dtype, out=out_NK)


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


@jit
def _factor(peak, largest, smallest):
    """As `factor_of`."""
    factor = largest / tl.maximum(peak, smallest)
    return (factor.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@jit
def _quantise_rows_kernel(x_ptr, out_ptr, scale_ptr, width, largest, smallest, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    peak = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        x = tl.load(x_ptr + row * width + start + column, mask=inside, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.abs(x))
    factor = _factor(tl.max(peak), largest, smallest)
    tl.store(scale_ptr + row, 1.0 / factor)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        x = tl.load(x_ptr + row * width + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * width + start + column, (x * factor).to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _swiglu_part(gate_up_ptr, width, column, inside):
    gate = tl.load(gate_up_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + width + column, mask=inside, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@jit
def _swiglu_rows_kernel(gate_up_ptr, out_ptr, scale_ptr, width, largest, smallest, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    gate_up_ptr += row * 2 * width
    column = tl.arange(0, BLOCK)
    peak = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        active = _swiglu_part(gate_up_ptr, width, start + column, start + column < width)
        peak = tl.maximum(peak, tl.abs(active))
    factor = _factor(tl.max(peak), largest, smallest)
    tl.store(scale_ptr + row, 1.0 / factor)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        active = _swiglu_part(gate_up_ptr, width, start + column, inside)
        tl.store(out_ptr + row * width + start + column, (active * factor).to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _swiglu_grads(gate_up_ptr, grad_ptr, grad_scale, width, column, inside):
    gate = tl.load(gate_up_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + width + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + column, mask=inside, other=0.0).to(tl.float32) * grad_scale
    share = tl.sigmoid(gate)
    return grad * up * share * (1 + gate * (1 - share)), grad * gate * share


@jit
def _swiglu_backward_rows_kernel(
    gate_up_ptr, grad_ptr, grad_scale_ptr, out_ptr, scale_ptr, width, largest, smallest, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    gate_up_ptr += row * 2 * width
    grad_ptr += row * width
    out_ptr += row * 2 * width
    grad_scale = tl.load(grad_scale_ptr + row)
    column = tl.arange(0, BLOCK)
    peak = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        grad_gate, grad_up = _swiglu_grads(gate_up_ptr, grad_ptr, grad_scale, width, start + column, inside)
        peak = tl.maximum(peak, tl.maximum(tl.abs(grad_gate), tl.abs(grad_up)))
    factor = _factor(tl.max(peak), largest, smallest)
    tl.store(scale_ptr + row, 1.0 / factor)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        grad_gate, grad_up = _swiglu_grads(gate_up_ptr, grad_ptr, grad_scale, width, start + column, inside)
        place = out_ptr + start + column
        tl.store(place, (grad_gate * factor).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(place + width, (grad_up * factor).to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _quantise_weight_kernel(weight_ptr, factor_ptr, out_ptr, transposed_ptr, num_rows, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    values = weight.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, values, mask=inside)
    tl.store(transposed_ptr + column[:, None] * num_rows + row[None, :], tl.trans(values), mask=tl.trans(inside))


@jit
def _transpose_kernel(
    values_ptr,
    factor_ptr,
    out_ptr,
    num_rows,
    width,
    num_columns,
    out_stride,
    TILE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    values = tl.load(values_ptr + row[:, None] * width + column[None, :], mask=inside, other=0)
    if HAS_FACTOR:
        factor = tl.load(factor_ptr + row, mask=row < num_rows, other=0.0)
        numbers = values.to(tl.float8e4nv, bitcast=True).to(tl.float32) * factor[:, None]
        values = numbers.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    fits = (column < width)[:, None] & (row < num_columns)[None, :]
    tl.store(out_ptr + column[:, None] * out_stride + row[None, :], tl.trans(values), mask=fits)
