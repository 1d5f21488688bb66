"""What is computed row by row, with its gradients: RMS norms that end a residual addition, and the gated activation.

Shape suffixes: M rows, H width, R rows of a gathered or scattered tensor, G partial sums over rows, I intermediate
width. Gate and up stand side by side: (M, 2I), the gate first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from eagle3.kernels import jit, next_power_of_2, tl, widened

#: Rows are shared out over this many programs where sums over rows are needed: two per multiprocessor of an H200.
_NUM_PROGRAMS = 264
_SWIGLU_BLOCK = 1024


def weight_gradient_parts(device: torch.device) -> int:
    """G: how many partial sums over rows the gradient of a norm's weight consists of on a device."""
    return _NUM_PROGRAMS if device.type == "cuda" else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondNorm:
    """A further norm of the same rows, whose results stand elsewhere.

    Attributes:
        weight_H: Its weight.
        out_RH: Where its results go, or where the gradient of its results is read.
        index_M: int32, the row of `out_RH` that belongs to each row; -1 for none.
        grad_weight_GH: The gradient of its weight is added to it; None in the forward pass.
    """

    weight_H: Tensor
    out_RH: Tensor
    index_M: Tensor
    grad_weight_GH: Tensor | None = None


def add_rms_norm(
    x_MH: Tensor,
    add_MH: Tensor | None,
    weight_H: Tensor,
    *,
    eps: float,
    second: SecondNorm | None = None,
    out_MH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds, and norms the sum.

    Args:
        x_MH: The residual stream.
        add_MH: What is added to it; None for nothing.
        weight_H: Weight of the norm.
        eps: Added to the mean square.
        second: Another norm of the same sum, written to its own place.
        out_MH: Where the norm goes, in any dtype; a new tensor if None.

    Returns:
        The sum (`x_MH` itself if nothing is added) and its norm, (M, H) each, in the dtype of `x_MH`.
    """
    if not x_MH.is_cuda:
        sum_MH = x_MH if add_MH is None else x_MH + add_MH
        hat_MH = _normed(sum_MH, eps)
        if second is not None:
            used_M = second.index_M >= 0
            second_RH = hat_MH[used_M] * second.weight_H
            second.out_RH[second.index_M[used_M].long()] = second_RH.to(second.out_RH.dtype)
        normed_MH = hat_MH * weight_H
        return sum_MH, normed_MH.to(sum_MH.dtype) if out_MH is None else out_MH.copy_(normed_MH)
    num_rows, width = x_MH.shape
    sum_MH = x_MH if add_MH is None else torch.empty_like(x_MH)
    normed_MH = torch.empty_like(x_MH) if out_MH is None else out_MH
    if num_rows:
        _add_rms_norm_kernel[(num_rows,)](
            *(x_MH, add_MH, sum_MH, normed_MH, weight_H),
            *((second.weight_H, second.out_RH, second.index_M) if second else (None, None, None)),
            *(width, eps),
            BLOCK=next_power_of_2(width),
            HAS_ADD=add_MH is not None,
            HAS_SECOND=second is not None,
            num_warps=8,
        )
    return sum_MH, normed_MH


def _normed(x_MH: Tensor, eps: float) -> Tensor:
    x_MH = widened(x_MH)
    return x_MH * torch.rsqrt(x_MH.square().mean(dim=-1, keepdim=True) + eps)


@jit
def _add_rms_norm_kernel(
    x_ptr,
    add_ptr,
    sum_ptr,
    normed_ptr,
    weight_ptr,
    second_weight_ptr,
    second_out_ptr,
    second_index_ptr,
    width,
    eps,
    BLOCK: tl.constexpr,
    HAS_ADD: tl.constexpr,
    HAS_SECOND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADD:
        x += tl.load(add_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row * width + column, x, mask=inside)
        # The norm sees the sum as it is kept.
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
    hat = x * tl.rsqrt(tl.sum(x * x) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * width + column, hat * weight, mask=inside)
    if HAS_SECOND:
        place = tl.load(second_index_ptr + row).to(tl.int64)
        if place >= 0:
            second_weight = tl.load(second_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(second_out_ptr + place * width + column, hat * second_weight, mask=inside)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGradients:
    """Gradients that exist only for some of the rows.

    Attributes:
        normed_RH: Added to the gradient of the norm's result.
        sum_RH: Added to the gradient of the sum itself.
        index_M: int32, the row of both that belongs to each row; -1 for none.
    """

    normed_RH: Tensor
    sum_RH: Tensor
    index_M: Tensor


def rms_norm_backward(
    x_MH: Tensor,
    grad_normed_MH: Tensor | None,
    weight_H: Tensor,
    grad_weight_GH: Tensor,
    *,
    eps: float,
    grad_sum_MH: Tensor | None = None,
    second: SecondNorm | None = None,
    rows: RowGradients | None = None,
    out_MH: Tensor | None = None,
) -> Tensor:
    """The gradient of `add_rms_norm` with respect to the sum and to the weights of its norms.

    Args:
        x_MH: The sum that was normed.
        grad_normed_MH: Gradient of the norm's result; None for zero.
        weight_H: Weight of the norm.
        grad_weight_GH: float32 or better; the gradient of the weight is added to it, in `weight_gradient_parts` parts
            whose sum is meant, so that the uses of a norm are summed up once.
        eps: As in the forward pass.
        grad_sum_MH: Gradient that reaches the sum past the norm; None for zero.
        second: The second norm of the forward pass, `out_RH` now its result's gradient.
        rows: Further gradients of some rows.
        out_MH: Where the gradient of the sum goes; a new tensor if None.

    Returns:
        The gradient of the sum, (M, H).
    """
    if not x_MH.is_cuda:
        return _rms_norm_backward_twin(
            x_MH, grad_normed_MH, weight_H, grad_weight_GH, eps, grad_sum_MH, second, rows, out_MH
        )
    num_rows, width = x_MH.shape
    grad_MH = torch.empty_like(x_MH) if out_MH is None else out_MH
    if num_rows:
        _rms_norm_backward_kernel[(min(_NUM_PROGRAMS, num_rows),)](
            *(x_MH, grad_normed_MH, grad_sum_MH, weight_H, grad_MH, grad_weight_GH),
            *((second.weight_H, second.out_RH, second.index_M, second.grad_weight_GH) if second else (None,) * 4),
            *((rows.normed_RH, rows.sum_RH, rows.index_M) if rows else (None,) * 3),
            *(num_rows, width, eps),
            BLOCK=next_power_of_2(width),
            HAS_NORMED=grad_normed_MH is not None,
            HAS_SUM=grad_sum_MH is not None,
            HAS_SECOND=second is not None,
            HAS_ROWS=rows is not None,
            num_warps=8,
        )
    return grad_MH


def _rms_norm_backward_twin(
    x_MH: Tensor,
    grad_normed_MH: Tensor | None,
    weight_H: Tensor,
    grad_weight_GH: Tensor,
    eps: float,
    grad_sum_MH: Tensor | None,
    second: SecondNorm | None,
    rows: RowGradients | None,
    out_MH: Tensor | None,
) -> Tensor:
    precise = torch.promote_types(torch.float32, x_MH.dtype)
    x = x_MH.to(precise)
    rstd_M1 = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    hat_MH = x * rstd_M1
    grad_normed = torch.zeros_like(x) if grad_normed_MH is None else grad_normed_MH.to(precise)
    grad_sum = torch.zeros_like(x) if grad_sum_MH is None else grad_sum_MH.to(precise)
    if rows is not None:
        grad_normed = grad_normed + _gather(rows.normed_RH, rows.index_M).to(precise)
        grad_sum = grad_sum + _gather(rows.sum_RH, rows.index_M).to(precise)
    grad_hat = grad_normed * weight_H.to(precise)
    grad_weight_GH[0] += (grad_normed * hat_MH).sum(dim=0)
    if second is not None:
        assert second.grad_weight_GH is not None
        grad_second = _gather(second.out_RH, second.index_M).to(precise)
        grad_hat = grad_hat + grad_second * second.weight_H.to(precise)
        second.grad_weight_GH[0] += (grad_second * hat_MH).sum(dim=0)
    grad = grad_sum + rstd_M1 * (grad_hat - hat_MH * (grad_hat * hat_MH).mean(dim=-1, keepdim=True))
    return grad.to(x_MH.dtype) if out_MH is None else out_MH.copy_(grad)


def _gather(values_RH: Tensor, index_M: Tensor) -> Tensor:
    """The row of each index, zeros for -1."""
    if not len(values_RH):
        return values_RH.new_zeros((len(index_M), values_RH.shape[1]))
    return values_RH[index_M.long().clamp(min=0)] * (index_M >= 0)[:, None]


@jit
def _rms_norm_backward_kernel(
    x_ptr,
    grad_normed_ptr,
    grad_sum_ptr,
    weight_ptr,
    grad_ptr,
    grad_weight_ptr,
    second_weight_ptr,
    second_grad_ptr,
    second_index_ptr,
    grad_second_weight_ptr,
    rows_normed_ptr,
    rows_sum_ptr,
    rows_index_ptr,
    num_rows,
    width,
    eps,
    BLOCK: tl.constexpr,
    HAS_NORMED: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    # Each program adds to its own part, so the order of the sums is fixed.
    own = program * width + column
    grad_weight = tl.load(grad_weight_ptr + own, mask=inside, other=0.0)
    grad_second_weight = grad_weight
    second_weight = weight
    if HAS_SECOND:
        grad_second_weight = tl.load(grad_second_weight_ptr + own, mask=inside, other=0.0)
        second_weight = tl.load(second_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for index in range(program, num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x) / width + eps)
        hat = x * rstd
        grad_normed = tl.zeros((BLOCK,), dtype=tl.float32)
        grad_sum = tl.zeros((BLOCK,), dtype=tl.float32)
        if HAS_NORMED:
            grad_normed += tl.load(grad_normed_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_SUM:
            grad_sum += tl.load(grad_sum_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_ROWS:
            place = tl.load(rows_index_ptr + row).to(tl.int64)
            used = inside & (place >= 0)
            grad_normed += tl.load(rows_normed_ptr + place * width + column, mask=used, other=0.0).to(tl.float32)
            grad_sum += tl.load(rows_sum_ptr + place * width + column, mask=used, other=0.0).to(tl.float32)
        grad_hat = grad_normed * weight
        grad_weight += grad_normed * hat
        if HAS_SECOND:
            place = tl.load(second_index_ptr + row).to(tl.int64)
            used = inside & (place >= 0)
            grad_second = tl.load(second_grad_ptr + place * width + column, mask=used, other=0.0).to(tl.float32)
            grad_hat += grad_second * second_weight
            grad_second_weight += grad_second * hat
        grad = grad_sum + rstd * (grad_hat - hat * (tl.sum(grad_hat * hat) / width))
        tl.store(grad_ptr + row * width + column, grad, mask=inside)
    tl.store(grad_weight_ptr + own, grad_weight, mask=inside)
    if HAS_SECOND:
        tl.store(grad_second_weight_ptr + own, grad_second_weight, mask=inside)


def swiglu(gate_up_M2I: Tensor, *, out_MI: Tensor) -> None:
    """Writes silu(gate) * up to `out_MI`."""
    num_rows, width = out_MI.shape
    if not out_MI.is_cuda:
        gate, up = widened(gate_up_M2I).chunk(2, dim=-1)
        out_MI.copy_(functional.silu(gate) * up)
    elif num_rows:
        _swiglu_kernel[(num_rows, -(-width // _SWIGLU_BLOCK))](gate_up_M2I, out_MI, width, BLOCK=_SWIGLU_BLOCK)


def swiglu_backward_(gate_up_M2I: Tensor, grad_MI: Tensor) -> None:
    """Replaces gate and up by their gradients, given that of the activation."""
    num_rows, width = grad_MI.shape
    if not grad_MI.is_cuda:
        gate, up = widened(gate_up_M2I).chunk(2, dim=-1)
        share = torch.sigmoid(gate)
        grad_gate = grad_MI * up * share * (1 + gate * (1 - share))
        gate_up_M2I.copy_(torch.cat((grad_gate, grad_MI * gate * share), dim=-1))
    elif num_rows:
        _swiglu_backward_kernel[(num_rows, -(-width // _SWIGLU_BLOCK))](
            gate_up_M2I, grad_MI, width, BLOCK=_SWIGLU_BLOCK
        )


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
