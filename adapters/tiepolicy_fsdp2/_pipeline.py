"""Step 5, pipelines: stages that own one half of a tie keep the two halves equal."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tiepolicy import Keep, TiePlan, content_digest
from tiepolicy.errors import MissingTensorError, ShardingError, TieConflictError
from tiepolicy_fsdp2._kept import places
from tiepolicy_fsdp2._shard import gathered


class SharedTie(NamedTuple):
    """A tensor that stages of several ranks own a copy of."""

    #: What this rank has, None if it has none.
    parameter: nn.Parameter | None
    #: Names of the copies by rank of the default group, in the order of ranks.
    names: dict[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTies:
    """The ties that cross from one stage of a pipeline to another; made by `tie_stages`."""

    #: The ranks that together hold the whole model once.
    group: dist.ProcessGroup | None
    #: By canonical name, in the same order on every rank.
    shared: dict[str, SharedTie]


class _Half(NamedTuple):
    """What the other ranks must know of a tied tensor."""

    names: tuple[str, ...]
    spread: str

    @property
    def name(self) -> str:
        """The name it is known by on its rank: the canonical one if it is there."""
        return self.names[0]


def tie_stages(
    stages: nn.Module | Sequence[nn.Module],
    *,
    plan: TiePlan,
    group: dist.ProcessGroup | None = None,
    keep: Keep | None = None,
) -> StageTies:
    """Find the ties that cross between stages. Called by all ranks of a pipeline, after loading, before training.

    Args:
        stages: The stage, or stages, of this rank, with the names that the whole model has.
        plan: The plan of the whole model, taken before it was cut; on the meta device that costs nothing.
        group: The ranks that together hold the whole model once: the pipeline dimension of a mesh. By default all.
        keep: "canonical" to give all halves the value of the one that is stored, instead of an error if they differ.

    Returns:
        What `sync_tied_gradients` and `verify_stages` need.

    Raises:
        MissingTensorError: On every rank, if no stage has a tied name of the plan.
        ShardingError: On every rank, if halves have other shapes, dtypes or placements, are views, or lie twice on one
            rank as two parameters.
        TieConflictError: On every rank, if halves hold different values.
    """
    if keep not in (None, "canonical"):
        raise ShardingError(f'keep is {keep!r}; it is "canonical", or None to compare the values')
    held = {place.name: place.parameter for stage in _as_list(stages) for place in places(stage)}
    everywhere = gathered(lambda: _halves(held, plan), [group])
    shared = _shared(plan, held, everywhere)
    ties = StageTies(group=group, shared={name: tie for name, tie in shared.items() if len(tie.names) > 1})
    if keep == "canonical":
        for canonical, tie in ties.shared.items():
            if tie.parameter is not None:
                values = _of_all_owners(_local(tie.parameter), tie, group)
                source = next((rank for rank, name in tie.names.items() if name == canonical), min(tie.names))
                _local(tie.parameter).copy_(values[source])
    verify_stages(ties, step="being cut into stages")
    return ties


def sync_tied_gradients(ties: StageTies) -> None:
    """Give every half of a tie the sum of the gradients of all. Called by all ranks, between backward and step.

    The halves then take the same step, as their optimizers have the same state. Gradients that data parallelism has
    reduced already are right as they are. A half without a gradient counts as zero.

    Args:
        ties: What `tie_stages` returned.
    """
    for tie in ties.shared.values():
        parameter = tie.parameter
        if parameter is None or not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = _local(parameter.grad)
        # Added in one order everywhere, so that every half gets the same bits.
        gradient.copy_(functools.reduce(torch.add, _of_all_owners(gradient, tie, ties.group).values()))


def verify_stages(ties: StageTies, *, step: str = "") -> None:
    """Check that the halves of every tie hold the same bits. Called by all ranks of the pipeline; reads the tensors.

    Args:
        ties: What `tie_stages` returned.
        step: What was just done, for the message.

    Raises:
        TieConflictError: On every rank, with the names and ranks of two halves that differ.
    """

    def digests() -> dict[str, str]:
        halves = {canonical: tie.parameter for canonical, tie in ties.shared.items()}
        return {
            canonical: content_digest(_local(half))
            for canonical, half in halves.items()
            if half is not None and not half.is_meta
        }

    found = gathered(digests, [ties.group])
    for canonical, tie in ties.shared.items():
        values = {rank: found[rank][canonical] for rank in tie.names if canonical in found[rank]}
        for rank, digest in values.items():
            first = min(values)
            if digest != values[first]:
                raise TieConflictError(
                    f"{tie.names[first]} on rank {first} and {tie.names[rank]} on rank {rank} are one tensor in the "
                    f"model and hold different values{f' after {step}' if step else ''}. Call sync_tied_gradients "
                    "before every step of the optimizers, and load both from one checkpoint; to go on from here, "
                    'choose with tie_stages(..., keep="canonical")',
                    names=[tie.names[first], tie.names[rank]],
                )


def _halves(held: dict[str, nn.Parameter], plan: TiePlan) -> dict[str, _Half]:
    """What this rank has of each tied tensor, by canonical name."""
    halves = {}
    for group in plan.groups:
        here = [name for name in group.names if name in held]
        views = [alias.name for alias in plan.part_aliases(group.canonical)]
        if here and views:
            raise ShardingError(
                f"{' and '.join(views)} are views of a part of {group.canonical}, which stages cannot share: cut the "
                "model so that one stage holds them all",
                names=[group.canonical, *views],
            )
        if len({id(held[name]) for name in here}) > 1:
            raise ShardingError(
                f"the stages of one rank hold {' and '.join(here)}, which are one tensor in the model, as two "
                "parameters: assign one to the other where the stages are built",
                names=here,
            )
        if here:
            halves[group.canonical] = _Half(tuple(here), _spread(held[here[0]]))
    return halves


def _shared(
    plan: TiePlan, held: dict[str, nn.Parameter], everywhere: dict[int, dict[str, _Half]]
) -> dict[str, SharedTie]:
    shared: dict[str, SharedTie] = {}
    for tied in plan.groups:
        canonical = tied.canonical
        halves = {rank: found[canonical] for rank, found in sorted(everywhere.items()) if canonical in found}
        missing = sorted(set(tied.names) - {name for half in halves.values() for name in half.names})
        if missing:
            raise MissingTensorError(
                f"no stage has {' or '.join(missing)} of the tied {' and '.join(tied.names)}: the plan is that of "
                "another model, or a stage is missing from the group",
                names=missing,
            )
        first = min(halves)
        for rank, half in halves.items():
            if half.spread != halves[first].spread:
                raise ShardingError(
                    f"{halves[first].name} on rank {first} and {half.name} on rank {rank} are one tensor in the model, "
                    f"but one is {halves[first].spread} and the other {half.spread}: shard and convert both stages "
                    "alike",
                    names=[halves[first].name, half.name],
                )
        names = {rank: half.name for rank, half in halves.items()}
        mine = names.get(dist.get_rank())
        shared[canonical] = SharedTie(parameter=None if mine is None else held[mine], names=names)
    return shared


def _of_all_owners(mine: torch.Tensor, tie: SharedTie, group: dist.ProcessGroup | None) -> dict[int, torch.Tensor]:
    """What each owner of a tie has of a tensor, by rank. Called by its owners.

    They send it to each other in the group of the pipeline. A group of their own would be made with the stages between
    them on the GPU, where torch splits it off from all ranks.
    """
    mine = mine.contiguous()
    of_rank = {rank: mine if rank == dist.get_rank() else torch.empty_like(mine) for rank in tie.names}
    transfers = [
        dist.P2POp(operation, tensor, rank, group)
        for rank, theirs in of_rank.items()
        for operation, tensor in ((dist.isend, mine), (dist.irecv, theirs))
        if theirs is not mine and mine.numel()
    ]
    for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
        transfer.wait()
    return of_rank


def _as_list(stages: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    return [stages] if isinstance(stages, nn.Module) else list(stages)


def _spread(parameter: nn.Parameter) -> str:
    """Shape, dtype and placement of a half; two with equal ones have equal elements on ranks of equal place."""
    placed = ""
    if isinstance(parameter, DTensor):
        placed = f" cut as {tuple(parameter.placements)} over {tuple(parameter.device_mesh.shape)}"
    frozen = "" if parameter.requires_grad else " frozen"
    return f"{tuple(parameter.shape)} {parameter.dtype}{placed}{frozen}"


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of this rank, to be changed in place."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
