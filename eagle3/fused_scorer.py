"""Step 31: runs target and fused step over a batch, and exchanges gradients between processes on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3.config import RunConfig
from eagle3.data import Batch
from eagle3.draft import Draft
from eagle3.flat import FlatWeights
from eagle3.fused import FusedStep
from eagle3.graphs import GraphedStep, StepInputs, pays_off, with_rounded_pairs
from eagle3.inputs import Target
from eagle3.kernels import fp8
from eagle3.kernels.causal import takes_heads
from eagle3.pairs import with_pairs
from eagle3.parallel import Ranks
from eagle3.step import Scorer, to_device
from eagle3.teacher import TeacherHead
from eagle3.unroll import UnrollResult


def obstacle(config: RunConfig, draft: Draft, device: torch.device) -> str | None:
    """Why a run cannot use the fused step, as the end of a sentence; None if it can."""
    options = draft.config
    if options.norm_before_residual or options.fc_norm or options.norm_before_fc or options.norm_output:
        return "the draft has norms of EAGLE-3.1"
    if draft.embed_tokens.weight.requires_grad:
        return "the draft trains an embedding of its own"
    if draft.rope_depends_on_length:
        return "the rope's frequencies depend on the length of a sequence"
    if config.unroll.loss != "soft_cross_entropy":
        return f"unroll.loss is {config.unroll.loss}"
    if config.parallel.kind != "data":
        return f"parallel.kind is {config.parallel.kind}"
    if device.type == "cuda":
        if config.train.precision == "float32":  # cuDNN would give NaN, and no error
            return "train.precision is float32, in which a GPU's attention does not compute"
        if (size := draft.midlayer.self_attn.head_dim) % 8:
            return f"the draft's head_dim is {size}, not a multiple of 8"
        # A forecast may be for a GPU that is not here.
        if torch.cuda.is_available() and not takes_heads(size, device, deterministic=config.train.deterministic):
            return f"the draft's head_dim is {size}, for which {torch.cuda.get_device_name(device)} has no kernels"
    return None


def fp8_obstacle(draft: Draft, device: torch.device) -> str | None:
    """Why a run cannot compute in FP8 although its step is the fused one, as `obstacle` says it."""
    sizes = {
        "draft.vocab_size": draft.config.draft_vocab_size,
        "the draft's hidden_size": draft.config.hidden_size,
        "the draft's intermediate_size": draft.config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % fp8.ALIGNMENT:
            return f"{name} is {size}, not a multiple of {fp8.ALIGNMENT}"
    return fp8.obstacle(device)


def _keep(_part: Tensor) -> None:
    """What a process alone does with a finished gradient."""


class FusedScorer(Scorer):
    """Computes the gradients by hand, into `weights.summed_grad`.

    Args:
        target: Gives the features.
        draft: Whole in each process; `obstacle` has nothing against it.
        weights: Of that draft.
        config: Of the run.
        ranks: The processes that learn together.
    """

    def __init__(self, target: Target, draft: Draft, weights: FlatWeights, *, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(target, ranks.device)
        self._draft = draft
        self._weights = weights
        self._ranks = ranks
        self._step = FusedStep(
            draft,
            weights,
            num_steps=config.unroll.steps,
            decay=config.unroll.decay,
            deterministic=config.train.deterministic,
        )
        if ranks.device.type == "cuda":
            self._prepare = partial(with_rounded_pairs, num_steps=config.unroll.steps, num_weights=weights.copy.numel())
        else:
            self._prepare = partial(with_pairs, num_steps=config.unroll.steps)
        self.prepare = self._prepare
        self._head: TeacherHead | None = None
        self._graphed = GraphedStep(self._run)
        # gloo only adds.
        self._averages = ranks.device.type == "cuda"

    def __call__(self, batch: Batch) -> tuple[UnrollResult, Tensor]:
        """As `Scorer` says; gradients are left alone."""
        inputs, is_bad = self._inputs(batch)
        return self._run(inputs.uploaded(), with_gradients=False), is_bad

    def learn(self, batch: Batch, *, is_first: bool, is_last: bool) -> tuple[UnrollResult, Tensor]:
        """As `Scorer` says."""
        inputs, is_bad = self._inputs(batch)
        # Parts of the gradient travel while others are computed. All processes send the same parts in the same order,
        # whatever step their batches are worth.
        pending: list[dist.Work] = []
        send = partial(self._exchange, pending) if self._ranks.world_size > 1 else _keep
        goes_early = is_first and is_last
        is_short = self.device.type == "cuda" and pays_off(inputs.plan, num_weights=self._weights.copy.numel())
        if is_short:
            result = self._graphed(inputs)
        else:
            result = self._run(inputs.uploaded(), on_gradients=send if goes_early else _keep)
        self._weights.collect_(is_first=is_first, is_last=is_last)
        if is_last and (is_short or not goes_early):
            for part in self._weights.parts(self._weights.summed_grad):
                send(part)
        for work in pending:
            work.wait()
        if pending and not self._averages:
            self._weights.summed_grad.div_(self._ranks.world_size)
        return result, is_bad

    def _inputs(self, batch: Batch) -> tuple[StepInputs, Tensor]:
        """What the step reads, and whether any of it is not finite."""
        features, is_bad = self.features(batch)
        inputs = StepInputs(
            plan=batch.pairs or self._prepare(batch).pairs,
            input_ids_L=to_device(batch.input_ids_BT, self.device).flatten(),
            aux_LA=features.aux_BTA.to(self._weights.copy.dtype).flatten(0, 1),
            hidden_LE=features.hidden_BTE.flatten(0, 1),
            argmax_L=None if features.argmax_BT is None else features.argmax_BT.flatten(),
        )
        return inputs, is_bad

    def _run(
        self, inputs: StepInputs, *, with_gradients: bool = True, on_gradients: Callable[[Tensor], object] = _keep
    ) -> UnrollResult:
        if self._head is None:
            # Not before a checkpoint brought the vocabulary.
            self._head = TeacherHead(self.target.head_VE, self._draft.target_ids())
        hidden_ME = inputs.hidden_LE.index_select(0, inputs.plan.teacher_rows_M)
        if inputs.argmax_L is None:
            teacher = self._head.teach(hidden_ME)
        else:
            teacher = self._head.teach_known(hidden_ME, inputs.argmax_L[inputs.plan.teacher_rows_M])
        return self._step(
            *(inputs.plan, inputs.input_ids_L, inputs.aux_LA, teacher),
            with_gradients=with_gradients,
            on_gradients=on_gradients,
        )

    def _exchange(self, pending: list[dist.Work], grad: Tensor) -> None:
        work: dist.Work | None = dist.all_reduce(
            grad, dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM, async_op=True
        )
        assert work is not None
        pending.append(work)
