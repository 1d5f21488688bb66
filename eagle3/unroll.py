"""Step 19: unrolls the draft over several steps on its own states, on the rows that carry loss only.

Shape suffixes: B batch, T tokens, V target vocabulary, D draft vocabulary, H draft hidden, E target hidden, A = 3E
captured states, N rows that carry loss, S unroll steps, P (row, step) pairs, M teacher rows, Q query heads, K key and
value heads, G = Q / K query heads that share a key head, d head dimension, J later steps.

A row t reads the token x_{t+1} and the target's states at t. At step i it reads x_{t+1+i} and its own state of step
i - 1, at position t + i, and learns what the target says at token c = t + 1 + i. Of a one-layer draft only keys and
values of step 0 reach other rows, so queries, MLP and all later steps are needed on rows with loss alone, and the
result is exact. A sequence may hold several documents side by side; each is trained on as if it were alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from eagle3.data import positions_of
from eagle3.draft import Draft
from eagle3.loss import SOFT_CROSS_ENTROPY, Objective, StepCounts
from eagle3.teacher import Teacher, teach


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """Which rows, tokens and teacher rows a batch needs. A flat index is b * T + t.

    Attributes:
        rows_N: int64, flat index of each row with at least one supervised pair, ascending.
        batch_N: int64, its sequence.
        time_N: int64, its token position within its document, in tokens.
        starts_N: int64, position of its document's first token within the sequence; None if every sequence is one
            document.
        positions_BT: int64, position of each token within its document; (1, T) if every sequence is one document.
        tokens_SN: int64, flat index of the token that a row reads at a step. Past the end of a sequence it stays on
            the last token; no pair past the end of a document is supervised, nor any later one of its row.
        supervised_SN: bool, whether the pair carries supervision.
        teacher_SN: int64, index into `teacher_rows_M` of a supervised pair's teacher; any valid index elsewhere.
        teacher_rows_M: int64, flat index of each token whose hidden state teaches, each once, ascending.
    """

    rows_N: Tensor
    batch_N: Tensor
    time_N: Tensor
    starts_N: Tensor | None
    positions_BT: Tensor
    tokens_SN: Tensor
    supervised_SN: Tensor
    teacher_SN: Tensor
    teacher_rows_M: Tensor


def plan_rows(loss_mask_BT: Tensor, num_steps: int, *, documents_BT: Tensor | None = None) -> RowPlan:
    """Finds the rows that carry loss: pair (t, i) does if token c = t + 1 + i is in t's document and masked in.

    Args:
        loss_mask_BT: bool, or integers with nonzero for true: whether a token was written by the assistant. Sequences
            are right-padded, padding is masked out.
        num_steps: Steps of the unroll.
        documents_BT: int64, equal for the tokens of one document, which stand side by side; None if every sequence is
            one document.

    Returns:
        The plan, on the device of the mask. No document's first token is ever supervised: no row reads it.
    """
    num_tokens = loss_mask_BT.shape[1]
    mask_BT = loss_mask_BT.bool()
    time_T = torch.arange(num_tokens, device=mask_BT.device)
    positions_BT = time_T[None] if documents_BT is None else positions_of(documents_BT)
    starts_BT = time_T - positions_BT
    teaches_BT = mask_BT & (positions_BT > 0)
    supervised_BTS = _ahead(teaches_BT, num_steps)
    if documents_BT is not None:
        # Not in place: the steps of neighbouring rows share memory.
        supervised_BTS = supervised_BTS & (_ahead(starts_BT, num_steps) <= time_T[:, None])
    batch_N, row_time_N = supervised_BTS.any(dim=-1).nonzero(as_tuple=True)
    steps_S1 = torch.arange(num_steps, device=mask_BT.device)[:, None]
    tokens_SN = batch_N * num_tokens + (row_time_N + 1 + steps_S1).clamp(max=num_tokens - 1)
    starts_N = None if documents_BT is None else starts_BT[batch_N, row_time_N]
    rank_of_token = teaches_BT.flatten().cumsum(dim=0) - 1
    return RowPlan(
        rows_N=batch_N * num_tokens + row_time_N,
        batch_N=batch_N,
        time_N=row_time_N if starts_N is None else row_time_N - starts_N,
        starts_N=starts_N,
        positions_BT=positions_BT,
        tokens_SN=tokens_SN,
        supervised_SN=supervised_BTS[batch_N, row_time_N].T,
        teacher_SN=rank_of_token[tokens_SN].clamp(min=0),
        teacher_rows_M=teaches_BT.flatten().nonzero().squeeze(1),
    )


def _ahead(values_BT: Tensor, num_steps: int) -> Tensor:
    """The values of the `num_steps` tokens behind each one: (B, T, S), zero past the end."""
    return functional.pad(values_BT[:, 1:], (0, num_steps)).unfold(1, num_steps, 1)


class UnrollResult(NamedTuple):
    """The sums of one batch; a named tuple, because FSDP finds the tensors to hook in tuples but not in dataclasses.

    Attributes:
        loss_sum: Scalar, differentiable: the sum over pairs of weight times loss.
        weight_sum: Scalar: the sum of those weights. Add both over micro-batches and ranks, then divide.
        counts: How often draft and target agree, per step.
    """

    loss_sum: Tensor
    weight_sum: Tensor
    counts: StepCounts


class TrainingTimeTest(nn.Module):
    """The training-time test of EAGLE-3 (arXiv 2503.01840, section 3): the draft on its own states for several steps.

    Tokens are the true ones, states the draft's own, and the gradient runs through all steps. This is the module to
    wrap in DDP: it uses each trainable parameter in each forward pass, also when a batch carries no loss.

    Args:
        draft: The draft to train; held, not copied.
        num_steps: Steps of the unroll.
        decay: Step i weighs decay ** i.
        objective: The loss of one pair.
    """

    def __init__(
        self, draft: Draft, *, num_steps: int, decay: float = 0.8, objective: Objective = SOFT_CROSS_ENTROPY
    ) -> None:
        super().__init__()
        self.draft = draft
        self.num_steps = num_steps
        self.decay = decay
        self.objective = objective

    def forward(
        self,
        input_ids_BT: Tensor,
        loss_mask_BT: Tensor,
        aux_BTA: Tensor,
        hidden_BTE: Tensor,
        head_VE: Tensor,
        documents_BT: Tensor | None = None,
    ) -> UnrollResult:
        """Unrolls one batch.

        Args:
            input_ids_BT: int64 token ids, right-padded with any valid id.
            loss_mask_BT: bool, whether a token was written by the assistant; false on padding.
            aux_BTA: The target's three captured states side by side.
            hidden_BTE: The target's last hidden states, after its final norm.
            head_VE: The target's head.
            documents_BT: int64, equal for the tokens of one document; None if every sequence is one.

        Returns:
            The sums of this rank's batch.
        """
        plan = plan_rows(loss_mask_BT, self.num_steps, documents_BT=documents_BT)
        teacher = teach(
            hidden_BTE.flatten(0, 1).index_select(0, plan.teacher_rows_M),
            head_VE,
            self.draft.target_ids(),
            with_mass=self.objective.needs_mass,
        )
        states_SNH = self._unroll(input_ids_BT, aux_BTA, plan)
        return self._score(states_SNH, plan, teacher)

    def _unroll(self, input_ids_BT: Tensor, aux_BTA: Tensor, plan: RowPlan) -> Tensor:
        """Runs all steps and returns the states that the head reads, (S, N, H)."""
        draft = self.draft
        # The last row of a document has no next token. It reads a wrong one: no row with loss sees that key.
        next_ids_BT = torch.cat((input_ids_BT[:, 1:], input_ids_BT[:, -1:]), dim=1)
        states_BTH = draft.fuse(aux_BTA)
        inputs_BTu = draft.step_inputs(next_ids_BT, states_BTH)
        # In the target, too, the longest text of a batch decides.
        length = int(plan.positions_BT.max()) + 1 if draft.rope_depends_on_length else 0
        k0_BTKd, v0_BTKd = draft.keys_values(inputs_BTu, plan.positions_BT, length=length)
        states_NH = states_BTH.flatten(0, 1).index_select(0, plan.rows_N)
        inputs_Nu = inputs_BTu.flatten(0, 1).index_select(0, plan.rows_N)
        same_row_k: list[Tensor] = []
        same_row_v: list[Tensor] = []
        outputs = []
        for step in range(self.num_steps):
            positions_N = plan.time_N + step
            if step > 0:
                inputs_Nu = draft.step_inputs(input_ids_BT.flatten()[plan.tokens_SN[step]], states_NH)
                k_NKd, v_NKd = draft.keys_values(inputs_Nu, positions_N, length=length)
                same_row_k.append(k_NKd)
                same_row_v.append(v_NKd)
            attended_NQd = row_attention(
                draft.queries(inputs_Nu, positions_N, length=length),
                k0_BTKd,
                v0_BTKd,
                same_row_k=same_row_k,
                same_row_v=same_row_v,
                rows_N=plan.rows_N,
                starts_N=plan.starts_N,
            )
            states_NH = draft.next_states(states_NH, attended_NQd)
            outputs.append(draft.head_states(states_NH))
        return torch.stack(outputs)

    def _score(self, states_SNH: Tensor, plan: RowPlan, teacher: Teacher) -> UnrollResult:
        """Scores the supervised pairs whose target token the draft can name; the others are misses without loss."""
        carries_loss_SN = plan.supervised_SN & teacher.in_vocab_M[plan.teacher_SN]
        step_P, row_P = carries_loss_SN.nonzero(as_tuple=True)
        teacher_P = plan.teacher_SN[step_P, row_P]
        weight_dtype = torch.promote_types(torch.float32, states_SNH.dtype)
        weight_S = self.decay ** torch.arange(self.num_steps, dtype=weight_dtype, device=states_SNH.device)
        weight_P = weight_S[step_P]
        loss_sum, argmax_P = self.draft.lm_head.loss(
            states_SNH.flatten(0, 1).index_select(0, step_P * states_SNH.shape[1] + row_P),
            teacher.logits_MD,
            teacher_P,
            weight_P,
            objective=self.objective,
            mass_M=teacher.mass_M,
        )
        hits_SN = torch.zeros_like(carries_loss_SN)
        hits_SN[step_P, row_P] = self.draft.target_ids()[argmax_P] == teacher.argmax_M[teacher_P]
        counts = StepCounts.count(plan.supervised_SN, hits_SN)
        return UnrollResult(loss_sum=loss_sum, weight_sum=weight_P.sum(), counts=counts)


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
