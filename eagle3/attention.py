"""Step 18: attends from the rows that carry loss to the step-0 keys before them and to their own keys of later steps.

Shape suffixes: B batch, T tokens, N rows that carry loss, Q query heads, K key and value heads, G = Q / K query heads
that share a key head, d head dimension, J later steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def row_attention(
    q_NQd: Tensor,
    k0_BTKd: Tensor,
    v0_BTKd: Tensor,
    *,
    same_row_k: Sequence[Tensor],
    same_row_v: Sequence[Tensor],
    rows_N: Tensor,
    starts_N: Tensor | None = None,
) -> Tensor:
    """Computes the attention of one step of the training-time test (EAGLE-3, arXiv 2503.01840, figure 6).

    The row of token t sees the step-0 keys of its own document up to token t, and of the later steps only the keys of
    its own row. One softmax runs over all of them, in float32 or better. Sequences are right-padded, so no key that
    a real row sees is padding.

    Args:
        q_NQd: Rotated queries of this step.
        k0_BTKd: Rotated step-0 keys of all rows.
        v0_BTKd: Step-0 values of all rows.
        same_row_k: For each step from 1 to this one, the rotated keys of the rows, (N, K, d).
        same_row_v: The values that belong to `same_row_k`.
        rows_N: int64, ascending: b * T + t of each row.
        starts_N: int64, the t of the first token of each row's document; None if every sequence is one document.

    Returns:
        (N, Q, d), in the dtype of `q_NQd`.
    """
    num_sequences, num_tokens, num_kv_heads, _ = k0_BTKd.shape
    per_sequence = torch.bincount(rows_N // num_tokens, minlength=num_sequences).tolist()
    q_NKGd = q_NQd.unflatten(1, (num_kv_heads, -1))
    time_T = torch.arange(num_tokens, device=rows_N.device)
    visible_NT = time_T <= (rows_N % num_tokens)[:, None]
    if starts_N is not None:
        visible_NT &= time_T >= starts_N[:, None]
    attended = [
        _attend(*parts)
        for parts in zip(
            q_NKGd.split(per_sequence),
            k0_BTKd,
            v0_BTKd,
            _stack(same_row_k, like=q_NKGd).split(per_sequence),
            _stack(same_row_v, like=q_NKGd).split(per_sequence),
            visible_NT.split(per_sequence),
            strict=True,
        )
    ]
    return torch.cat(attended).flatten(1, 2)


def _stack(steps: Sequence[Tensor], *, like: Tensor) -> Tensor:
    """Lays the steps of each row side by side: (N, J, K, d), with J = 0 at step 0."""
    if steps:
        return torch.stack(tuple(steps), dim=1)
    num_rows, num_kv_heads, _, head_dim = like.shape
    return like.new_empty((num_rows, 0, num_kv_heads, head_dim))


def _attend(
    q_NKGd: Tensor, k0_TKd: Tensor, v0_TKd: Tensor, same_k_NJKd: Tensor, same_v_NJKd: Tensor, visible_NT: Tensor
) -> Tensor:
    """Attends within one sequence. Rows may be none: the graph still reaches keys and values."""
    num_tokens, _, head_dim = k0_TKd.shape
    causal = torch.einsum("nkgd,tkd->nkgt", q_NKGd, k0_TKd).masked_fill(~visible_NT[:, None, None, :], -torch.inf)
    same_row = torch.einsum("nkgd,njkd->nkgj", q_NKGd, same_k_NJKd)
    precise = torch.promote_types(torch.float32, q_NKGd.dtype)
    scores = torch.cat((causal, same_row), dim=-1).to(precise) * head_dim**-0.5
    weights = scores.softmax(dim=-1).to(q_NKGd.dtype)
    from_causal = torch.einsum("nkgt,tkd->nkgd", weights[..., :num_tokens], v0_TKd)
    return from_causal + torch.einsum("nkgj,njkd->nkgd", weights[..., num_tokens:], same_v_NJKd)
