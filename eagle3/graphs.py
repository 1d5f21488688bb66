"""Step 25: replays a step as one CUDA graph where launching its kernels takes longer than running them.

Shape suffixes: L = BT tokens of the batch, A captured states, E target hidden, N rows, P pairs, M teacher rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3.data import Batch
from eagle3.loss import StepCounts
from eagle3.pairs import PairPlan, padded, with_pairs
from eagle3.unroll import UnrollResult

#: Shapes are rounded up to multiples of these at most, so that few graphs serve all batches; so many are kept.
_ROWS, _PAIRS, _TEACHERS, _NUM_GRAPHS = 128, 512, 128, 192

#: A step of fewer operations is over before the host has launched its kernels one by one, or soon after that (17 ms
#: at 600 TFLOP/s).
_SHORT = 1e13


def pays_off(plan: PairPlan, *, num_weights: int) -> bool:
    """Whether a step is short enough for a graph: three products of each weight with each (row, step) pair.

    Packed documents never are: their number is part of the shapes.
    """
    return plan.num_sequences is not None and 6 * num_weights * plan.supervised_SN.numel() < _SHORT


def rounded(plan: PairPlan) -> PairPlan:
    """The plan with what fills it up to one of few shapes, on the CPU; for the processes that prepare batches."""
    num_all = len(plan.row_of_token_L)
    return padded(
        plan,
        num_rows=min(num_all, _up(len(plan.row_N), _ROWS)),
        num_pairs=_up(len(plan.step_P), _PAIRS),
        num_teachers=min(num_all, _up(len(plan.teacher_rows_M), _TEACHERS)),
    )


def with_rounded_pairs(batch: Batch, *, num_steps: int, num_weights: int) -> Batch:
    """The batch with its plan, rounded where a graph pays off."""
    batch = with_pairs(batch, num_steps=num_steps)
    assert batch.pairs is not None
    return replace(batch, pairs=rounded(batch.pairs)) if pays_off(batch.pairs, num_weights=num_weights) else batch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What a step reads, on its device.

    Attributes:
        plan: Rows and pairs; it may still be on the host.
        input_ids_L: int64 token ids.
        aux_LA: Captured states, in the compute dtype.
        hidden_LE: Last hidden states of the target.
        argmax_L: int64, the target's greedy token after each token, if known.
    """

    plan: PairPlan
    input_ids_L: Tensor
    aux_LA: Tensor
    hidden_LE: Tensor
    argmax_L: Tensor | None = None

    def uploaded(self) -> StepInputs:
        """The same with the plan on the device, too."""
        return replace(self, plan=self.plan.to(self.aux_LA.device))

    def reading(self, others: Iterable[StepInputs]) -> StepInputs:
        """The same in memory of its own, but for the features, for which the first that fits of the others has room."""
        plan = self.plan.to(self.aux_LA.device, copy=True)
        for other in others:
            if [part.shape for part in self.features] == [part.shape for part in other.features]:
                return replace(other, plan=plan)
        names = [field.name for field in fields(self) if field.name != "plan" and getattr(self, field.name) is not None]
        return replace(self, plan=plan, **{name: getattr(self, name).clone() for name in names})

    @property
    def features(self) -> list[Tensor]:
        """All that differs between batches of one shape, but the plan."""
        known = [] if self.argmax_L is None else [self.argmax_L]
        return [self.input_ids_L, self.aux_LA, self.hidden_LE, *known]

    @property
    def shape(self) -> tuple[int, ...]:
        """What batches must agree in to be run by one graph."""
        plan = self.plan
        sizes = (*plan.supervised_SN.shape, len(plan.step_P), len(plan.teacher_rows_M), len(plan.row_of_token_L))
        return (*sizes, plan.num_sequences or 0, self.argmax_L is not None)


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: StepInputs
    result: UnrollResult


class GraphedStep:
    """Runs a step through graphs, one for each set of shapes, made when it is first met: give it rounded plans.

    Args:
        run: The step; must not synchronise.
    """

    def __init__(self, run: Callable[[StepInputs], UnrollResult]) -> None:
        self._run = run
        self._graphs: OrderedDict[tuple[int, ...], _Captured] = OrderedDict()
        self._pool: Any = None

    def __call__(self, inputs: StepInputs) -> UnrollResult:
        """Runs the step."""
        if inputs.shape not in self._graphs:
            self._graphs[inputs.shape] = self._capture(inputs)
            if len(self._graphs) > _NUM_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(inputs.shape)
        graph, static, result = self._graphs[inputs.shape]
        pairs = zip(static.features, inputs.features, strict=True)
        for to, value in ((static.plan.flat, inputs.plan.flat), *pairs):
            to.copy_(value if value.is_cuda else value.pin_memory(), non_blocking=True)
        graph.replay()
        # The graph's own memory belongs to the next replay, of any graph.
        counts = StepCounts.from_tensor(result.counts.as_tensor())
        return UnrollResult(loss_sum=result.loss_sum.clone(), weight_sum=result.weight_sum.clone(), counts=counts)

    def _capture(self, inputs: StepInputs) -> _Captured:
        inputs = inputs.reading(captured.inputs for captured in self._graphs.values())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Kernels are compiled and cuDNN chooses its plans outside of the capture.
            self._run(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = self._run(inputs)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, inputs, result)


def _up(number: int, coarsest: int) -> int:
    """By a 16th at most, where that is more than 16 rows."""
    multiple = min(coarsest, max(16, 1 << max(number.bit_length() - 5, 0)))
    return max(1, -(-number // multiple)) * multiple
