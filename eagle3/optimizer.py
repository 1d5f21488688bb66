"""Step 29: how weights move: AdamW on float32 masters, a learning rate that rises and falls, gradients kept short."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from eagle3.config import TrainConfig
from eagle3.flat import FlatAdamW, FlatWeights, clip_factor

_BETAS = (0.9, 0.95)


class DraftOptimizer:
    """AdamW for the trainable parameters of a draft.

    The learning rate depends on the share of the run's data that was seen, not on a number of steps: a run that goes on
    with another number of processes, and so of steps, keeps its schedule.

    Args:
        draft: On its device and already sharded, if it will be.
        config: Learning rate, schedule, decay and clipping.
    """

    def __init__(self, draft: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
        self.adamw = self._make()
        self.obey_config()

    def _make(self) -> Optimizer:
        return AdamW(
            [
                {"params": [parameter for parameter in self.parameters if parameter.dim() > 1]},
                {"params": [parameter for parameter in self.parameters if parameter.dim() <= 1]},
            ],
            lr=self.config.lr,
            betas=_BETAS,
            fused=True,
        )

    def obey_config(self) -> None:
        """Set the weight decay of matrices; also after a checkpoint brought back that of an earlier config."""
        for group, decay in zip(self.adamw.param_groups, (self.config.weight_decay, 0.0), strict=True):
            group["weight_decay"] = decay

    def step(self, *, scale: Tensor, seen_before: float, seen_after: float) -> tuple[float, Tensor]:
        """Moves the weights along the gradients, and forgets those.

        Args:
            scale: Scalar float32; the gradients are multiplied with it first.
            seen_before: Share of the run's data that was seen before this step, 0 to 1.
            seen_after: The same after it.

        Returns:
            The learning rate, and the norm of the scaled gradients before they were shortened, on their device.
        """
        lr = self.config.lr * lr_factor(seen_before, seen_after, warmup_ratio=self.config.warmup_ratio)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        return lr, self._move(scale)

    def _move(self, scale: Tensor) -> Tensor:
        norm = scale_and_clip_(self.parameters, scale=scale, max_norm=self.config.max_grad_norm)
        self.adamw.step()
        self.adamw.zero_grad()
        return norm


class FlatDraftOptimizer(DraftOptimizer):
    """The same on the flat buffers of a draft: scaling, clipping, AdamW and the copies in one pass.

    Args:
        draft: On its device.
        config: Learning rate, schedule, decay and clipping.
        weights: Of that draft.
    """

    def __init__(self, draft: nn.Module, config: TrainConfig, weights: FlatWeights) -> None:
        self._weights = weights
        super().__init__(draft, config)

    def _make(self) -> Optimizer:
        self._flat = FlatAdamW(self._weights, lr=self.config.lr, betas=_BETAS)
        return self._flat

    def obey_config(self) -> None:
        """Also bring the copies of the weights up to date, which a checkpoint does not know."""
        super().obey_config()
        self._weights.refresh_()

    def _move(self, scale: Tensor) -> Tensor:
        grad = self._weights.summed_grad
        factor, norm = clip_factor(grad, scale=scale, max_norm=self.config.max_grad_norm)
        self._flat.step(scale=factor)
        return norm


def lr_factor(seen_before: float, seen_after: float, *, warmup_ratio: float) -> float:
    """The share of the peak learning rate of a step: a line up to it, then a cosine down to 0 at the end of the run.

    The line looks at the end of a step and the cosine at its start, so that neither the first step nor the last one
    stands still.

    Args:
        seen_before: Share of the run's data that was seen before the step, 0 to 1.
        seen_after: The same after it.
        warmup_ratio: Share of the data in which the rate rises.
    """
    if seen_after < warmup_ratio:
        return seen_after / warmup_ratio
    fallen = max(0.0, seen_before - warmup_ratio) / (1 - warmup_ratio)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, fallen)))


@torch.no_grad()
def scale_and_clip_(parameters: Iterable[nn.Parameter], *, scale: Tensor, max_norm: float) -> Tensor:
    """Multiplies all gradients in place, and shortens them where they are then longer than `max_norm` together.

    Args:
        parameters: Each has a gradient, plain or sharded.
        scale: Scalar on the gradients' device.
        max_norm: Of the scaled gradients.

    Returns:
        The norm of the scaled gradients before they were shortened: a scalar on their device.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    # Of sharded gradients each process has a part of the norm.
    norm = scale * (norm.full_tensor() if isinstance(norm, DTensor) else norm)
    factor = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(factor)
    return norm
