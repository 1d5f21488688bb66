"""Step 1, the plan taken early: it stays with the model, and what it says is held against the model after each step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

import tiepolicy
from tiepolicy import Keep, TiePlan
from tiepolicy.errors import BrokenTieError, ShardingError

# An attribute lives as long as the model and goes with it into copies; a state dict never sees it.
_ATTRIBUTE = "_tiepolicy_plan"


class Place(NamedTuple):
    """Where a module holds a parameter."""

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter


def places(model: nn.Module) -> Iterator[Place]:
    """Every parameter under each of its names, without the prefixes of wrappers."""
    for path, module in tiepolicy.named_modules(model):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield Place(f"{path}.{attribute}" if path else attribute, module, attribute, parameter)


def keep_plan(model: nn.Module, *, plan: TiePlan | None = None) -> TiePlan:
    """Keep a plan with a model, so that `verify` and `retie` know what was one tensor. Call it before anything else.

    `fully_shard`, `materialize` and `parallelize_module` do it themselves if the model has no plan yet.

    Args:
        model: A module that has all its ties.
        plan: Its plan; made by the default policy if not given.

    Returns:
        The plan.
    """
    plan = plan or tiepolicy.plan(model)
    setattr(model, _ATTRIBUTE, plan)
    return plan


def kept_plan(model: nn.Module) -> TiePlan | None:
    """The plan kept with a `model`, also if it was wrapped since (`torch.compile`, DDP); None if there is none."""
    for path, module in tiepolicy.named_modules(model):
        if path:
            return None
        plan = vars(module).get(_ATTRIBUTE)
        if isinstance(plan, TiePlan):
            return plan
    return None


def verify(model: nn.Module, *, step: str = "", optimizer: Optimizer | None = None) -> None:
    """Check that every tie of the kept plan still holds: one object, not only equal or shared memory.

    Call it between steps, not between forward and backward, when FSDP2 shows gathered parameters in place of its own.

    Args:
        model: The model, or a wrapper around it.
        step: What was just done to it, such as `to_empty()`, for the message.
        optimizer: Check also that it optimizes the parameters that the model has now, each once.

    Raises:
        ShardingError: If no plan was kept with the model.
        MissingTensorError: If a tied name is gone.
        BrokenTieError: If names that were one tensor no longer are, or the optimizer holds a tensor that was replaced.
    """
    plan = _needed_plan(model)
    plan.verify(model, after=step)
    live = {place.name: place.parameter for place in places(model)}
    for group in plan.groups:
        for alias in plan.whole_aliases(group.canonical):
            if live.get(alias.name) is not live.get(group.canonical):
                raise BrokenTieError(
                    f"{alias.name} and {group.canonical} share memory{_after(step)} but are two parameters: FSDP2 "
                    "would give each a shard of its own, and an optimizer would step twice. Call retie before either",
                    names=[alias.name, group.canonical],
                )
    if optimizer is not None:
        _check_optimizer(optimizer, live, step)


@contextmanager
def verified(model: nn.Module, *, step: str) -> Iterator[TiePlan]:
    """Run a step under the eyes of `verify`.

    Keeps a plan at the start if the model has none: `with verified(model, step="half()"): model.half()`.

    Args:
        model: The model that the step changes.
        step: Its name, for the message.

    Returns:
        A block with the plan.

    Raises:
        BrokenTieError: After the block, if it untied what was one tensor.
    """
    yield kept_plan(model) or keep_plan(model)
    verify(model, step=step)


def retie(model: nn.Module, *, keep: Keep | None = None) -> None:
    """Make every tie of the kept plan one parameter again. Call it before the optimizer is built.

    Args:
        model: The model, or a wrapper around it; changed.
        keep: "canonical" to give all names of a tie the canonical value; by default values must be equal.

    Raises:
        ShardingError: If no plan was kept with the model.
        TieConflictError: If values differ. Nothing was changed then.
    """
    _needed_plan(model).retie(model, keep=keep)


def _needed_plan(model: nn.Module) -> TiePlan:
    plan = kept_plan(model)
    if plan is None:
        raise ShardingError(
            f"nobody kept a plan with this {type(model).__name__}, so what was one tensor in it is not known: call "
            "keep_plan(model) while it still has its ties, before it is sharded, materialised or loaded"
        )
    return plan


def _check_optimizer(optimizer: Optimizer, live: dict[str, nn.Parameter], step: str) -> None:
    alive = {id(parameter) for parameter in live.values()}
    seen: set[int] = set()
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in alive:
                raise BrokenTieError(
                    f"the optimizer holds a parameter {tuple(parameter.shape)} in group {index} that is not in the "
                    f"model{_after(step)}: it was replaced after the optimizer was built and is trained for nothing. "
                    "Build the optimizer last"
                )
            if id(parameter) in seen:
                names = sorted(name for name, other in live.items() if other is parameter)
                raise BrokenTieError(
                    f"the optimizer holds {' and '.join(names)} twice and would step it twice; give it each parameter "
                    "once, as model.parameters() does",
                    names=names,
                )
            seen.add(id(parameter))


def _after(step: str) -> str:
    return f" after {step}" if step else ""
