"""Step 23: what the fused step keeps on its way forward, and the gradients on its way back.

Shape suffixes: L = BT tokens of the batch, N rows that carry loss, S steps, J = S - 1 later steps, H draft hidden, W
projected width, U = 2K * d, Q query heads, K key and value heads, d head dimension, G partial sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eagle3.flat import FlatWeights
from eagle3.kernels.causal import CausalResult
from eagle3.kernels.heads import Heads
from eagle3.kernels.rowwise import weight_gradient_parts
from eagle3.layers import Fp8Head, Fp8Mlp, Head, Mlp, head_of, mlp_of
from eagle3.pairs import PairPlan


@dataclass(slots=True, kw_only=True)
class NormGradients:
    """Gradients of the norms' weights in parts (G, H), float32 or better, to which every use of a norm adds."""

    input_GH: Tensor
    hidden_GH: Tensor
    post_GH: Tensor
    final_GH: Tensor

    @classmethod
    def allocate(cls, states: Tensor) -> NormGradients:
        """Zeros for norms of states (..., H), on their device."""
        precise = torch.promote_types(torch.float32, states.dtype)
        size = (4, weight_gradient_parts(states.device), states.shape[-1])
        return cls(**dict(zip(cls.__slots__, states.new_zeros(size, dtype=precise).unbind(), strict=True)))


@dataclass(slots=True, kw_only=True)
class Tape:
    """What the forward pass keeps. Steps are stacked where one product over all of them makes a weight's gradient."""

    embedded_LH: Tensor
    tokens_LH: Tensor
    first_LH: Tensor
    first_normed_LH: Tensor
    k0_LKd: Tensor
    v0_LKd: Tensor
    q_SLQd: Tensor
    own_k_JNKd: Tensor
    own_v_JNKd: Tensor
    attended_SNQd: Tensor
    normed_SNH: Tensor
    mlp: Mlp | Fp8Mlp
    head: Head | Fp8Head
    attention: list[CausalResult]
    middle_NH: list[Tensor]
    state_NH: list[Tensor]

    @classmethod
    def allocate(cls, plan: PairPlan, weights: FlatWeights, heads: Heads, *, largest_weight: float) -> Tape:
        """An empty tape for a batch, on the device and in the dtype of the weights' copies."""
        num_steps, num_rows = plan.token_SN.shape
        num_all, num_pairs = len(plan.position_L), len(plan.step_P)
        hidden = len(weights.copies.down_HI)
        q_heads, kv_heads = (heads.num_queries, heads.head_dim), (heads.num_keys, heads.head_dim)
        new = weights.copy.new_empty
        none = new(0)
        return cls(
            embedded_LH=none,
            tokens_LH=none,
            first_LH=none,
            first_normed_LH=none,
            k0_LKd=new((num_all, *kv_heads)),
            v0_LKd=new((num_all, *kv_heads)),
            # Queries of rows without loss must be numbers: times a zero gradient they reach every key.
            q_SLQd=weights.copy.new_zeros((num_steps, num_all, *q_heads)),
            own_k_JNKd=new((num_steps - 1, num_rows, *kv_heads)),
            own_v_JNKd=new((num_steps - 1, num_rows, *kv_heads)),
            attended_SNQd=new((num_steps, num_rows, *q_heads)),
            normed_SNH=new((num_steps, num_rows, hidden)),
            mlp=mlp_of(weights, num_steps=num_steps, num_rows=num_rows),
            head=head_of(weights, num_pairs=num_pairs, largest_weight=largest_weight),
            attention=[],
            middle_NH=[],
            state_NH=[],
        )


@dataclass(slots=True, kw_only=True)
class TapeGradients:
    """Gradients on their way back, laid out as in `Tape`; those of keys and values add up over steps in float32.

    `normed_NH` is that of the rows' first normed states, known once all steps are behind.
    """

    norms: NormGradients
    normed_NH: Tensor
    middle_SNH: Tensor
    projected_SNW: Tensor
    attended_LQd: Tensor
    q_NQd: Tensor
    k0_LKd: Tensor
    v0_LKd: Tensor
    own_k_JNKd: Tensor
    own_v_JNKd: Tensor
    first_LU: Tensor

    @classmethod
    def allocate(cls, tape: Tape) -> TapeGradients:
        """Zeros where gradients add up, and room for the others."""
        num_steps, num_rows, num_queries, head_dim = tape.attended_SNQd.shape
        num_all, num_keys, _ = tape.k0_LKd.shape
        precise = torch.promote_types(torch.float32, tape.k0_LKd.dtype)
        width = (num_queries + 2 * num_keys) * head_dim
        return cls(
            norms=NormGradients.allocate(tape.normed_SNH),
            normed_NH=tape.normed_SNH.new_empty(0),
            middle_SNH=torch.empty_like(tape.normed_SNH),
            projected_SNW=tape.normed_SNH.new_empty((num_steps, num_rows, width)),
            attended_LQd=torch.zeros_like(tape.q_SLQd[0]),
            q_NQd=torch.empty_like(tape.attended_SNQd[0]),
            k0_LKd=torch.zeros_like(tape.k0_LKd, dtype=precise),
            v0_LKd=torch.zeros_like(tape.v0_LKd, dtype=precise),
            own_k_JNKd=torch.zeros_like(tape.own_k_JNKd, dtype=precise),
            own_v_JNKd=torch.zeros_like(tape.own_v_JNKd, dtype=precise),
            first_LU=tape.normed_SNH.new_empty((num_all, 2 * num_keys * head_dim)),
        )
