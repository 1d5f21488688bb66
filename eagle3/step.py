"""Step 30: one optimizer step over several batches and processes, and a look at what it gave once it is known."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eagle3.data import Batch
from eagle3.errors import NumericsError
from eagle3.features import Features
from eagle3.inputs import Target
from eagle3.loss import StepCounts
from eagle3.optimizer import DraftOptimizer
from eagle3.parallel import Ranks, gradients_stay_local
from eagle3.unroll import UnrollResult


class Scorer(ABC):
    """Runs target and draft over a batch.

    Args:
        target: Gives the features.
        device: Where both are.

    Attributes:
        prepare: What the processes that make batches are to add to each; None for nothing.
    """

    def __init__(self, target: Target, device: torch.device) -> None:
        self.target = target
        self.device = device
        self.prepare: Callable[[Batch], Batch] | None = None

    @abstractmethod
    def __call__(self, batch: Batch) -> tuple[UnrollResult, Tensor]:
        """Scores a batch.

        Returns:
            Its sums, and whether a feature is not finite, as a scalar bool on the device.
        """

    @abstractmethod
    def learn(self, batch: Batch, *, is_first: bool, is_last: bool) -> tuple[UnrollResult, Tensor]:
        """Scores one of the batches of an optimizer step and adds the gradients of its sum to those of the others.

        Args:
            batch: To score.
            is_first: Whether it is the first of the step.
            is_last: Whether it is the last; then the processes exchange their gradients and keep the mean.

        Returns:
            As for a call.
        """

    def features(self, batch: Batch) -> tuple[Features, Tensor]:
        """Runs the target.

        Returns:
            Its states, and whether one is not finite, as a scalar bool on the device.
        """
        features = self.target.features_of(batch)
        finite = features.aux_BTA.isfinite().all() & features.hidden_BTE.isfinite().all()
        return features, ~finite


class AutogradScorer(Scorer):
    """Lets autograd find the gradients, which the draft's parameters hold.

    Args:
        target: As of `Scorer`.
        unroll: A `TrainingTimeTest`, or what `Ranks.distribute` made of one.
        device: As of `Scorer`.
        precision: Of the draft's matrix products.
        dtype: Of the draft's weights.
    """

    def __init__(
        self, target: Target, unroll: nn.Module, *, device: torch.device, precision: torch.dtype, dtype: torch.dtype
    ) -> None:
        super().__init__(target, device)
        self.unroll = unroll
        self.autocast = torch.autocast(device.type, precision, enabled=precision != dtype)
        # Autocast chooses for each operation; without it all of them must agree.
        self.feature_dtype = None if precision != dtype else dtype

    def __call__(self, batch: Batch) -> tuple[UnrollResult, Tensor]:
        """As `Scorer` says."""
        features, is_bad = self.features(batch)
        documents_BT = None if batch.documents_BT is None else to_device(batch.documents_BT, self.device)
        aux_BTA = features.aux_BTA if self.feature_dtype is None else features.aux_BTA.to(self.feature_dtype)
        with self.autocast:
            result: UnrollResult = self.unroll(
                *(to_device(batch.input_ids_BT, self.device), to_device(batch.loss_mask_BT, self.device)),
                *(aux_BTA, features.hidden_BTE, self.target.head_VE, documents_BT),
            )
        return result, is_bad

    def learn(self, batch: Batch, *, is_first: bool, is_last: bool) -> tuple[UnrollResult, Tensor]:  # noqa: ARG002 - the optimizer has forgotten the step before
        """As `Scorer` says."""
        with nullcontext() if is_last else gradients_stay_local(self.unroll):
            result, is_bad = self(batch)
            result.loss_sum.backward()
        return result, is_bad


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The same on a device; a GPU fetches it while the host goes on."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What an optimizer step gave.

    Attributes:
        lr: The learning rate.
        norm: Scalar on the device: the norm of the gradient of the mean loss, before it was shortened.
        loss_and_weight: (2,) float64 on the device: the sums over all processes.
        counts: Of this process.
        num_tokens: Of this process.
        votes: (2,) float64 on the device: how many processes met a feature that is not finite, and how many were asked
            to stop.
    """

    lr: float
    norm: Tensor
    loss_and_weight: Tensor
    counts: StepCounts
    num_tokens: int
    votes: Tensor


def take_step(
    micro_batches: Sequence[Batch],
    *,
    scorer: Scorer,
    optimizer: DraftOptimizer,
    ranks: Ranks,
    stop: bool,
    seen: tuple[float, float],
) -> StepResult:
    """One optimizer step: its loss is one sum over all pairs of all micro-batches and processes, over their one weight.

    That weight is known only when the last batch was scored, so the gradients are those of the sum until then, and are
    divided where they are clipped, in the same pass. One small exchange carries the sums, and with them whether
    anybody was asked to stop.

    Args:
        micro_batches: Of this process, at least one, as many as in every other.
        scorer: Scores each.
        optimizer: Moves the weights.
        ranks: The processes that take the step together.
        stop: Whether this process was asked to stop.
        seen: Share of the run's data that was seen before the step, and after it.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    counts: StepCounts | None = None
    for index, batch in enumerate(micro_batches):
        result, is_bad = scorer.learn(batch, is_first=index == 0, is_last=index == len(micro_batches) - 1)
        sums[:3] += torch.stack((result.loss_sum.detach().double(), result.weight_sum.double(), is_bad.double()))
        counts = result.counts if counts is None else counts + result.counts
    assert counts is not None
    sums[3] = float(stop)
    ranks.sum_(sums)
    weight_sum = sums[1]
    # The exchange of gradients divided them by the number of processes, which the one weight contains already.
    scale = torch.where(weight_sum > 0, ranks.world_size / weight_sum, 0.0).float()
    lr, norm = optimizer.step(scale=scale, seen_before=seen[0], seen_after=seen[1])
    return StepResult(
        lr=lr,
        norm=norm,
        loss_and_weight=sums[:2],
        counts=counts,
        num_tokens=sum(batch.input_ids_BT.numel() for batch in micro_batches),
        votes=sums[2:],
    )


class Watch:
    """Reads what steps gave one step late, so that the host never waits for the device, and the same in each process.

    Attributes:
        stops: Whether any process was asked to stop, as far as it was read.
    """

    def __init__(self) -> None:
        self.stops = False
        self._unread: list[tuple[int, StepResult]] = []

    def add(self, step: int, result: StepResult) -> None:
        """Takes the result of a step, and reads the one before; on the CPU, where nothing is pending, also this one.

        Raises:
            NumericsError: As `read` says.
        """
        previous, self._unread = self._unread, [(step, result)]
        for earlier_step, earlier in previous:
            self._judge(earlier_step, earlier)
        if result.votes.device.type == "cpu":
            self.read()

    def read(self) -> None:
        """Reads all that is left. To be called before anything is kept.

        Raises:
            NumericsError: If a loss, a gradient or a feature was not finite.
        """
        unread, self._unread = self._unread, []
        for step, result in unread:
            self._judge(step, result)

    def _judge(self, step: int, result: StepResult) -> None:
        (loss_sum, _), (num_bad, num_stops) = result.loss_and_weight.tolist(), result.votes.tolist()
        if num_bad:
            raise NumericsError(
                f"The target's states in step {step} hold NaN or infinity, so nothing can be learnt from them. Nothing "
                "was saved since. Give target.dtype another value, or look for a conversation that it overflows on."
            )
        for what, value in (("loss", loss_sum), ("gradient's norm", float(result.norm))):
            if not math.isfinite(value):
                raise NumericsError(
                    f"The {what} of step {step} is {value}, which spoils the draft's weights. Nothing was saved after "
                    "that. Go on from the last checkpoint with a lower train.lr or train.max_grad_norm, or with "
                    "train.precision float32."
                )
        self.stops = self.stops or num_stops > 0
