"""Step 3, ranks: nobody starts what the others would wait for."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tiepolicy_fsdp2.errors import PlanMismatchError

T = TypeVar("T")


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
    decision: list[T] = []
    digest: str | Exception
    try:
        mine, digest = decide()
        decision.append(mine)
    except Exception as error:  # handed on whole, to every rank
        digest = error
    known: dict[int, str | Exception] = {dist.get_rank(): digest}
    groups: Sequence[dist.ProcessGroup | None] = [None] if mesh is None else mesh.get_all_groups()
    for group in groups:  # what one dimension of the mesh brought together, the next one spreads
        gathered: list[dict[int, str | Exception]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(gathered, known, group=group)
        known = {rank: found for ranks in gathered for rank, found in ranks.items()}
    failures = [found for _, found in sorted(known.items(), key=lambda item: item[0]) if isinstance(found, Exception)]
    if failures:
        raise failures[0]
    first = min(known)
    different = sorted(rank for rank, found in known.items() if found != known[first])
    if different:
        raise PlanMismatchError(
            f"rank {first} and rank {different[0]} decided differently what is one tensor or what is sharded together "
            f"(ranks that differ from rank {first}: {different}); nothing was sharded. Build the same model, with the "
            "same ties and the same blocks, on every rank"
        )
    return decision[0]
