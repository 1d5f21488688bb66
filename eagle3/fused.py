"""Step 24: the unrolled step of the draft by hand: forward, loss and every gradient, without autograd.

The same numbers as `TrainingTimeTest` under autograd, to rounding, in about half the time on a GPU: the half of
queries, keys and values that depends on the token alone is computed once per token; each weight's gradient is one
product over all steps; attention over all rows is the library's kernel, into which a row's own later keys are merged.

Shape suffixes: L = BT tokens of the batch, N rows that carry loss, S steps, P pairs, M teacher rows, H draft hidden,
A captured states, I intermediate, W projected width, X = Q * d, Q query heads, K key and value heads, d head dimension,
D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from eagle3.draft import Draft
from eagle3.flat import FlatWeights
from eagle3.kernels.causal import causal_attention, causal_attention_backward
from eagle3.kernels.heads import Heads, place_keys_values, place_queries, sum_by_token, unrotate_
from eagle3.kernels.rowwise import RowGradients, SecondNorm, add_rms_norm, rms_norm_backward
from eagle3.kernels.same_row import merge_same_row_, same_row_backward_
from eagle3.kernels.soft_ce import row_stats, soft_cross_entropy_
from eagle3.layers import Fp8Head, Head
from eagle3.loss import StepCounts
from eagle3.pairs import PairPlan
from eagle3.tape import Tape, TapeGradients
from eagle3.teacher import Teacher
from eagle3.unroll import UnrollResult

#: Pairs whose logits exist at a time. Larger gains nothing and costs memory (8192 pairs of 32000 logits: 0.5 GB).
CHUNK = 8192


class FusedStep:
    """Computes the sums of a batch and adds nothing up: gradients overwrite those of the batch before.

    Args:
        draft: Without the options of EAGLE-3.1. Its frozen embedding is read in place.
        weights: Of that draft. With those in FP8, the MLP and the head compute in it.
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
        self._heads = Heads(
            num_queries=config.num_attention_heads,
            num_keys=config.num_key_value_heads,
            head_dim=config.head_dim,
            cos=torch.empty(0),
            sin=torch.empty(0),
        )
        self._num_q = config.num_attention_heads * config.head_dim
        precise = torch.promote_types(torch.float32, weights.copy.dtype)
        weight_S = decay ** torch.arange(num_steps, dtype=precise, device=weights.copy.device)
        # One more, for pairs that only fill up a fixed shape.
        self._weight_S = functional.pad(weight_S, (0, 1))
        self._largest_weight = max(1.0, decay ** (num_steps - 1))
        self._target_ids_D: Tensor | None = None
        # Graphs of shorter batches go on reading their angles.
        self._outgrown: list[Heads] = []

    def __call__(
        self,
        plan: PairPlan,
        input_ids_L: Tensor,
        aux_LA: Tensor,
        teacher: Teacher,
        *,
        with_gradients: bool = True,
        on_gradients: Callable[[Tensor], object] = lambda _: None,
    ) -> UnrollResult:
        """Runs one batch.

        Args:
            plan: On the device of the weights.
            input_ids_L: int64 token ids.
            aux_LA: The target's captured states, in the dtype of the copies.
            teacher: What the target says at the plan's teacher rows.
            with_gradients: Whether to write `weights.grad`; without, it is left alone.
            on_gradients: Called with each of `weights.parts(weights.grad)` as soon as it is finished.

        Returns:
            The sums; the gradient of `loss_sum` is in `weights.grad`.
        """
        with torch.no_grad():
            tape = self._unroll(plan, input_ids_L, aux_LA)
            result = self._score(plan, tape.head, teacher, with_gradients=with_gradients)
            if with_gradients:
                parts = iter(self._weights.parts(self._weights.grad))

                def finish_part() -> None:
                    on_gradients(next(parts))

                finish_part()
                back = self._steps_backward(plan, tape, finish_part)
                self._inputs_backward(plan, tape, back, aux_LA, finish_part)
        return result

    def _provide_angles(self, num_positions: int) -> None:
        num_known = len(self._heads.cos)
        if num_known < num_positions:
            self._outgrown.append(self._heads)
            positions = torch.arange(max(num_positions, 2 * num_known), device=self._weights.copy.device)
            cos, sin = self._draft.rope_angles(positions, dtype=self._weight_S.dtype)
            self._heads = replace(self._heads, cos=cos, sin=sin)

    def _unroll(self, plan: PairPlan, input_ids_L: Tensor, aux_LA: Tensor) -> Tape:
        """Runs all steps and keeps what their gradients need."""
        w = self._weights.copies
        self._provide_angles(len(plan.position_L) + self._num_steps)
        tape = Tape.allocate(plan, self._weights, self._heads, largest_weight=self._largest_weight)
        tape.embedded_LH = self._draft.embed_tokens.weight.index_select(0, input_ids_L).to(aux_LA.dtype)
        _, tape.tokens_LH = add_rms_norm(tape.embedded_LH, None, w.input_norm_H, eps=self._eps)
        token_LW = tape.tokens_LH @ w.token_WH.T
        tape.first_LH = aux_LA @ w.fc_HA.T
        _, tape.first_normed_LH = add_rms_norm(tape.first_LH, None, w.hidden_norm_H, eps=self._eps)
        place_keys_values(
            tape.first_normed_LH @ w.state_WH[self._num_q :].T,
            token_LW,
            *(tape.k0_LKd, tape.v0_LKd),
            token_M=plan.next_L,
            position_M=plan.position_L,
            heads=self._heads,
        )
        torch.index_select(tape.first_normed_LH, 0, plan.row_N, out=tape.normed_SNH[0])
        state_NH = tape.first_LH.index_select(0, plan.row_N)
        for step in range(self._num_steps):
            self._project(plan, tape, token_LW, step)
            self._attend(plan, tape, step)
            state_NH = self._finish(plan, tape, state_NH, step)
        return tape

    def _project(self, plan: PairPlan, tape: Tape, token_LW: Tensor, step: int) -> None:
        """Queries of a step, and but for the first the keys and values that its rows alone will see."""
        state_WH = self._weights.copies.state_WH
        projected_NW = tape.normed_SNH[step] @ (state_WH if step else state_WH[: self._num_q]).T
        token_N, position_N = plan.token_SN[step], plan.position_N + step
        place_queries(
            *(projected_NW, token_LW, tape.q_SLQd[step]),
            token_M=token_N,
            position_M=position_N,
            row_M=plan.row_N,
            heads=self._heads,
        )
        if step:
            place_keys_values(
                *(projected_NW, token_LW, tape.own_k_JNKd[step - 1], tape.own_v_JNKd[step - 1]),
                token_M=token_N,
                position_M=position_N,
                heads=self._heads,
            )

    def _attend(self, plan: PairPlan, tape: Tape, step: int) -> None:
        """Attention over the keys of step 0, with the rows' own keys merged into it."""
        attended = causal_attention(
            *(tape.q_SLQd[step], tape.k0_LKd, tape.v0_LKd, plan.segments),
            scale=self._scale,
            deterministic=self._deterministic,
        )
        merge_same_row_(
            attended,
            k_JNKd=tape.own_k_JNKd[:step],
            v_JNKd=tape.own_v_JNKd[:step],
            row_N=plan.row_N,
            gathered_NQd=tape.attended_SNQd[step],
        )
        tape.attention.append(attended)

    def _finish(self, plan: PairPlan, tape: Tape, state_NH: Tensor, step: int) -> Tensor:
        """Output projection and MLP; the states of the next step, normed for it and for the head."""
        w, eps = self._weights.copies, self._eps
        added_NH = tape.attended_SNQd[step].flatten(1) @ w.o_HX.T
        mlp, head = tape.mlp, tape.head
        middle_NH, _ = add_rms_norm(state_NH, added_NH, mlp.norm_H, eps=eps, out_MH=mlp.input_SNH[step])
        # The states of the last step have no next step to be normed for; that norm goes nowhere.
        is_last = step + 1 == self._num_steps
        state_NH, _ = add_rms_norm(
            *(middle_NH, mlp.forward(step), w.hidden_norm_H),
            eps=eps,
            second=SecondNorm(weight_H=head.norm_H, out_RH=head.input_PH, index_M=plan.pair_SN[step]),
            out_MH=None if is_last else tape.normed_SNH[step + 1],
        )
        tape.middle_NH.append(middle_NH)
        tape.state_NH.append(state_NH)
        return state_NH

    def _score(self, plan: PairPlan, head: Head | Fp8Head, teacher: Teacher, *, with_gradients: bool) -> UnrollResult:
        """Scores all pairs chunk by chunk, and goes back through the head."""
        if self._target_ids_D is None:
            self._target_ids_D = self._draft.target_ids()
        weight_P = self._weight_S[plan.step_P] * teacher.in_vocab_M[plan.teacher_P]
        loss_P = torch.empty_like(weight_P)
        argmax_P = torch.empty_like(plan.teacher_P)
        lse_M = teacher.lse_M if teacher.lse_M is not None else row_stats(teacher.logits_MD).lse_M
        for start in range(0, len(weight_P), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits_CD = head.logits(chunk)
            grad_CD = head.grad_place(logits_CD)
            soft_cross_entropy_(
                *(logits_CD, teacher.logits_MD, lse_M),
                teacher_C=plan.teacher_P[chunk],
                weight_C=weight_P[chunk],
                loss_C=loss_P[chunk],
                argmax_C=argmax_P[chunk],
                grad_CD=grad_CD,
                grad_factor=head.grad_factor,
            )
            if with_gradients:
                head.backward(chunk, grad_CD)
        if with_gradients:
            head.weight_gradient()
        hit_P = self._target_ids_D[argmax_P] == teacher.argmax_M[plan.teacher_P]
        hit_P &= teacher.in_vocab_M[plan.teacher_P]
        # One more element, for the pairs that are none.
        hit_P = torch.cat((hit_P, hit_P.new_zeros(1)))
        counts = StepCounts.count(plan.supervised_SN.bool(), hit_P[plan.pair_SN])
        return UnrollResult(loss_sum=loss_P.sum(), weight_sum=weight_P.sum(), counts=counts)

    def _steps_backward(self, plan: PairPlan, tape: Tape, finish_part: Callable[[], None]) -> TapeGradients:
        """From the head's inputs back to the start of the first step; finishes the gradients of MLP and output."""
        w = self._weights.copies
        back = TapeGradients.allocate(tape)
        grad_normed_NH: Tensor | None = None
        grad_state_NH: Tensor | None = None
        for step in reversed(range(self._num_steps)):
            self._finish_backward(plan, tape, back, grad_normed_NH, grad_state_NH, step)
            grad_attended_NQd = (back.middle_SNH[step] @ w.o_HX).unflatten(1, (-1, self._heads.head_dim))
            self._attend_backward(plan, tape, back, grad_attended_NQd, step)
            grad_normed_NH = self._project_backward(plan, back, step)
            grad_state_NH = back.middle_SNH[step]
        tape.mlp.gate_up_gradient()
        finish_part()
        tape.mlp.down_gradient()
        attended_XX = tape.attended_SNQd.flatten(2).flatten(0, 1)
        torch.mm(back.middle_SNH.flatten(0, 1).T, attended_XX, out=self._weights.grads.o_HX)
        finish_part()
        assert grad_normed_NH is not None
        back.normed_NH = grad_normed_NH
        return back

    def _inputs_backward(
        self, plan: PairPlan, tape: Tape, back: TapeGradients, aux_LA: Tensor, finish_part: Callable[[], None]
    ) -> None:
        """From the start of the first step to states and tokens; finishes the gradients that are left."""
        w, g, norms = self._weights.copies, self._weights.grads, back.norms
        unrotate_(
            back.first_LU,
            queries_MQd=None,
            keys_MKd=back.k0_LKd,
            values_MKd=back.v0_LKd,
            position_M=plan.position_L,
            heads=self._heads,
        )
        grad_first_LH = rms_norm_backward(
            *(tape.first_LH, back.first_LU @ w.state_WH[self._num_q :], w.hidden_norm_H, norms.hidden_GH),
            eps=self._eps,
            rows=RowGradients(normed_RH=back.normed_NH, sum_RH=back.middle_SNH[0], index_M=plan.row_of_token_L),
        )
        torch.mm(grad_first_LH.T, aux_LA, out=g.fc_HA)
        finish_part()
        self._token_half_backward(plan, tape, back)
        self._projection_gradients(tape, back)
        g.input_norm_H.copy_(norms.input_GH.sum(dim=0))
        g.hidden_norm_H.copy_(norms.hidden_GH.sum(dim=0))
        g.post_norm_H.copy_(norms.post_GH.sum(dim=0))
        g.final_norm_H.copy_(norms.final_GH.sum(dim=0))
        finish_part()

    def _finish_backward(
        self,
        plan: PairPlan,
        tape: Tape,
        back: TapeGradients,
        grad_normed_NH: Tensor | None,
        grad_state_NH: Tensor | None,
        step: int,
    ) -> None:
        """From the states that a step hands on to those between its attention and its MLP."""
        w, eps, mlp, norms = self._weights.copies, self._eps, tape.mlp, back.norms
        rms_norm_backward(
            *(tape.state_NH.pop(), grad_normed_NH, w.hidden_norm_H, norms.hidden_GH),
            eps=eps,
            grad_sum_MH=grad_state_NH,
            second=SecondNorm(
                weight_H=w.final_norm_H,
                out_RH=tape.head.grad_PH,
                index_M=plan.pair_SN[step],
                grad_weight_GH=norms.final_GH,
            ),
            out_MH=mlp.grad_SNH[step],
        )
        rms_norm_backward(
            *(tape.middle_NH.pop(), mlp.backward(step), w.post_norm_H, norms.post_GH),
            eps=eps,
            grad_sum_MH=mlp.grad_SNH[step],
            out_MH=back.middle_SNH[step],
        )

    def _attend_backward(
        self, plan: PairPlan, tape: Tape, back: TapeGradients, grad_attended_NQd: Tensor, step: int
    ) -> None:
        # Rows that are not among the plan's stay zero over all steps; those that are get written in each.
        back.attended_LQd.index_copy_(0, plan.row_N.long(), grad_attended_NQd)
        attended = tape.attention.pop()
        grad_q_LQd, grad_k_LKd, grad_v_LKd = causal_attention_backward(back.attended_LQd, attended)
        back.k0_LKd += grad_k_LKd
        back.v0_LKd += grad_v_LKd
        same_row_backward_(
            attended,
            grad_q_LQd,
            out_NQd=tape.attended_SNQd[step],
            grad_out_NQd=grad_attended_NQd,
            k_JNKd=tape.own_k_JNKd[:step],
            v_JNKd=tape.own_v_JNKd[:step],
            grad_k_JNKd=back.own_k_JNKd[:step],
            grad_v_JNKd=back.own_v_JNKd[:step],
            row_N=plan.row_N,
            grad_q_NQd=back.q_NQd,
        )

    def _project_backward(self, plan: PairPlan, back: TapeGradients, step: int) -> Tensor:
        """From queries, keys and values to the normed states that they were projected from."""
        unrotate_(
            back.projected_SNW[step],
            queries_MQd=back.q_NQd,
            keys_MKd=back.own_k_JNKd[step - 1] if step else None,
            values_MKd=back.own_v_JNKd[step - 1] if step else None,
            position_M=plan.position_N + step,
            heads=self._heads,
        )
        state_WH = self._weights.copies.state_WH
        if step:
            return back.projected_SNW[step] @ state_WH
        return back.projected_SNW[0, :, : self._num_q] @ state_WH[: self._num_q]

    def _token_half_backward(self, plan: PairPlan, tape: Tape, back: TapeGradients) -> None:
        """Gradients of the token's half of queries, keys and values, and of the norm of the embeddings."""
        w = self._weights.copies
        grad_token_LW = sum_by_token(
            back.projected_SNW, back.first_LU, row_of_token_L=plan.row_of_token_L, time_L=plan.position_L
        )
        torch.mm(grad_token_LW.T, tape.tokens_LH, out=self._weights.grads.token_WH)
        rms_norm_backward(
            tape.embedded_LH, grad_token_LW @ w.token_WH, w.input_norm_H, back.norms.input_GH, eps=self._eps
        )

    def _projection_gradients(self, tape: Tape, back: TapeGradients) -> None:
        """Of queries, keys and values, for the half that reads a state: one product over all steps."""
        g, num_q = self._weights.grads, self._num_q
        projected_XW, normed_XH = back.projected_SNW.flatten(0, 1), tape.normed_SNH.flatten(0, 1)
        torch.mm(projected_XW[:, :num_q].T, normed_XH, out=g.state_WH[:num_q])
        torch.mm(back.first_LU.T, tape.first_normed_LH, out=g.state_WH[num_q:])
        later_XW, later_XH = back.projected_SNW[1:].flatten(0, 1), tape.normed_SNH[1:].flatten(0, 1)
        g.state_WH[num_q:].addmm_(later_XW[:, num_q:].T, later_XH)
