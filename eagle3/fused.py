"""Step 23: the unrolled step of the draft by hand: forward, loss and every gradient, without autograd.

The same numbers as `TrainingTimeTest` under autograd, to rounding, in about half the time on a GPU: the half of
queries, keys and values that depends on the token alone is computed once per token; each weight's gradient is one
product over all steps; attention over all rows is the library's kernel, into which a row's own later keys are merged.

Shape suffixes: L = BT tokens of the batch, N rows that carry loss, S steps, P pairs, M teacher rows, H draft hidden,
A captured states, I intermediate, W projected width, Q query heads, K key and value heads, d head dimension, D draft
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from eagle3.draft import Draft
from eagle3.flat import FlatWeights
from eagle3.kernels.causal import CausalResult, causal_attention, causal_attention_backward
from eagle3.kernels.heads import Angles, HeadLayout, place_keys_values, place_queries, sum_by_token, unrotate_
from eagle3.kernels.norms import RowGradients, SecondNorm, add_rms_norm, rms_norm_backward
from eagle3.kernels.same_row import merge_same_row_, same_row_backward_
from eagle3.kernels.soft_ce import row_stats, soft_cross_entropy_
from eagle3.kernels.swiglu import swiglu, swiglu_backward_
from eagle3.loss import StepCounts
from eagle3.pairs import PairPlan
from eagle3.teacher import Teacher
from eagle3.unroll import UnrollResult

#: Pairs whose logits exist at a time. Larger gains nothing and costs memory (8192 pairs of 32000 logits: 0.5 GB).
_CHUNK = 8192


class FusedStep:
    """Computes the sums of a batch and adds nothing up: gradients overwrite those of the batch before.

    Args:
        draft: Without the options of EAGLE-3.1. Its frozen embedding is read in place.
        weights: Of that draft.
        num_steps: Steps of the unroll.
        decay: Step i weighs decay ** i.
        deterministic: Let results repeat to the bit, at the price of a slower attention.
    """

    def __init__(
        self, draft: Draft, weights: FlatWeights, *, num_steps: int, decay: float = 0.8, deterministic: bool = False
    ) -> None:
        config = draft.config
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self._draft = draft
        self._weights = weights
        self._num_steps = num_steps
        self._deterministic = deterministic
        self._eps = config.rms_norm_eps
        self._scale = config.head_dim**-0.5
        self._layout = HeadLayout(
            num_queries=config.num_attention_heads, num_keys=config.num_key_value_heads, head_dim=config.head_dim
        )
        precise = torch.promote_types(torch.float32, weights.copy.dtype)
        weight_S = decay ** torch.arange(num_steps, dtype=precise, device=weights.copy.device)
        # One more, for pairs that only fill up a fixed shape.
        self._weight_S = functional.pad(weight_S, (0, 1))
        self._target_ids_D: Tensor | None = None
        self._angles: Angles | None = None

    def __call__(
        self,
        plan: PairPlan,
        input_ids_L: Tensor,
        aux_LA: Tensor,
        teacher: Teacher,
        *,
        with_gradients: bool = True,
        on_head_gradient: Callable[[], None] | None = None,
    ) -> UnrollResult:
        """Runs one batch.

        Args:
            plan: On the device of the weights.
            input_ids_L: int64 token ids.
            aux_LA: The target's captured states, in the dtype of the copies.
            teacher: What the target says at the plan's teacher rows.
            with_gradients: Whether to write `weights.grad`; without, it is left alone.
            on_head_gradient: Called once the gradient of the head is there, long before the others are.

        Returns:
            The sums; the gradient of `loss_sum` is in `weights.grad`.
        """
        with torch.no_grad():
            tape = self._unroll(plan, input_ids_L, aux_LA)
            result = self._score(plan, tape.normed_PH, teacher, with_gradients=with_gradients)
            if with_gradients:
                if on_head_gradient is not None:
                    on_head_gradient()
                self._backward(plan, tape, aux_LA)
        return result

    def _w(self, name: str) -> Tensor:
        return self._weights.view(self._weights.copy, name)

    def _grad(self, name: str) -> Tensor:
        return self._weights.view(self._weights.grad, name)

    def _angles_up_to(self, num_positions: int) -> Angles:
        if self._angles is None or len(self._angles.cos) < num_positions:
            positions = torch.arange(num_positions, device=self._weights.copy.device)
            cos, sin = self._draft.rope_angles(positions, dtype=self._weight_S.dtype)
            self._angles = Angles(cos=cos, sin=sin)
        return self._angles

    def _unroll(self, plan: PairPlan, input_ids_L: Tensor, aux_LA: Tensor) -> _Tape:
        """Runs all steps and keeps what their gradients need."""
        layout, eps, num_steps = self._layout, self._eps, self._num_steps
        tape = _Tape.allocate(plan, num_steps, self._w("midlayer.mlp.down_proj.weight"), layout)
        angles = self._angles_up_to(len(plan.position_L) + num_steps)
        qkv_W2H = self._weights.fused(self._weights.copy, "qkv")
        width = qkv_W2H.shape[1] // 2
        token_half, state_half = qkv_W2H[:, :width], qkv_W2H[:, width:]
        num_q = layout.num_queries * layout.head_dim
        norms = {
            "hidden": self._w("midlayer.hidden_norm.weight"),
            "post": self._w("midlayer.post_attention_layernorm.weight"),
            "final": self._w("norm.weight"),
        }
        embedding_VH = self._draft.embed_tokens.weight
        tape.embedded_LH = embedding_VH.index_select(0, input_ids_L).to(aux_LA.dtype)
        _, tape.tokens_LH = add_rms_norm(tape.embedded_LH, None, self._w("midlayer.input_layernorm.weight"), eps=eps)
        token_LW = tape.tokens_LH @ token_half.T
        tape.first_LH = aux_LA @ self._w("fc.weight").T
        _, tape.first_normed_LH = add_rms_norm(tape.first_LH, None, norms["hidden"], eps=eps)
        place_keys_values(
            tape.first_normed_LH @ state_half[num_q:].T,
            token_LW,
            *(tape.k0_LKd, tape.v0_LKd),
            token_M=plan.next_L,
            position_M=plan.position_L,
            angles=angles,
            layout=layout,
        )
        state_NH = tape.first_LH.index_select(0, plan.row_N)
        torch.index_select(tape.first_normed_LH, 0, plan.row_N, out=tape.normed_SNH[0])
        for step in range(num_steps):
            position_N = plan.position_N + step
            half = state_half[:num_q] if step == 0 else state_half
            projected_NW = tape.normed_SNH[step] @ half.T
            place_queries(
                projected_NW,
                token_LW,
                tape.q_SLQd[step],
                token_M=plan.token_SN[step],
                position_M=position_N,
                row_M=plan.row_N,
                angles=angles,
                layout=layout,
            )
            if step > 0:
                place_keys_values(
                    projected_NW,
                    token_LW,
                    *(tape.own_k_JNKd[step - 1], tape.own_v_JNKd[step - 1]),
                    token_M=plan.token_SN[step],
                    position_M=position_N,
                    angles=angles,
                    layout=layout,
                )
            attended = causal_attention(
                *(tape.q_SLQd[step], tape.k0_LKd, tape.v0_LKd, plan.segments),
                scale=self._scale,
                deterministic=self._deterministic,
            )
            merge_same_row_(
                *(tape.q_SLQd[step], attended.out_LQd, attended.lse_BQT),
                k_JNKd=tape.own_k_JNKd[:step],
                v_JNKd=tape.own_v_JNKd[:step],
                row_N=plan.row_N,
                scale=self._scale,
                gathered_NQd=tape.attended_SNQd[step],
            )
            tape.attention.append(attended)
            added_NH = tape.attended_SNQd[step].flatten(1) @ self._w("midlayer.self_attn.o_proj.weight").T
            middle_NH, _ = add_rms_norm(state_NH, added_NH, norms["post"], eps=eps, out_MH=tape.post_SNH[step])
            torch.mm(tape.post_SNH[step], self._gate_up().T, out=tape.gate_up_SN2I[step])
            swiglu(tape.gate_up_SN2I[step], out_MI=tape.active_SNI[step])
            added_NH = tape.active_SNI[step] @ self._w("midlayer.mlp.down_proj.weight").T
            # The states of the last step have no next step to be normed for; that norm goes nowhere.
            state_NH, _ = add_rms_norm(
                middle_NH,
                added_NH,
                norms["hidden"],
                eps=eps,
                second=SecondNorm(weight_H=norms["final"], out_RH=tape.normed_PH, index_M=plan.pair_SN[step]),
                out_MH=tape.normed_SNH[step + 1] if step + 1 < num_steps else None,
            )
            tape.middle_NH.append(middle_NH)
            tape.state_NH.append(state_NH)
        return tape

    def _gate_up(self) -> Tensor:
        return self._weights.fused(self._weights.copy, "gate_up")

    def _score(self, plan: PairPlan, normed_PH: Tensor, teacher: Teacher, *, with_gradients: bool) -> UnrollResult:
        """Scores all pairs chunk by chunk; the gradient of `normed_PH` replaces it."""
        head_DH, grad_head_DH = self._w("lm_head.weight"), self._grad("lm_head.weight")
        if self._target_ids_D is None:
            self._target_ids_D = self._draft.target_ids()
        weight_P = self._weight_S[plan.step_P] * teacher.in_vocab_M[plan.teacher_P]
        loss_P = torch.empty_like(weight_P)
        argmax_P = torch.empty_like(plan.teacher_P)
        lse_M = teacher.lse_M if teacher.lse_M is not None else row_stats(teacher.logits_MD).lse_M
        if with_gradients and not len(normed_PH):
            grad_head_DH.zero_()
        for start in range(0, len(normed_PH), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            logits_CD = normed_PH[chunk] @ head_DH.T
            soft_cross_entropy_(
                logits_CD,
                teacher.logits_MD,
                lse_M,
                teacher_C=plan.teacher_P[chunk],
                weight_C=weight_P[chunk],
                loss_C=loss_P[chunk],
                argmax_C=argmax_P[chunk],
            )
            if not with_gradients:
                continue
            if start == 0:
                torch.mm(logits_CD.T, normed_PH[chunk], out=grad_head_DH)
            else:
                grad_head_DH.addmm_(logits_CD.T, normed_PH[chunk])
            torch.mm(logits_CD, head_DH, out=normed_PH[chunk])
        hit_P = self._target_ids_D[argmax_P] == teacher.argmax_M[plan.teacher_P]
        hit_P &= teacher.in_vocab_M[plan.teacher_P]
        # One more element, for the pairs that are none.
        hit_P = torch.cat((hit_P, hit_P.new_zeros(1)))
        counts = StepCounts.count(plan.supervised_SN.bool(), hit_P[plan.pair_SN])
        return UnrollResult(loss_sum=loss_P.sum(), weight_sum=weight_P.sum(), counts=counts)

    def _backward(self, plan: PairPlan, tape: _Tape, aux_LA: Tensor) -> None:
        """Writes every gradient but the head's."""
        layout, eps = self._layout, self._eps
        angles = self._angles_up_to(0)
        qkv_W2H, grad_qkv_W2H = (self._weights.fused(b, "qkv") for b in (self._weights.copy, self._weights.grad))
        width = qkv_W2H.shape[1] // 2
        state_half = qkv_W2H[:, width:]
        num_q = layout.num_queries * layout.head_dim
        hidden, post = self._w("midlayer.hidden_norm.weight"), self._w("midlayer.post_attention_layernorm.weight")
        final, o_proj = self._w("norm.weight"), self._w("midlayer.self_attn.o_proj.weight")
        grads = _NormGradients()
        back = _Back.allocate(tape)
        grad_normed_NH: Tensor | None = None
        grad_state_NH: Tensor | None = None
        for step in reversed(range(self._num_steps)):
            second = SecondNorm(weight_H=final, out_RH=tape.normed_PH, index_M=plan.pair_SN[step])
            _, grad_hidden_H, grad_final_H = rms_norm_backward(
                *(tape.state_NH.pop(), grad_normed_NH, hidden),
                eps=eps,
                grad_sum_MH=grad_state_NH,
                second=second,
                out_MH=back.state_SNH[step],
            )
            grads.add("hidden", grad_hidden_H)
            grads.add("final", grad_final_H)
            grad_active_NI = back.state_SNH[step] @ self._w("midlayer.mlp.down_proj.weight")
            swiglu_backward_(tape.gate_up_SN2I[step], grad_active_NI)
            _, grad_post_H, _ = rms_norm_backward(
                *(tape.middle_NH.pop(), tape.gate_up_SN2I[step] @ self._gate_up(), post),
                eps=eps,
                grad_sum_MH=back.state_SNH[step],
                out_MH=back.middle_SNH[step],
            )
            grads.add("post", grad_post_H)
            grad_attended_NQd = (back.middle_SNH[step] @ o_proj).unflatten(1, (-1, layout.head_dim))
            self._attention_backward(plan, tape, back, grad_attended_NQd, step)
            unrotate_(
                back.projected_SNW[step],
                queries_MQd=back.q_NQd,
                keys_MKd=back.own_k_JNKd[step - 1] if step else None,
                values_MKd=back.own_v_JNKd[step - 1] if step else None,
                position_M=plan.position_N + step,
                angles=angles,
                layout=layout,
            )
            if step:
                grad_normed_NH = back.projected_SNW[step] @ state_half
            else:
                grad_normed_NH = back.projected_SNW[0, :, :num_q] @ state_half[:num_q]
            grad_state_NH = back.middle_SNH[step]
        assert grad_normed_NH is not None
        assert grad_state_NH is not None
        unrotate_(
            back.first_LU,
            queries_MQd=None,
            keys_MKd=back.k0_LKd,
            values_MKd=back.v0_LKd,
            position_M=plan.position_L,
            angles=angles,
            layout=layout,
        )
        grad_first_LH, grad_hidden_H, _ = rms_norm_backward(
            *(tape.first_LH, back.first_LU @ state_half[num_q:], hidden),
            eps=eps,
            rows=RowGradients(normed_RH=grad_normed_NH, sum_RH=grad_state_NH, index_M=plan.row_of_token_L),
        )
        grads.add("hidden", grad_hidden_H)
        torch.mm(grad_first_LH.T, aux_LA, out=self._grad("fc.weight"))
        self._token_half_backward(plan, tape, back, grads)
        self._weight_gradients(tape, back, grad_qkv_W2H[:, width:], num_q)
        for name, kind in (
            ("norm", "final"),
            ("midlayer.hidden_norm", "hidden"),
            ("midlayer.input_layernorm", "input"),
            ("midlayer.post_attention_layernorm", "post"),
        ):
            self._grad(f"{name}.weight").copy_(grads.of(kind))

    def _attention_backward(
        self, plan: PairPlan, tape: _Tape, back: _Back, grad_attended_NQd: Tensor, step: int
    ) -> None:
        # Rows that are not among the plan's stay zero over all steps; those that are get written in each.
        back.attended_LQd.index_copy_(0, plan.row_N.long(), grad_attended_NQd)
        attended = tape.attention.pop()
        grad_q_LQd, grad_k_LKd, grad_v_LKd = causal_attention_backward(
            *(back.attended_LQd, tape.q_SLQd[step], tape.k0_LKd, tape.v0_LKd, attended, plan.segments),
            scale=self._scale,
        )
        back.k0_LKd += grad_k_LKd
        back.v0_LKd += grad_v_LKd
        same_row_backward_(
            *(tape.q_SLQd[step], grad_q_LQd, attended.lse_BQT),
            out_NQd=tape.attended_SNQd[step],
            grad_out_NQd=grad_attended_NQd,
            k_JNKd=tape.own_k_JNKd[:step],
            v_JNKd=tape.own_v_JNKd[:step],
            grad_k_JNKd=back.own_k_JNKd[:step],
            grad_v_JNKd=back.own_v_JNKd[:step],
            row_N=plan.row_N,
            scale=self._scale,
            grad_q_NQd=back.q_NQd,
        )

    def _token_half_backward(self, plan: PairPlan, tape: _Tape, back: _Back, grads: _NormGradients) -> None:
        """Gradients of the token's half of queries, keys and values, and of the norm of the embeddings."""
        qkv_W2H, grad_qkv_W2H = (self._weights.fused(b, "qkv") for b in (self._weights.copy, self._weights.grad))
        width = qkv_W2H.shape[1] // 2
        grad_token_LW = sum_by_token(
            back.projected_SNW, back.first_LU, row_of_token_L=plan.row_of_token_L, time_L=plan.position_L
        )
        torch.mm(grad_token_LW.T, tape.tokens_LH, out=grad_qkv_W2H[:, :width])
        _, grad_input_H, _ = rms_norm_backward(
            *(tape.embedded_LH, grad_token_LW @ qkv_W2H[:, :width], self._w("midlayer.input_layernorm.weight")),
            eps=self._eps,
        )
        grads.add("input", grad_input_H)

    def _weight_gradients(self, tape: _Tape, back: _Back, grad_state_half: Tensor, num_q: int) -> None:
        """One product over all steps for each weight."""
        projected_XW, normed_XH = back.projected_SNW.flatten(0, 1), tape.normed_SNH.flatten(0, 1)
        torch.mm(projected_XW[:, :num_q].T, normed_XH, out=grad_state_half[:num_q])
        torch.mm(back.first_LU.T, tape.first_normed_LH, out=grad_state_half[num_q:])
        later_XW, later_XH = back.projected_SNW[1:].flatten(0, 1), tape.normed_SNH[1:].flatten(0, 1)
        grad_state_half[num_q:].addmm_(later_XW[:, num_q:].T, later_XH)
        grad_gate_up = self._weights.fused(self._weights.grad, "gate_up")
        torch.mm(tape.gate_up_SN2I.flatten(0, 1).T, tape.post_SNH.flatten(0, 1), out=grad_gate_up)
        for name, grad_SNX, input_SNX in (
            ("midlayer.mlp.down_proj.weight", back.state_SNH, tape.active_SNI),
            ("midlayer.self_attn.o_proj.weight", back.middle_SNH, tape.attended_SNQd.flatten(2)),
        ):
            torch.mm(grad_SNX.flatten(0, 1).T, input_SNX.flatten(0, 1), out=self._grad(name))


class _NormGradients:
    """Gradients of the norms' weights, added up in float32 or better."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, kind: str, grad_H: Tensor | None) -> None:
        assert grad_H is not None
        self._sums[kind] = self._sums[kind] + grad_H if kind in self._sums else grad_H

    def of(self, kind: str) -> Tensor:
        return self._sums[kind]


@dataclass(slots=True, kw_only=True)
class _Tape:
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
    post_SNH: Tensor
    gate_up_SN2I: Tensor
    active_SNI: Tensor
    normed_PH: Tensor
    attention: list[CausalResult]
    middle_NH: list[Tensor]
    state_NH: list[Tensor]

    @classmethod
    def allocate(cls, plan: PairPlan, num_steps: int, down_HI: Tensor, layout: HeadLayout) -> _Tape:
        hidden, intermediate = down_HI.shape
        num_all, num_rows, num_pairs = len(plan.position_L), len(plan.row_N), len(plan.step_P)
        q_heads, kv_heads = (layout.num_queries, layout.head_dim), (layout.num_keys, layout.head_dim)
        new = down_HI.new_empty
        none = new(0)
        return cls(
            embedded_LH=none,
            tokens_LH=none,
            first_LH=none,
            first_normed_LH=none,
            k0_LKd=new((num_all, *kv_heads)),
            v0_LKd=new((num_all, *kv_heads)),
            # Queries of rows without loss must be numbers: times a zero gradient they reach every key.
            q_SLQd=down_HI.new_zeros((num_steps, num_all, *q_heads)),
            own_k_JNKd=new((num_steps - 1, num_rows, *kv_heads)),
            own_v_JNKd=new((num_steps - 1, num_rows, *kv_heads)),
            attended_SNQd=new((num_steps, num_rows, *q_heads)),
            normed_SNH=new((num_steps, num_rows, hidden)),
            post_SNH=new((num_steps, num_rows, hidden)),
            gate_up_SN2I=new((num_steps, num_rows, 2 * intermediate)),
            active_SNI=new((num_steps, num_rows, intermediate)),
            # Pairs without a row must be numbers, too.
            normed_PH=down_HI.new_zeros((num_pairs, hidden)),
            attention=[],
            middle_NH=[],
            state_NH=[],
        )


@dataclass(slots=True, kw_only=True)
class _Back:
    """Gradients on their way back, laid out as in `_Tape`; those of keys and values add up over steps in float32."""

    state_SNH: Tensor
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
    def allocate(cls, tape: _Tape) -> _Back:
        num_steps, num_rows, num_queries, head_dim = tape.attended_SNQd.shape
        num_all, num_keys, _ = tape.k0_LKd.shape
        precise = torch.promote_types(torch.float32, tape.k0_LKd.dtype)
        width = (num_queries + 2 * num_keys) * head_dim
        return cls(
            state_SNH=torch.empty_like(tape.post_SNH),
            middle_SNH=torch.empty_like(tape.post_SNH),
            projected_SNW=tape.post_SNH.new_empty((num_steps, num_rows, width)),
            attended_LQd=torch.zeros_like(tape.q_SLQd[0]),
            q_NQd=torch.empty_like(tape.attended_SNQd[0]),
            k0_LKd=torch.zeros_like(tape.k0_LKd, dtype=precise),
            v0_LKd=torch.zeros_like(tape.v0_LKd, dtype=precise),
            own_k_JNKd=torch.zeros_like(tape.own_k_JNKd, dtype=precise),
            own_v_JNKd=torch.zeros_like(tape.own_v_JNKd, dtype=precise),
            first_LU=tape.post_SNH.new_empty((num_all, 2 * num_keys * head_dim)),
        )
