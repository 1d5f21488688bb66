"""Step 26: replays a step as one CUDA graph where launching its kernels takes longer than running them.

Shape suffixes: L = BT tokens of the batch, A captured states, E target hidden, N rows, P pairs, M teacher rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3.loss import StepCounts
from eagle3.pairs import PairPlan, padded
from eagle3.unroll import UnrollResult

#: Shapes are rounded up to multiples of these, so that few graphs serve all batches; so many are kept.
_ROWS, _PAIRS, _TEACHERS, _NUM_GRAPHS = 128, 512, 128, 48


#: A step of fewer operations is over before the host has launched its kernels one by one (12 ms at 600 TFLOP/s).
_SHORT = 7e12


def pays_off(num_weights: int, *, num_pairs: int) -> bool:
    """Whether a step is short enough for a graph: three products of each weight with each (row, step) pair."""
    return 6 * num_weights * num_pairs < _SHORT


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What a step reads, on its device.

    Attributes:
        plan: Rows and pairs.
        input_ids_L: int64 token ids.
        aux_LA: Captured states, in the compute dtype.
        hidden_LE: Last hidden states of the target.
    """

    plan: PairPlan
    input_ids_L: Tensor
    aux_LA: Tensor
    hidden_LE: Tensor


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: StepInputs
    result: UnrollResult


class GraphedStep:
    """Runs a step through graphs, one for each set of shapes, made when it is first met.

    Args:
        run: The step; must not synchronise.
    """

    def __init__(self, run: Callable[[StepInputs], UnrollResult]) -> None:
        self._run = run
        self._graphs: OrderedDict[tuple[int, ...], _Captured] = OrderedDict()
        self._pool: Any = None

    def __call__(self, inputs: StepInputs) -> UnrollResult:
        """Runs the step on inputs whose plan is still on the host."""
        plan = inputs.plan
        num_all, device = len(plan.row_of_token_L), inputs.aux_LA.device
        num_rows = min(num_all, _up(len(plan.row_N), _ROWS))
        num_pairs = _up(len(plan.step_P), _PAIRS)
        num_teachers = min(num_all, _up(len(plan.teacher_rows_M), _TEACHERS))
        plan = padded(plan, num_rows=num_rows, num_pairs=num_pairs, num_teachers=num_teachers).to(device)
        inputs = replace(inputs, plan=plan)
        key = (num_rows, num_pairs, num_teachers, plan.num_sequences or 0, num_all)
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
            if len(self._graphs) > _NUM_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph, static, result = self._graphs[key]
        static.plan.flat.copy_(plan.flat)
        static.input_ids_L.copy_(inputs.input_ids_L)
        static.aux_LA.copy_(inputs.aux_LA)
        static.hidden_LE.copy_(inputs.hidden_LE)
        graph.replay()
        # The graph's own memory belongs to the next replay, of any graph.
        counts = StepCounts.from_tensor(result.counts.as_tensor())
        return UnrollResult(loss_sum=result.loss_sum.clone(), weight_sum=result.weight_sum.clone(), counts=counts)

    def _capture(self, inputs: StepInputs) -> _Captured:
        inputs = StepInputs(
            plan=inputs.plan,
            input_ids_L=inputs.input_ids_L.clone(),
            aux_LA=inputs.aux_LA.clone(),
            hidden_LE=inputs.hidden_LE.clone(),
        )
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


def _up(number: int, multiple: int) -> int:
    return max(1, -(-number // multiple)) * multiple
