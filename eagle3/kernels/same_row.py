"""The keys that a row wrote at its own later steps, merged into a causal attention by its log-sum-exp.

The causal part is the library's kernel. A later step adds a few keys that only their own row sees: one dot product
each. Given the merged output and log-sum-exp, the library's backward kernel yields the exact gradients of the causal
part, and the keys of the row get theirs here.

Shape suffixes: N rows, L = BT all tokens, Q query heads, K key and value heads, d head dimension, J later steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle3.kernels import jit, next_power_of_2, tl
from eagle3.kernels.causal import CausalResult


def merge_same_row_(
    attended: CausalResult, *, k_JNKd: Tensor, v_JNKd: Tensor, row_N: Tensor, gathered_NQd: Tensor
) -> None:
    """Adds each row's own keys to its softmax; the merged output and log-sum-exp replace those of the causal part.

    Args:
        attended: The causal attention; output and log-sum-exp are updated at the rows.
        k_JNKd: Rotated keys of the row's steps 1 to J; J may be 0.
        v_JNKd: Their values.
        row_N: int32, the place of each row among all tokens.
        gathered_NQd: Overwritten by the merged output of the rows.
    """
    q_LQd, out_LQd, lse_BQT, scale = attended.q_LQd, attended.out_LQd, attended.lse_BQT, attended.scale
    num_later, num_rows, num_keys, head_dim = k_JNKd.shape
    group = q_LQd.shape[1] // num_keys
    if not q_LQd.is_cuda:
        rows, precise = row_N.long(), lse_BQT.dtype
        q_NKGd = q_LQd[rows].unflatten(1, (num_keys, group)).to(precise)
        scores_JNKG = torch.einsum("nkgd,jnkd->jnkg", q_NKGd, k_JNKd.to(precise)) * scale
        sequence, time = rows // lse_BQT.shape[2], rows % lse_BQT.shape[2]
        lse_NKG = lse_BQT[sequence, :, time].unflatten(1, (num_keys, group))
        merged_NKG = torch.cat((lse_NKG[None], scores_JNKG)).logsumexp(dim=0)
        out_NKGd = out_LQd[rows].unflatten(1, (num_keys, group)) * (lse_NKG - merged_NKG).exp()[..., None]
        out_NKGd = out_NKGd + torch.einsum("jnkg,jnkd->nkgd", (scores_JNKG - merged_NKG).exp(), v_JNKd.to(precise))
        gathered_NQd.copy_(out_NKGd.flatten(1, 2))
        out_LQd[rows] = gathered_NQd
        lse_BQT[sequence, :, time] = merged_NKG.flatten(1, 2)
        return
    if num_rows:
        _merge_kernel[(num_rows, num_keys)](
            *(q_LQd, out_LQd, lse_BQT, k_JNKd, v_JNKd, row_N, gathered_NQd),
            *(lse_BQT.stride(0), lse_BQT.shape[2], num_rows, scale, num_later),
            KEYS=num_keys,
            GROUP=group,
            DIM=head_dim,
            GROUP_BLOCK=next_power_of_2(group),
            DIM_BLOCK=next_power_of_2(head_dim),
            num_warps=2,
        )


@jit
def _merge_kernel(
    q_ptr,
    out_ptr,
    lse_ptr,
    k_ptr,
    v_ptr,
    row_ptr,
    gathered_ptr,
    lse_stride,
    num_tokens,
    num_rows,
    scale,
    num_later,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1)
    row = tl.load(row_ptr + n).to(tl.int64)
    in_group = tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    is_head = in_group < GROUP
    is_dim = dim < DIM
    inside = is_head[:, None] & is_dim[None, :]
    head = key_head * GROUP + in_group
    within = head[:, None] * DIM + dim[None, :]
    full = row * KEYS * GROUP * DIM + within
    q = tl.load(q_ptr + full, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + full, mask=inside, other=0.0).to(tl.float32)
    lse_place = lse_ptr + row // num_tokens * lse_stride + head * num_tokens + row % num_tokens
    lse = tl.load(lse_place, mask=is_head, other=0.0)
    for j in range(num_later):
        own = ((j * num_rows + n) * KEYS + key_head) * DIM + dim
        k = tl.load(k_ptr + own, mask=is_dim, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + own, mask=is_dim, other=0.0).to(tl.float32)
        score = tl.sum(q * k[None, :], axis=1) * scale
        largest = tl.maximum(lse, score)
        merged = largest + tl.log(tl.exp(lse - largest) + tl.exp(score - largest))
        out = out * tl.exp(lse - merged)[:, None] + v[None, :] * tl.exp(score - merged)[:, None]
        lse = merged
    tl.store(out_ptr + full, out, mask=inside)
    tl.store(gathered_ptr + n * KEYS * GROUP * DIM + within, out, mask=inside)
    tl.store(lse_place, lse, mask=is_head)


def same_row_backward_(
    merged: CausalResult,
    grad_q_LQd: Tensor,
    *,
    out_NQd: Tensor,
    grad_out_NQd: Tensor,
    k_JNKd: Tensor,
    v_JNKd: Tensor,
    grad_k_JNKd: Tensor,
    grad_v_JNKd: Tensor,
    row_N: Tensor,
    grad_q_NQd: Tensor,
) -> None:
    """The gradients that flow through a row's own keys.

    Args:
        merged: What `merge_same_row_` made of the causal attention.
        grad_q_LQd: Gradient of the queries through the causal part, read at the rows.
        out_NQd: The merged output of the rows.
        grad_out_NQd: Its gradient.
        k_JNKd: Keys of the row's steps 1 to J.
        v_JNKd: Their values.
        grad_k_JNKd: float32 or better; the gradient of the keys is added to it.
        grad_v_JNKd: Likewise of the values.
        row_N: int32, the place of each row among all tokens.
        grad_q_NQd: Overwritten by the whole gradient of the rows' queries, both parts.
    """
    q_LQd, lse_BQT, scale = merged.q_LQd, merged.lse_BQT, merged.scale
    num_later, num_rows, num_keys, head_dim = k_JNKd.shape
    group = q_LQd.shape[1] // num_keys
    if not q_LQd.is_cuda:
        rows, precise = row_N.long(), lse_BQT.dtype
        heads = (num_keys, group)
        q_NKGd = q_LQd[rows].unflatten(1, heads).to(precise)
        grad_out_NKGd = grad_out_NQd.unflatten(1, heads).to(precise)
        delta_NKG = (grad_out_NKGd * out_NQd.unflatten(1, heads)).sum(dim=-1)
        scores_JNKG = torch.einsum("nkgd,jnkd->jnkg", q_NKGd, k_JNKd.to(precise)) * scale
        lse_NQ = lse_BQT[rows // lse_BQT.shape[2], :, rows % lse_BQT.shape[2]]
        share_JNKG = (scores_JNKG - lse_NQ.unflatten(1, heads)).exp()
        grad_share_JNKG = torch.einsum("nkgd,jnkd->jnkg", grad_out_NKGd, v_JNKd.to(precise))
        grad_scores_JNKG = share_JNKG * (grad_share_JNKG - delta_NKG) * scale
        grad_q_NKGd = torch.einsum("jnkg,jnkd->nkgd", grad_scores_JNKG, k_JNKd.to(precise))
        grad_q_NQd.copy_(grad_q_LQd[rows] + grad_q_NKGd.flatten(1, 2))
        grad_k_JNKd += torch.einsum("jnkg,nkgd->jnkd", grad_scores_JNKG, q_NKGd)
        grad_v_JNKd += torch.einsum("jnkg,nkgd->jnkd", share_JNKG, grad_out_NKGd)
        return
    if num_rows:
        _same_row_backward_kernel[(num_rows, num_keys)](
            *(q_LQd, grad_q_LQd, lse_BQT, out_NQd, grad_out_NQd, k_JNKd, v_JNKd, grad_k_JNKd, grad_v_JNKd),
            *(row_N, grad_q_NQd, lse_BQT.stride(0), lse_BQT.shape[2], num_rows, scale, num_later),
            KEYS=num_keys,
            GROUP=group,
            DIM=head_dim,
            LATER_BLOCK=next_power_of_2(max(num_later, 1)),
            DIM_BLOCK=next_power_of_2(head_dim),
            num_warps=1,
        )


@jit
def _same_row_backward_kernel(
    q_ptr,
    grad_q_causal_ptr,
    lse_ptr,
    out_ptr,
    grad_out_ptr,
    k_ptr,
    v_ptr,
    grad_k_ptr,
    grad_v_ptr,
    row_ptr,
    grad_q_ptr,
    lse_stride,
    num_tokens,
    num_rows,
    scale,
    num_later,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    LATER_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1)
    row = tl.load(row_ptr + n).to(tl.int64)
    # Everything is a tile of (later steps, dimensions), so that no value changes its layout among threads and all later
    # steps are loaded at once. What has no step is the same in every line of the tile, or stands in its first.
    later = tl.arange(0, LATER_BLOCK)[:, None]
    dim = tl.arange(0, DIM_BLOCK)[None, :]
    is_dim = (dim < DIM) & (later >= 0)
    is_own = (dim < DIM) & (later < num_later)
    is_first = (dim < DIM) & (later == 0)
    own = ((later * num_rows + n) * KEYS + key_head) * DIM + dim
    k = tl.load(k_ptr + own, mask=is_own, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + own, mask=is_own, other=0.0).to(tl.float32)
    grad_k = tl.load(grad_k_ptr + own, mask=is_own, other=0.0)
    grad_v = tl.load(grad_v_ptr + own, mask=is_own, other=0.0)
    for in_group in tl.static_range(GROUP):
        head = key_head * GROUP + in_group
        within = head * DIM + dim + 0 * later
        full = row * KEYS * GROUP * DIM + within
        here = n * KEYS * GROUP * DIM + within
        q = tl.load(q_ptr + full, mask=is_dim, other=0.0).to(tl.float32)
        grad_out = tl.load(grad_out_ptr + here, mask=is_dim, other=0.0).to(tl.float32)
        out = tl.load(out_ptr + here, mask=is_first, other=0.0).to(tl.float32)
        grad_q = tl.load(grad_q_causal_ptr + full, mask=is_first, other=0.0).to(tl.float32)
        lse = tl.load(lse_ptr + row // num_tokens * lse_stride + head * num_tokens + row % num_tokens)
        delta = tl.sum(tl.sum(grad_out * out, axis=1), axis=0)
        share = tl.where(later < num_later, tl.exp(tl.sum(q * k, axis=1, keep_dims=True) * scale - lse), 0.0)
        grad_score = share * (tl.sum(grad_out * v, axis=1, keep_dims=True) - delta) * scale
        grad_q = tl.sum(grad_q + grad_score * k, axis=0, keep_dims=True) + 0.0 * later
        tl.store(grad_q_ptr + here, grad_q, mask=is_first)
        grad_k += grad_score * q
        grad_v += share * grad_out
    tl.store(grad_k_ptr + own, grad_k, mask=is_own)
    tl.store(grad_v_ptr + own, grad_v, mask=is_own)
