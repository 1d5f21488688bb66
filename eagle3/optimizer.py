"""Step 26: how weights move: AdamW on float32 masters, a learning rate that rises and falls, gradients kept short."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from eagle3.config import TrainConfig
from eagle3.flat import FlatWeights
from eagle3.kernels.optimizer import adamw_

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
        return AdamW(_groups(self.parameters), lr=self.config.lr, betas=_BETAS, fused=True)

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


class FlatAdamW(torch.optim.Optimizer):
    """AdamW over the buffers of `FlatWeights`; its state is saved and loaded parameter by parameter, as torch's is.

    Args:
        weights: Updated by each step, copies included.
        lr: Learning rate; whoever holds the optimizer may change it, and the decay.
    """

    def __init__(self, weights: FlatWeights, *, lr: float) -> None:
        groups = _groups(weights.parameters.values())
        super().__init__(groups, {"lr": lr, "betas": _BETAS, "eps": 1e-8, "weight_decay": 0.0})
        self._weights = weights
        self._exp_avg = torch.zeros_like(weights.master)
        self._exp_avg_sq = torch.zeros_like(weights.master)
        device = weights.master.device
        self._step = torch.zeros((), dtype=torch.float32, device=device)
        self._lr = torch.zeros((), dtype=torch.float32, device=device)
        self._expose_state()

    def _expose_state(self) -> None:
        for name, parameter in self._weights.parameters.items():
            self.state[parameter] = {
                "step": self._step,
                "exp_avg": self._weights.view(self._exp_avg, name),
                "exp_avg_sq": self._weights.view(self._exp_avg_sq, name),
            }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here or by torch.optim.AdamW, into the flat buffers."""
        super().load_state_dict(state_dict)
        for name, parameter in self._weights.parameters.items():
            loaded = self.state[parameter]
            self._step.copy_(torch.as_tensor(loaded["step"]))
            self._weights.view(self._exp_avg, name).copy_(loaded["exp_avg"])
            self._weights.view(self._exp_avg_sq, name).copy_(loaded["exp_avg_sq"])
        self._expose_state()

    @torch.no_grad()
    def step(self, closure: None = None, *, scale: Tensor | None = None) -> None:  # type: ignore[override]  # no closure
        """Update the weights by the gradients in the flat buffer.

        Args:
            closure: Not supported: gradients are made before.
            scale: Scalar tensor that multiplies the gradients; None for 1.
        """
        assert closure is None
        weights = self._weights
        self._step += 1
        middle = weights.start_of_matrices
        for group, part in zip(self.param_groups, (slice(middle, None), slice(0, middle)), strict=True):
            self._lr.fill_(group["lr"])
            adamw_(
                *(weights.master[part], self._exp_avg[part], self._exp_avg_sq[part]),
                *(weights.summed_grad[part], weights.copy[part]),
                scale=torch.ones_like(self._lr) if scale is None else scale,
                lr=self._lr,
                step=self._step,
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        weights.quantise_()


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
        self._flat = FlatAdamW(self._weights, lr=self.config.lr)
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
    factor = _shortened(scale, norm, max_norm)
    for grad in grads:
        (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(factor)
    return norm


def clip_factor(grad: Tensor, *, scale: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """What to multiply a flat gradient by so that its norm is at most `max_norm`, without a synchronisation.

    Args:
        grad: The gradient before `scale`.
        scale: Scalar tensor that normalises it.
        max_norm: Largest norm after the scaling.

    Returns:
        The factor, `scale` included, and the norm of the scaled gradient before clipping: scalars, float32 or better.
    """
    precise = torch.promote_types(torch.float32, grad.dtype)
    norm = torch.linalg.vector_norm(grad, dtype=precise) * scale
    return _shortened(scale, norm, max_norm), norm


def _shortened(scale: Tensor, norm: Tensor, max_norm: float) -> Tensor:
    """The scale, less where gradients of this norm would be too long; as `clip_grad_norm_` of torch computes it."""
    return scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices, then the vectors, whose weights do not decay."""
    parameters = list(parameters)
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1]},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1]},
    ]
