"""Step 21: what one batch needs to know about its rows and pairs, moved to the device in one piece.

Shape suffixes: B sequences, T tokens, L = BT, N rows that carry loss, S steps, P supervised pairs, M teacher rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional

from eagle3.data import Batch
from eagle3.kernels.causal import Segments
from eagle3.unroll import RowPlan, plan_rows

#: Tensors start at multiples of 16 bytes, so that kernels are compiled for aligned pointers only.
_ALIGNMENT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPlan:
    """Rows and pairs of a batch, every index int32; flat indices are b * T + t.

    Attributes:
        row_N: Flat index of each row.
        position_N: Its position at step 0.
        row_of_token_L: Index into N of the row that stands at a token; -1 for none.
        position_L: Position of every row at step 0: tokens before it in its own document.
        next_L: Flat index of the token that every row reads at step 0.
        token_SN: Flat index of the token that a row reads at a step.
        supervised_SN: 1 where a pair is supervised, else 0.
        pair_SN: Index into P of a supervised pair; -1 for none.
        step_P: Step of each pair, S for one that does not count. Pairs stand in the order of their teacher rows, so
            that those that share one meet in the cache.
        teacher_P: Index into M of each pair's teacher.
        teacher_rows_M: Flat index of each token whose hidden state teaches.
        starts: Flat index of each document's first token, and L at the end.
        longest: Tokens of the longest document.
        num_sequences: B, if every sequence is one document; None if not.
        flat: All of these tensors, which are views of it.
    """

    row_N: Tensor
    position_N: Tensor
    row_of_token_L: Tensor
    position_L: Tensor
    next_L: Tensor
    token_SN: Tensor
    supervised_SN: Tensor
    pair_SN: Tensor
    step_P: Tensor
    teacher_P: Tensor
    teacher_rows_M: Tensor
    starts: Tensor
    longest: int
    num_sequences: int | None
    flat: Tensor

    @classmethod
    def pack(cls, *, longest: int, num_sequences: int | None, **parts: Tensor) -> PairPlan:
        """Lays the tensors of a plan into one buffer, so that they move in one copy.

        Args:
            longest: Tokens of the longest document.
            num_sequences: B, if every sequence is one document; None if not.
            parts: All tensors but `flat`; copied.
        """
        padded_parts = [
            functional.pad(part.flatten().int(), (0, -part.numel() % _ALIGNMENT)) for part in parts.values()
        ]
        return cls._views(torch.cat(padded_parts), parts, longest=longest, num_sequences=num_sequences)

    @classmethod
    def _views(cls, flat: Tensor, parts: Mapping[str, Tensor], *, longest: int, num_sequences: int | None) -> PairPlan:
        views, start = {}, 0
        for name, part in parts.items():
            views[name] = flat[start : start + part.numel()].view(part.shape)
            start += part.numel() + -part.numel() % _ALIGNMENT
        return cls(**views, flat=flat, longest=longest, num_sequences=num_sequences)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        return {name: getattr(self, name) for name in _PARTS}

    @property
    def segments(self) -> Segments:
        """Where attention starts anew."""
        return Segments(starts=self.starts, longest=self.longest, num_sequences=self.num_sequences)

    def to(self, device: torch.device, *, copy: bool = False) -> PairPlan:
        """The plan on a device; a GPU fetches it while the host goes on."""
        flat = self.flat.pin_memory() if device.type == "cuda" and not self.flat.is_cuda else self.flat
        flat = flat.to(device, non_blocking=True, copy=copy)
        return self._views(flat, self.parts, longest=self.longest, num_sequences=self.num_sequences)


_PARTS = tuple(field.name for field in fields(PairPlan) if field.type == "Tensor" and field.name != "flat")


def plan_pairs(plan: RowPlan, *, num_sequences: int, num_tokens: int) -> PairPlan:
    """Derives the plan of a batch from its rows.

    Args:
        plan: On the CPU.
        num_sequences: B.
        num_tokens: T.
    """
    num_all = num_sequences * num_tokens
    every = torch.arange(num_all, dtype=torch.int32)
    num_steps, num_rows = plan.supervised_SN.shape
    step_P, index_P = plan.supervised_SN.nonzero(as_tuple=True)
    teacher_P = plan.teacher_SN[step_P, index_P]
    order_P = teacher_P.argsort(stable=True)
    step_P, index_P, teacher_P = step_P[order_P], index_P[order_P], teacher_P[order_P]
    pair_SN = torch.full((num_steps, num_rows), -1, dtype=torch.int32)
    pair_SN[step_P, index_P] = torch.arange(len(step_P), dtype=torch.int32)
    row_of_token_L = torch.full((num_all,), -1, dtype=torch.int32)
    row_of_token_L[plan.rows_N] = torch.arange(num_rows, dtype=torch.int32)
    time_L = plan.positions_BT.expand(num_sequences, num_tokens).flatten().int()
    # The last row of all has no next token. It reads its own: no row with loss sees the key of a document's last row.
    next_L = (every + 1).clamp(max=num_all - 1)
    starts = (time_L == 0).nonzero().squeeze(1).int()
    return PairPlan.pack(
        row_N=plan.rows_N,
        position_N=plan.time_N,
        row_of_token_L=row_of_token_L,
        position_L=time_L,
        next_L=next_L,
        token_SN=plan.tokens_SN,
        supervised_SN=plan.supervised_SN,
        pair_SN=pair_SN,
        step_P=step_P,
        teacher_P=teacher_P,
        teacher_rows_M=plan.teacher_rows_M,
        starts=torch.cat((starts, torch.tensor([num_all], dtype=torch.int32))),
        longest=int(time_L.max()) + 1,
        num_sequences=num_sequences if plan.starts_N is None else None,
    )


def with_pairs(batch: Batch, *, num_steps: int) -> Batch:
    """The batch with its plan, for the processes that prepare batches."""
    rows = plan_rows(batch.loss_mask_BT, num_steps, documents_BT=batch.documents_BT)
    num_sequences, num_tokens = batch.input_ids_BT.shape
    return replace(batch, pairs=plan_pairs(rows, num_sequences=num_sequences, num_tokens=num_tokens))


def padded(plan: PairPlan, *, num_rows: int, num_pairs: int, num_teachers: int) -> PairPlan:
    """The same plan with more rows, pairs and teacher rows that carry nothing, for a step of fixed shapes.

    Further rows are real ones without loss, so that none is written twice; further pairs have a step past the last,
    whose weight is zero, and no row.

    Args:
        plan: On the CPU.
        num_rows: At least N, at most L.
        num_pairs: At least P.
        num_teachers: At least M.
    """
    num_steps, num_now = plan.supervised_SN.shape
    unused = (plan.row_of_token_L < 0).nonzero().squeeze(1)[: num_rows - num_now].int()
    more = len(unused)
    last = len(plan.row_of_token_L) - 1
    row_of_token_L = plan.row_of_token_L.clone()
    row_of_token_L[unused.long()] = torch.arange(num_now, num_now + more, dtype=torch.int32)
    token_SN = (unused + 1 + torch.arange(num_steps, dtype=torch.int32)[:, None]).clamp(max=last)
    pad_pairs, pad_teachers = num_pairs - len(plan.step_P), num_teachers - len(plan.teacher_rows_M)
    changed = {
        "row_N": torch.cat((plan.row_N, unused)),
        "position_N": torch.cat((plan.position_N, plan.position_L[unused.long()])),
        "row_of_token_L": row_of_token_L,
        "token_SN": torch.cat((plan.token_SN, token_SN), dim=1),
        "supervised_SN": functional.pad(plan.supervised_SN, (0, more)),
        "pair_SN": functional.pad(plan.pair_SN, (0, more), value=-1),
        "step_P": functional.pad(plan.step_P, (0, pad_pairs), value=num_steps),
        "teacher_P": functional.pad(plan.teacher_P, (0, pad_pairs)),
        "teacher_rows_M": functional.pad(plan.teacher_rows_M, (0, pad_teachers)),
    }
    return PairPlan.pack(longest=plan.longest, num_sequences=plan.num_sequences, **(plan.parts | changed))
