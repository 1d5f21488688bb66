"""Causal attention with its log-sum-exp, and a backward pass that takes both from outside.

No public function of torch returns a log-sum-exp that can be merged and handed back (the one it returns is cut from
the graph), so these call the operators beneath `scaled_dot_product_attention`: cuDNN, the fastest measured; flash where
results must repeat to the bit, or where a row holds several documents. On other devices a twin in plain torch.

Shape suffixes: B sequences, T tokens, L = BT, Q query heads, K key and value heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

_aten: Any = torch.ops.aten
_cudnn_forward = _aten._scaled_dot_product_cudnn_attention  # noqa: SLF001 - beneath the public function, see above
_cudnn_backward = _aten._scaled_dot_product_cudnn_attention_backward  # noqa: SLF001
_flash_forward = _aten._flash_attention_forward  # noqa: SLF001
_flash_backward = _aten._flash_attention_backward  # noqa: SLF001


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Where causal attention starts anew: sequences, or the documents packed into them.

    Attributes:
        starts: int32, on the device of the tensors: the first token of each segment, and L at the end.
        longest: Tokens of the longest.
        num_sequences: B, if every segment is a sequence of T tokens; None if not.
    """

    starts: Tensor
    longest: int
    num_sequences: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalResult:
    """What the forward pass leaves for the backward pass; output and log-sum-exp may be updated in place between.

    Attributes:
        q_LQd: The queries as they were given, as are the next four.
        k_LKd: Keys.
        v_LKd: Values.
        segments: Where attention starts anew.
        scale: Multiplies the dot products.
        out_LQd: The attended values.
        lse_BQT: The natural log-sum-exp of the scores, float32 or better, contiguous; B is 1 where segments are packed.
        saved: The operator's own.
    """

    q_LQd: Tensor
    k_LKd: Tensor
    v_LKd: Tensor
    segments: Segments
    scale: float
    out_LQd: Tensor
    lse_BQT: Tensor
    saved: tuple[Any, ...]


def takes_heads(size: int, device: torch.device, *, deterministic: bool) -> bool:
    """Whether a GPU has kernels for heads of a size, in bfloat16 and with gradients."""
    heads = torch.empty(1, 1, 64, size, device=device, dtype=torch.bfloat16, requires_grad=True)
    attention = SDPAParams(heads, heads, heads, None, 0.0, True, False)
    return can_use_flash_attention(attention) and (deterministic or can_use_cudnn_attention(attention))


def causal_attention(
    q_LQd: Tensor, k_LKd: Tensor, v_LKd: Tensor, segments: Segments, *, scale: float, deterministic: bool
) -> CausalResult:
    """Attends each token to itself and those before it in its segment.

    Args:
        q_LQd: Rotated queries.
        k_LKd: Rotated keys.
        v_LKd: Values.
        segments: Where attention starts anew.
        scale: Multiplies the dot products.
        deterministic: Use an operator whose backward pass can repeat to the bit.
    """
    given: dict[str, Any] = {"q_LQd": q_LQd, "k_LKd": k_LKd, "v_LKd": v_LKd, "segments": segments, "scale": scale}
    if not q_LQd.is_cuda:
        out, lse = _twin(**given)
        return CausalResult(**given, out_LQd=out, lse_BQT=lse[None], saved=("twin",))
    if segments.num_sequences is None or deterministic:
        out, lse, *saved = _flash_forward(
            *(q_LQd, k_LKd, v_LKd, segments.starts, segments.starts, segments.longest, segments.longest),
            *(0.0, True, False),
            scale=scale,
        )
        return CausalResult(**given, out_LQd=out, lse_BQT=lse[None], saved=("flash", *saved[:2]))
    q, k, v = (_by_head(x, segments.num_sequences) for x in (q_LQd, k_LKd, v_LKd))
    out, lse, *saved = _cudnn_forward(q, k, v, None, True, 0.0, True, False, scale=scale)
    # A view on the operator's own memory, which its backward pass reads again.
    out_LQd = out.transpose(1, 2).view(q_LQd.shape)
    return CausalResult(**given, out_LQd=out_LQd, lse_BQT=lse.view(q.shape[:3]), saved=("cudnn", *saved[:6]))


def causal_attention_backward(grad_out_LQd: Tensor, result: CausalResult) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, each like its tensor.

    With an output and a log-sum-exp into which further keys were merged they are those of the causal part of the
    merged attention: exp(score - lse) is then the share that a causal key has among all.
    """
    kind, *saved = result.saved
    segments = result.segments
    if kind == "twin":
        return _twin_backward(grad_out_LQd, result)
    if kind == "flash":
        rng_state, unused = saved
        grads = _flash_backward(
            *(grad_out_LQd, result.q_LQd, result.k_LKd, result.v_LKd, result.out_LQd, result.lse_BQT[0]),
            *(segments.starts, segments.starts, segments.longest, segments.longest, 0.0, True, rng_state, unused),
            scale=result.scale,
        )
        return grads[0], grads[1], grads[2]
    assert segments.num_sequences is not None
    cum_q, cum_k, max_q, max_k, seed, offset = saved
    grad_out, q, k, v, out = (
        _by_head(x, segments.num_sequences)
        for x in (grad_out_LQd, result.q_LQd, result.k_LKd, result.v_LKd, result.out_LQd)
    )
    grads = _cudnn_backward(
        *(grad_out, q, k, v, out, result.lse_BQT[..., None], seed, offset, None, cum_q, cum_k, max_q, max_k),
        *(0.0, True),
        scale=result.scale,
    )
    grad_q, grad_k, grad_v = (grad.transpose(1, 2).flatten(0, 1) for grad in grads)
    return grad_q, grad_k, grad_v


def _by_head(x_LHd: Tensor, num_sequences: int) -> Tensor:
    """A view (B, heads, T, d), as cuDNN takes it."""
    by_sequence: Tensor = x_LHd.unflatten(0, (num_sequences, -1))
    return by_sequence.transpose(1, 2)


def _parts(segments: Segments) -> list[slice]:
    starts = segments.starts.tolist()
    return [slice(start, end) for start, end in pairwise(starts)]


def _scores(q_TQd: Tensor, k_TKd: Tensor, scale: float, precise: torch.dtype) -> Tensor:
    """Masked scores (K, G, T, T) of one segment."""
    q_TKGd = q_TQd.unflatten(1, (k_TKd.shape[1], -1)).to(precise)
    scores = torch.einsum("tkgd,skd->kgts", q_TKGd, k_TKd.to(precise)) * scale
    ahead_TT = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(ahead_TT, -torch.inf)


def _twin(q_LQd: Tensor, k_LKd: Tensor, v_LKd: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(torch.float32, q_LQd.dtype)
    out_LQd = torch.empty_like(q_LQd)
    lse_QL = torch.empty((q_LQd.shape[1], len(q_LQd)), dtype=precise, device=q_LQd.device)
    for part in _parts(segments):
        scores = _scores(q_LQd[part], k_LKd[part], scale, precise)
        lse = scores.logsumexp(dim=-1)
        lse_QL[:, part] = lse.flatten(0, 1)
        attended = torch.einsum("kgts,skd->tkgd", (scores - lse[..., None]).exp(), v_LKd[part].to(precise))
        out_LQd[part] = attended.flatten(1, 2).to(q_LQd.dtype)
    return out_LQd, lse_QL


def _twin_backward(grad_out_LQd: Tensor, result: CausalResult) -> tuple[Tensor, Tensor, Tensor]:
    q_LQd, k_LKd, v_LKd, scale = result.q_LQd, result.k_LKd, result.v_LKd, result.scale
    precise = result.lse_BQT.dtype
    num_keys = k_LKd.shape[1]
    grad_q, grad_k, grad_v = torch.zeros_like(q_LQd), torch.zeros_like(k_LKd), torch.zeros_like(v_LKd)
    for part in _parts(result.segments):
        grad_out, out, q = (
            x[part].unflatten(1, (num_keys, -1)).to(precise) for x in (grad_out_LQd, result.out_LQd, q_LQd)
        )
        lse = result.lse_BQT[0, :, part].unflatten(0, (num_keys, -1))
        shares = (_scores(q_LQd[part], k_LKd[part], scale, precise) - lse[..., None]).exp()
        delta = (grad_out * out).sum(dim=-1).permute(1, 2, 0)
        grad_shares = torch.einsum("tkgd,skd->kgts", grad_out, v_LKd[part].to(precise))
        grad_scores = shares * (grad_shares - delta[..., None]) * scale
        grad_q[part] = torch.einsum("kgts,skd->tkgd", grad_scores, k_LKd[part].to(precise)).flatten(1, 2).to(q.dtype)
        grad_k[part] = torch.einsum("kgts,tkgd->skd", grad_scores, q).to(k_LKd.dtype)
        grad_v[part] = torch.einsum("kgts,tkgd->skd", shares, grad_out).to(v_LKd.dtype)
    return grad_q, grad_k, grad_v
