"""Step 1, ranks: what one rank finds out, all ranks know before anybody goes on."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import torch.distributed as dist

from tiepolicy import TiePlan
from tiepolicy.errors import LostRankError, PlanMismatchError

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
    with all_present():
        dist.all_gather_object(outcomes, outcome, group=group)
    return _results(outcomes)


def on_first_rank(step: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run a step on rank 0 only; all ranks return its result, or raise its error."""
    return on_all_ranks(lambda: [step()] if is_first_rank(group) else [], group=group)[0][0]


def through_first_rank(
    step: Callable[[], T], decide: Callable[[list[T]], list[U]], *, group: dist.ProcessGroup | None = None
) -> U:
    """Run a step on every rank, hand all results to rank 0, and return to each rank what rank 0 decides for it.

    As `on_all_ranks`, without every rank seeing the results of all: what they are grows with the number of ranks.
    """
    if group is None and not is_distributed():
        return decide([step()])[0]
    outcome = _outcome(step)
    outcomes = [outcome] * dist.get_world_size(group) if is_first_rank(group) else None
    with all_present():
        dist.gather_object(outcome, outcomes, group=group)
    answers: list[Outcome[U]] = []
    if outcomes is not None:
        gathered = outcomes
        decided = _outcome(lambda: decide(_results(gathered)))
        failed: Outcome[U] = ([], decided[1])
        answers = [failed] * len(gathered) if decided[1] else [([value], None) for value in decided[0][0]]
    answer: list[Outcome[U]] = [([], None)]
    with all_present():
        dist.scatter_object_list(answer, answers, group=group)
    return _results(answer)[0]


@contextmanager
def all_present() -> Iterator[None]:
    """Say in one sentence that a rank is gone, where ranks wait for each other.

    Raises:
        LostRankError: If the connection to another rank ends, or it does not answer within the group's timeout.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL has a class for it; gloo's errors are known by the file of its source that they name.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        cause = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
        raise LostRankError(
            f"another rank of this run is gone or cannot be reached ({cause}), and what every rank must call cannot be "
            "finished. Every checkpoint that has a name is whole: end the processes that remain, and start again "
            "from the latest one"
        ) from error


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
