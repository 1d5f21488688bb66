"""Soft cross-entropy of one chunk of logits under the teacher, its gradient written over the logits.

Shape suffixes: C pairs of a chunk, M teacher rows, D draft vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eagle3.kernels import jit, tl, widened

_BLOCK = 2048


class RowStats(NamedTuple):
    """Of each row, in float32 or better: the largest logit, its column (int32, the lowest of equals), log-sum-exp."""

    max_M: Tensor
    argmax_M: Tensor
    lse_M: Tensor


def row_stats(logits_MD: Tensor) -> RowStats:
    """Finds them in one pass."""
    if not logits_MD.is_cuda:
        return RowStats(*row_max(logits_MD), widened(logits_MD).logsumexp(dim=-1))
    lse_M = torch.empty(len(logits_MD), dtype=torch.float32, device=logits_MD.device)
    return RowStats(*_row_max(logits_MD, lse_M), lse_M)


def row_max(logits_MD: Tensor) -> tuple[Tensor, Tensor]:
    """The first two of them, without an exponential."""
    if not logits_MD.is_cuda:
        max_M, argmax_M = widened(logits_MD).max(dim=-1)
        return max_M, argmax_M.int()
    return _row_max(logits_MD, None)


def _row_max(logits_MD: Tensor, lse_M: Tensor | None) -> tuple[Tensor, Tensor]:
    num_rows, width = logits_MD.shape
    max_M = torch.empty(num_rows, dtype=torch.float32, device=logits_MD.device)
    argmax_M = torch.empty_like(max_M, dtype=torch.int32)
    if num_rows:
        _row_max_kernel[(num_rows,)](
            *(logits_MD, lse_M, max_M, argmax_M, width), BLOCK=2 * _BLOCK, HAS_LSE=lse_M is not None, num_warps=8
        )
    return max_M, argmax_M


def soft_cross_entropy_(
    logits_CD: Tensor,
    teacher_MD: Tensor,
    teacher_lse_M: Tensor,
    *,
    teacher_C: Tensor,
    weight_C: Tensor,
    loss_C: Tensor,
    argmax_C: Tensor,
    grad_CD: Tensor | None = None,
    grad_factor: float = 1.0,
) -> None:
    """Scores a chunk: -weight * sum_v p_v log q_v, p the teacher's softmax and q the draft's.

    Args:
        logits_CD: The draft's logits; replaced by the gradient of the loss, unless it has a place of its own.
        teacher_MD: The teacher's logits of the draft vocabulary.
        teacher_lse_M: Their log-sum-exp.
        teacher_C: int32, the teacher row of each pair.
        weight_C: float32 or better, the weight of each pair.
        loss_C: Overwritten by the weighted loss.
        argmax_C: int32, overwritten by the draft's greedy token, the lowest of equal ones.
        grad_CD: Where the gradient goes, in any dtype; over the logits if None.
        grad_factor: What it is multiplied with.
    """
    grad_CD = logits_CD if grad_CD is None else grad_CD
    if not logits_CD.is_cuda:
        logits, rows_C = widened(logits_CD), teacher_C.long()
        p = (widened(teacher_MD[rows_C]) - teacher_lse_M[rows_C, None]).exp()
        log_q = logits.log_softmax(dim=-1)
        argmax_C.copy_(logits.argmax(dim=-1))
        loss_C.copy_(-weight_C * (p * log_q).sum(dim=-1))
        grad_CD.copy_((log_q.exp() - p) * (grad_factor * weight_C[:, None]))
    elif len(logits_CD):
        _soft_cross_entropy_kernel[(len(logits_CD),)](
            *(logits_CD, teacher_MD, teacher_lse_M, teacher_C, weight_C, loss_C, argmax_C),
            *(grad_CD, grad_factor, logits_CD.shape[1]),
            BLOCK=_BLOCK,
            num_warps=4,
        )


@jit
def _top_of(row_ptr, width, BLOCK: tl.constexpr, HAS_TOTAL: tl.constexpr):
    """The largest logit of a row, its column, and the sum of exp(logit - largest) where that is wanted."""
    column = tl.arange(0, BLOCK)
    top = float("-inf")
    best = 0
    total = 0.0
    for start in range(0, width, BLOCK):
        inside = start + column < width
        logits = tl.load(row_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        here = tl.max(logits, axis=0)
        # Few blocks hold a larger logit than all before; only these are searched for its column.
        if here > top:
            best = start + tl.min(tl.where(logits == here, column, BLOCK), axis=0)
            total = total * tl.exp(top - here)
            top = here
        if HAS_TOTAL:
            total += tl.sum(tl.exp(logits - top), axis=0)
    return top, best, total


@jit
def _row_max_kernel(logits_ptr, lse_ptr, max_ptr, argmax_ptr, width, BLOCK: tl.constexpr, HAS_LSE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top, best, total = _top_of(logits_ptr + row * width, width, BLOCK, HAS_LSE)
    if HAS_LSE:
        tl.store(lse_ptr + row, top + tl.log(total))
    tl.store(max_ptr + row, top)
    tl.store(argmax_ptr + row, best)


@jit
def _soft_cross_entropy_kernel(
    logits_ptr,
    teacher_ptr,
    teacher_lse_ptr,
    teacher_index_ptr,
    weight_ptr,
    loss_ptr,
    argmax_ptr,
    grad_ptr,
    grad_factor,
    width,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    top, best, total = _top_of(logits_ptr + pair * width, width, BLOCK, True)
    lse = top + tl.log(total)
    tl.store(argmax_ptr + pair, best)
    teacher_row = tl.load(teacher_index_ptr + pair).to(tl.int64)
    teacher_lse = tl.load(teacher_lse_ptr + teacher_row)
    weight = tl.load(weight_ptr + pair)
    expected = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        place = pair * width + start + column
        logits = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
        teacher = tl.load(teacher_ptr + teacher_row * width + start + column, mask=inside, other=float("-inf"))
        p = tl.exp(teacher.to(tl.float32) - teacher_lse)
        expected += tl.where(inside, p * logits, 0.0)
        grad = weight * (tl.exp(logits - lse) - p)
        tl.store(grad_ptr + place, (grad_factor * grad).to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + pair, weight * (lse - tl.sum(expected, axis=0)))
