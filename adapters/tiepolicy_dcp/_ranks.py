"""Step 1, ranks: what one rank finds out, all ranks know before anybody goes on."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import torch.distributed as dist

from tiepolicy import TiePlan
from tiepolicy.errors import PlanMismatchError

T = TypeVar("T")
U = TypeVar("U")
#: One result and no error, or no result and an error.
Outcome: TypeAlias = tuple[list[T], Exception | None]


def is_distributed() -> bool:
    """Whether this process is one of several that save and load together."""
    return dist.is_available() and dist.is_initialized()


def rank(group: dist.ProcessGroup | None = None) -> int:
    """The number of this process, 0 if it is alone."""
    return dist.get_rank(group) if group is not None or is_distributed() else 0


def num_ranks() -> int:
    """How many processes save and load together."""
    return dist.get_world_size() if is_distributed() else 1


def is_first_rank(group: dist.ProcessGroup | None = None) -> bool:
    """Whether this rank does what is done once: folders, manifests, pointers."""
    return rank(group) == 0


def on_all_ranks(step: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Run a step on every rank and return every rank's result, by rank.

    Called by all ranks. The step may not communicate. If it raises on any rank, the error of the lowest such rank is
    raised on every rank, so that none waits for one that gave up.

    Args:
        step: What to do.
        group: A group of all ranks to communicate in; the default group if not given.
    """
    if group is None and not is_distributed():  # a group that is given but was destroyed is an error, not one process
        return [step()]
    outcome = _outcome(step)
    outcomes = [outcome] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, outcome, group=group)
    return _results(outcomes)


def on_first_rank(step: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run a step on rank 0 only; all ranks return its result, or raise its error."""
    return on_all_ranks(lambda: [step()] if is_first_rank(group) else [], group=group)[0][0]


def through_first_rank(step: Callable[[], T], decide: Callable[[list[T]], list[U]]) -> U:
    """Run a step on every rank, hand all results to rank 0, and return to each rank what rank 0 decides for it.

    As `on_all_ranks`, without every rank seeing the results of all.
    """
    if not is_distributed():
        return decide([step()])[0]
    outcome = _outcome(step)
    outcomes = [outcome] * num_ranks() if is_first_rank() else None
    dist.gather_object(outcome, outcomes)
    answers: list[Outcome[U]] = []
    if outcomes is not None:
        gathered = outcomes
        decided = _outcome(lambda: decide(_results(gathered)))
        answers = [([], decided[1])] * num_ranks() if decided[1] else [([value], None) for value in decided[0][0]]
    answer: list[Outcome[U]] = [([], None)]
    dist.scatter_object_list(answer, answers)
    return _results(answer)[0]


def _outcome(step: Callable[[], T]) -> "Outcome[T]":
    try:
        return [step()], None
    except Exception as error:  # handed on whole, to every rank
        return [], error


def _results(outcomes: Sequence["Outcome[T]"]) -> list[T]:
    failures = [failure for _, failure in outcomes if failure is not None]
    if failures:
        raise failures[0]
    return [result for results, _ in outcomes for result in results]


def agreed_plan(make_plan: Callable[[], TiePlan], *, stages: bool = False) -> TiePlan:
    """This rank's plan, once every rank is known to have made the same.

    Args:
        make_plan: Makes the plan of this rank.
        stages: Whether ranks may hold different models, as the stages of a pipeline do. Then only those whose models
            have the same names must have made the same plan.

    Raises:
        PlanMismatchError: On every rank, if two ranks made different plans.
    """
    plan: list[TiePlan] = []

    def describe() -> tuple[str, str]:
        plan.append(make_plan())
        names = "\n".join(plan[0].tensors) if stages else ""
        return hashlib.sha256(names.encode()).hexdigest(), plan[0].digest

    described = on_all_ranks(describe)
    for first, (names, digest) in enumerate(described):
        different = [rank for rank, other in enumerate(described) if other[0] == names and other[1] != digest]
        if different:
            raise PlanMismatchError(
                f"rank {first} and rank {different[0]} decided differently which weights are one tensor (ranks that "
                f"differ from rank {first}: {different}); nothing was {'loaded' if stages else 'written'}. Make the "
                "plan once, before the model is sharded or moved, and hand it to every rank"
            )
    return plan[0]
