"""Step 17: scores the draft's states against the teacher: losses without kept logits, and counts.

Shape suffixes: P (row, step) pairs, C pairs of one chunk, D draft vocabulary, H draft hidden, M teacher rows, S unroll
steps, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What the loss of a pair is.

    Written with p the target's probabilities of the draft vocabulary, p' the same made to sum to 1, q those of the
    draft, and a = sum_v min(p_v, q_v), the rate at which rejection sampling accepts the draft's token:

    - `soft_cross_entropy` (EAGLE-3, arXiv 2503.01840, section 3): -sum_v p'_v log q_v.
    - `lk_alpha` (LK losses, arXiv 2602.23881): -log a.
    - `lk_lambda` (the same paper): w KL(p' || q) + (1 - w) (1 - a) with w = exp(-lk_decay a), through which no gradient
      flows.

    A pair whose `a` underflows to 0 adds nothing to `lk_alpha`.

    Attributes:
        kind: One of the three.
        lk_decay: Of `lk_lambda`.
    """

    kind: Literal["soft_cross_entropy", "lk_alpha", "lk_lambda"] = "soft_cross_entropy"
    lk_decay: float = 3.0

    @property
    def needs_mass(self) -> bool:
        """Whether p is needed, of which the target's full distribution is a part."""
        return self.kind != "soft_cross_entropy"


SOFT_CROSS_ENTROPY = Objective()

#: Pairs whose logits exist at a time.
CHUNK = 2048


def head_loss(
    states_PH: Tensor,
    head_DH: Tensor,
    teacher_logits_MD: Tensor,
    teacher_index_P: Tensor,
    weight_P: Tensor,
    *,
    objective: Objective = SOFT_CROSS_ENTROPY,
    mass_M: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Sums the weighted losses of pairs of draft and teacher.

    Logits exist for one chunk of pairs at a time; gradients are computed in the forward pass and only scaled in the
    backward pass. Zero pairs give a zero loss whose gradients are zeros.

    Args:
        states_PH: The draft's states after its final norm.
        head_DH: The draft's head.
        teacher_logits_MD: The target's logits of the draft vocabulary.
        teacher_index_P: int64, the teacher row of each pair; several pairs may share one.
        weight_P: The weight of each pair.
        objective: The loss of a pair.
        mass_M: The share of the target's probability on the draft vocabulary, where the objective needs it.
        chunk_size: Pairs whose logits exist at a time.

    Returns:
        The sum of weight times loss, a scalar in float32 or better, and the draft's argmax per pair: (P,) int64, an
        index into the draft vocabulary, the lowest of equal logits.
    """
    assert mass_M is not None or not objective.needs_mass
    with_gradients = torch.is_grad_enabled() and (states_PH.requires_grad or head_DH.requires_grad)
    result = _HeadLoss.apply(  # type: ignore[no-untyped-call]  # torch annotates no Function.apply
        states_PH,
        head_DH,
        teacher_logits_MD,
        teacher_index_P,
        weight_P,
        mass_M,
        objective,
        chunk_size,
        with_gradients,
    )
    return cast("tuple[Tensor, Tensor]", result)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_PH: Tensor,
        head_DH: Tensor,
        teacher_logits_MD: Tensor,
        teacher_index_P: Tensor,
        weight_P: Tensor,
        mass_M: Tensor | None,
        objective: Objective,
        chunk_size: int,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        """Walks the chunks once, for the loss and, when asked, the gradients."""
        compute = _compute_dtype(states_PH)
        precise = torch.promote_types(torch.float32, compute)
        head = head_DH.to(compute)
        loss_P = weight_P.new_empty(len(states_PH), dtype=precise)
        argmax_P = teacher_index_P.new_empty(len(states_PH))
        # Chunks of bfloat16 products add up in float32: the small ones would vanish otherwise.
        grad_states = torch.empty_like(states_PH if with_gradients else states_PH[:0])
        grad_head = torch.zeros_like(head_DH if with_gradients else head_DH[:0], dtype=precise)
        # Autocast was applied by hand above, with one cast of the head for all chunks.
        with torch.autocast(states_PH.device.type, enabled=False):
            for start in range(0, len(states_PH), chunk_size):
                chunk = slice(start, start + chunk_size)
                states, index = states_PH[chunk].to(compute), teacher_index_P[chunk]
                logits = (states @ head.T).to(precise)
                argmax_P[chunk] = logits.argmax(dim=-1)
                teacher_logits = teacher_logits_MD[index].to(precise)
                mass = None if mass_M is None else mass_M[index, None].to(precise)
                weight = weight_P[chunk].to(precise)
                loss, grad_logits = _pair_losses(logits, teacher_logits, mass, objective)
                loss_P[chunk] = weight * loss
                if with_gradients:
                    grad_logits = grad_logits.mul_(weight[:, None]).to(compute)
                    grad_states[chunk] = grad_logits @ head
                    grad_head += grad_logits.T @ states
        if with_gradients:
            ctx.save_for_backward(grad_states, grad_head.to(head_DH.dtype))
        ctx.mark_non_differentiable(argmax_P)
        return loss_P.sum(), argmax_P

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides parameter names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Scales the gradients that the forward pass left; the argmax has none."""
        grad_loss = grad_outputs[0]
        grad_states, grad_head = ctx.saved_tensors
        return (
            grad_states * grad_loss.to(grad_states.dtype) if ctx.needs_input_grad[0] else None,
            grad_head * grad_loss.to(grad_head.dtype) if ctx.needs_input_grad[1] else None,
            *[None] * 7,
        )


def _pair_losses(
    logits_CD: Tensor, teacher_logits_CD: Tensor, mass_C1: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each pair, (C,), and its gradient by the draft's logits, (C, D), both new."""
    log_q_CD = logits_CD.log_softmax(dim=-1)
    if mass_C1 is None or not objective.needs_mass:
        p_CD = teacher_logits_CD.softmax(dim=-1)
        return -(p_CD * log_q_CD).sum(dim=-1), log_q_CD.exp_().sub_(p_CD)
    log_p_CD, q_CD = teacher_logits_CD.log_softmax(dim=-1), log_q_CD.exp()
    p_CD = log_p_CD.exp()
    true_p_CD = p_CD * mass_C1
    accepted_C1 = torch.minimum(true_p_CD, q_CD).sum(dim=-1, keepdim=True)
    # Of min(p, q) only the part below p follows q, and q sums to 1: its gradient is that of a softmax.
    rising_CD = q_CD * (q_CD < true_p_CD)
    grad_accepted_CD = rising_CD - q_CD * rising_CD.sum(dim=-1, keepdim=True)
    if objective.kind == "lk_alpha":
        alive_C1 = accepted_C1 > 0
        loss_C1 = torch.where(alive_C1, -accepted_C1.log(), 0.0)
        return loss_C1.squeeze(-1), grad_accepted_CD * torch.where(alive_C1, -1 / accepted_C1, 0.0)
    divergence_C1 = (p_CD * (log_p_CD - log_q_CD)).sum(dim=-1, keepdim=True)
    share_C1 = (-objective.lk_decay * accepted_C1).exp()
    loss_C1 = share_C1 * divergence_C1 + (1 - share_C1) * (1 - accepted_C1)
    return loss_C1.squeeze(-1), share_C1 * (q_CD - p_CD) - (1 - share_C1) * grad_accepted_CD


def _compute_dtype(states_PH: Tensor) -> torch.dtype:
    """Says in which dtype the matrix products run: autocast's where it is on, else that of the states."""
    device = states_PH.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states_PH.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """How often the draft's greedy token was the target's, per step; sums over batches and ranks by `+`.

    Each field is (S,) int64.

    Attributes:
        supervised: Pairs that are supervised, also those whose target token lies outside the draft vocabulary.
        hits: Of `supervised`, the pairs where the draft's token is the target's.
        chain_rows: Rows that are supervised at this and every earlier step.
        chain_hits: Of `chain_rows`, the rows that hit at this and every earlier step.
    """

    supervised: Tensor
    hits: Tensor
    chain_rows: Tensor
    chain_hits: Tensor

    @classmethod
    def count(cls, supervised_SN: Tensor, hits_SN: Tensor) -> StepCounts:
        """Counts pairs from two bool tensors; a hit that is not supervised does not count."""
        hits_SN = hits_SN & supervised_SN
        return cls(
            supervised=supervised_SN.sum(dim=1),
            hits=hits_SN.sum(dim=1),
            chain_rows=supervised_SN.long().cumprod(dim=0).sum(dim=1),
            chain_hits=hits_SN.long().cumprod(dim=0).sum(dim=1),
        )

    @classmethod
    def from_tensor(cls, counts_4S: Tensor) -> StepCounts:
        """Reads what `as_tensor` wrote; the fields are views."""
        return cls(**{field.name: row for field, row in zip(fields(cls), counts_4S, strict=True)})

    def as_tensor(self) -> Tensor:
        """Returns all counts as one new (4, S) int64 tensor, for an all-reduce."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts.from_tensor(self.as_tensor() + other.as_tensor())

    def accuracy(self) -> list[float]:
        """Returns hits / supervised per step; 0 where nothing is supervised."""
        return ratios(self.hits.tolist(), self.supervised.tolist())

    def accepted(self) -> list[float]:
        """Returns chain_hits / chain_rows per step: how often a greedy chain is accepted up to it; 0 without rows."""
        return ratios(self.chain_hits.tolist(), self.chain_rows.tolist())

    def accept_length(self) -> float:
        """Returns how many tokens of a greedy chain of S drafts the target accepts on average, from 0 to S.

        Counts joint prefixes: a product of per-step accuracies would be wrong, because steps of a row correlate.
        """
        return sum(self.accepted())


def ratios(parts: Sequence[int], wholes: Sequence[int]) -> list[float]:
    """Divides each part by its whole; 0 where there is nothing."""
    return [part / whole if whole else 0.0 for part, whole in zip(parts, wholes, strict=True)]
