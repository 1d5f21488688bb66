"""Step 3, ranks: what each found is known to all, and what all decided is the same."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tiepolicy_fsdp2.errors import PlanMismatchError

T = TypeVar("T")


def gathered(find: Callable[[], T], groups: Sequence[dist.ProcessGroup | None]) -> dict[int, T]:
    """What every rank found, by rank of the default group. Called by all ranks.

    Args:
        find: May not communicate.
        groups: Groups of this rank whose members, and the members of whose members, are meant; None is the default.

    Raises:
        Exception: On every rank, what `find` raised on the first of those where it did.
    """
    finding: tuple[T | None, Exception | None]
    try:
        finding = find(), None
    except Exception as error:  # handed on whole, to every rank
        finding = None, error
    known = {dist.get_rank(): finding}
    for group in groups:  # what one dimension of a mesh brought together, the next one spreads
        of_ranks = [known] * dist.get_world_size(group)
        dist.all_gather_object(of_ranks, known, group=group)
        known = {rank: found for ranks in of_ranks for rank, found in ranks.items()}
    results: dict[int, T] = {}
    for rank in sorted(known):
        found, failure = known[rank]
        if failure is not None:
            raise failure
        if found is not None:
            results[rank] = found
    return results


def agreed(decide: Callable[[], tuple[T, str]], mesh: DeviceMesh | None) -> T:
    """What this rank decided, once every rank is known to have decided the same. Called by all ranks.

    Args:
        decide: Returns a decision and a digest of it, equal on all ranks. May not communicate.
        mesh: The ranks; all of the default group if it is None.

    Raises:
        PlanMismatchError: On every rank, if two ranks decided differently.
        Exception: On every rank, what `decide` raised on the first of those where it did.
    """
    if not dist.is_initialized():
        return decide()[0]
    decisions: list[T] = []

    def digest() -> str:
        decision, its_digest = decide()
        decisions.append(decision)
        return its_digest

    known = gathered(digest, [None] if mesh is None else mesh.get_all_groups())
    first = min(known)
    different = [rank for rank, found in known.items() if found != known[first]]
    if different:
        raise PlanMismatchError(
            f"rank {first} and rank {different[0]} decided differently what is one tensor or what is sharded together "
            f"(ranks that differ from rank {first}: {different}); nothing was sharded. Build the same model, with the "
            "same ties and the same blocks, on every rank"
        )
    return decisions[0]
