"""What one batch needs to know about its rows and pairs, made on the host and moved to the device in one piece.

Shape suffixes: B sequences, T tokens, L = BT, N rows that carry loss, S steps, P supervised pairs, M teacher rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from eagle3.kernels.causal import Segments
from eagle3.unroll import RowPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPlan:
    """Rows and pairs of a batch, every index int32; flat indices are b * T + t.

    Attributes:
        row_N: Flat index of each row.
        position_N: Its position at step 0.
        row_of_token_L: Index into N of the row that stands at a token; -1 for none.
        position_L: Position of every row at step 0.
        next_L: Flat index of the token that every row reads at step 0.
        time_L: Tokens before each in its own document.
        token_SN: Flat index of the token that a row reads at a step.
        supervised_SN: bool.
        pair_SN: Index into P of a supervised pair; -1 for none.
        step_P: Step of each pair. Pairs stand in the order of their teacher rows, so that those that share one
            meet in the cache.
        teacher_P: Index into M of each pair's teacher.
        teacher_rows_M: Flat index of each token whose hidden state teaches.
        segments: Where attention starts anew.
    """

    row_N: Tensor
    position_N: Tensor
    row_of_token_L: Tensor
    position_L: Tensor
    next_L: Tensor
    time_L: Tensor
    token_SN: Tensor
    supervised_SN: Tensor
    pair_SN: Tensor
    step_P: Tensor
    teacher_P: Tensor
    teacher_rows_M: Tensor
    segments: Segments

    def to(self, device: torch.device) -> PairPlan:
        """The plan on a device; from pinned memory without waiting for it."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if field.name != "segments"
        }
        segments = replace(self.segments, starts=self.segments.starts.to(device, non_blocking=True))
        return PairPlan(**moved, segments=segments)


def plan_pairs(plan: RowPlan, *, num_sequences: int, num_tokens: int) -> PairPlan:
    """Derives the plan of a batch of whole sequences from its rows.

    Args:
        plan: On the CPU.
        num_sequences: B.
        num_tokens: T.
    """
    num_all = num_sequences * num_tokens
    num_steps, num_rows = plan.supervised_SN.shape
    step_P, index_P = plan.supervised_SN.nonzero(as_tuple=True)
    teacher_P = plan.teacher_SN[step_P, index_P]
    order_P = teacher_P.argsort(stable=True)
    step_P, index_P, teacher_P = step_P[order_P], index_P[order_P], teacher_P[order_P]
    pair_SN = torch.full((num_steps, num_rows), -1, dtype=torch.int32)
    pair_SN[step_P, index_P] = torch.arange(len(step_P), dtype=torch.int32)
    row_of_token_L = torch.full((num_all,), -1, dtype=torch.int32)
    row_of_token_L[plan.rows_N] = torch.arange(num_rows, dtype=torch.int32)
    time_L = torch.arange(num_tokens, dtype=torch.int32).repeat(num_sequences)
    # The last row of a sequence has no next token. It reads its own: no row with loss sees that key.
    next_L = torch.arange(num_all, dtype=torch.int32) + (time_L < num_tokens - 1)
    return PairPlan(
        row_N=plan.rows_N.int(),
        position_N=plan.time_N.int(),
        row_of_token_L=row_of_token_L,
        position_L=time_L,
        next_L=next_L,
        time_L=time_L,
        token_SN=plan.tokens_SN.int(),
        supervised_SN=plan.supervised_SN,
        pair_SN=pair_SN,
        step_P=step_P.int(),
        teacher_P=teacher_P.int(),
        teacher_rows_M=plan.teacher_rows_M.int(),
        segments=Segments(
            starts=torch.arange(num_sequences + 1, dtype=torch.int32) * num_tokens,
            longest=num_tokens,
            num_sequences=num_sequences,
        ),
    )
