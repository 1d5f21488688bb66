"""Step 1, ranks: what one rank finds out, all ranks know before anybody goes on."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from tiepolicy import TiePlan
from tiepolicy.errors import PlanMismatchError

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process is one of several that save and load together."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, 0 if it is alone."""
    return dist.get_rank() if is_distributed() else 0


def num_ranks() -> int:
    """How many processes save and load together."""
    return dist.get_world_size() if is_distributed() else 1


def is_first_rank() -> bool:
    """Whether this rank does what is done once: folders, manifests, pointers."""
    return rank() == 0


def on_all_ranks(step: Callable[[], T]) -> list[T]:
    """Run a step on every rank of the default group and return every rank's result, by rank.

    Called by all ranks. The step may not communicate. If it raises on any rank, the error of the lowest such rank is
    raised on every rank, so that none waits for one that gave up.
    """
    if not is_distributed():
        return [step()]
    outcome: tuple[list[T], Exception | None]
    try:
        outcome = [step()], None
    except Exception as error:  # handed on whole, to every rank
        outcome = [], error
    outcomes = [outcome] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    failures = [failure for _, failure in outcomes if failure is not None]
    if failures:
        raise failures[0]
    return [result for results, _ in outcomes for result in results]


def on_first_rank(step: Callable[[], T]) -> T | None:
    """Run a step on rank 0 only; all ranks return its result, or raise its error."""
    return on_all_ranks(lambda: step() if is_first_rank() else None)[0]


def agreed_plan(make_plan: Callable[[], TiePlan]) -> TiePlan:
    """This rank's plan, once every rank is known to have made the same.

    Raises:
        PlanMismatchError: On every rank, if two ranks made different plans.
    """
    plan: list[TiePlan] = []

    def digest() -> str:
        plan.append(make_plan())
        return plan[0].digest

    digests = on_all_ranks(digest)
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise PlanMismatchError(
            f"rank 0 and rank {different[0]} decided differently which weights are one tensor (ranks that differ from "
            f"rank 0: {different}); nothing was written. Make the plan once, before the model is sharded or moved, "
            "and hand it to every rank"
        )
    return plan[0]
