"""Step 11, stages: the ranks of a pipeline hold parts of one model, and what two of them own is stored once."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from tiepolicy import TiePlan, content_digest
from tiepolicy.errors import CheckpointError, MissingTensorError, TieConflictError
from tiepolicy_dcp._ranks import on_all_ranks, rank
from tiepolicy_dcp._state import StateEntry


class _Half(NamedTuple):
    """What a rank has of a tensor that another stage has too."""

    name: str
    rank: int
    #: Which part of the tensor or of its optimizer state it is, in words that are equal on the ranks of either stage.
    part: str
    digest: str


def store_once(
    model: Mapping[str, torch.Tensor], optimizer: Iterable[StateEntry], plan: TiePlan
) -> dict[str, torch.Tensor]:
    """Leave out what another rank stores under the canonical name. Called by all ranks, with the plan of the whole.

    What stages have of one optimizer state has one name already; as weights, it must be equal.

    Args:
        model: The state of this rank's part, as `ModelState` gives it.
        optimizer: The state of its optimizer.
        plan: The plan of the whole model, equal on all ranks.

    Returns:
        The model's state without those names.

    Raises:
        MissingTensorError: If no rank holds a name of the plan.
        TieConflictError: If two ranks hold different values of one tensor. Nothing is ever merged.
        CheckpointError: If two ranks hold one tensor sharded differently.
    """
    stored = plan.stored()
    names = on_all_ranks(lambda: None if model.keys() >= stored.keys() else sorted(model))
    if not any(of_rank is not None for of_rank in names):
        return dict(model)
    everything = frozenset(stored)
    stages = [everything if of_rank is None else frozenset(of_rank) for of_rank in names]
    missing = sorted(everything.difference(*stages))
    if missing:
        raise MissingTensorError(
            f"no rank holds {missing[0]}, which the plan says is stored ({len(missing)} such names in all). Nothing "
            "was written. Save all stages of the model that was planned, or plan what there is",
            names=missing,
        )
    owners = Counter(canonical for stage in set(stages) for canonical in set(map(plan.canonical, stage)))
    shared = [canonical for canonical in stored if owners[canonical] > 1]
    states: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for tensor, place, _ in optimizer:
        if place is not None:
            states.setdefault(place[0], []).append((place[1], tensor))

    def look() -> dict[str, list[_Half]]:
        return {canonical: _halves(model, states.get(canonical, ()), plan, canonical) for canonical in shared}

    halves = on_all_ranks(look)
    for canonical in shared:
        _check_equal([half for of_rank in halves for half in of_rank[canonical]], stages)
    others = {alias.name for canonical in shared for alias in plan.whole_aliases(canonical)}
    return {name: tensor for name, tensor in model.items() if name not in others}


def _halves(
    model: Mapping[str, torch.Tensor], states: Iterable[tuple[str, torch.Tensor]], plan: TiePlan, canonical: str
) -> list[_Half]:
    names = [name for name in (canonical, *(alias.name for alias in plan.whole_aliases(canonical))) if name in model]
    halves = [_half(name, "weight", model[name]) for name in names]
    return halves + [_half(name, key, tensor) for name in names[:1] for key, tensor in states]


def _half(name: str, what: str, tensor: torch.Tensor) -> _Half:
    if not isinstance(tensor, DTensor):
        return _Half(name, rank(), f"all of its {what}", content_digest(tensor.detach()))
    mesh = tensor.device_mesh
    part = f"part {mesh.get_coordinate()} of its {what}, {tuple(tensor.placements)} over {tuple(mesh.shape)}"
    return _Half(name, rank(), part, content_digest(tensor.to_local().detach()))


def _check_equal(halves: list[_Half], stages: Sequence[frozenset[str]]) -> None:
    """Compare the halves that are the same part of one tensor; each name of each stage must have the same parts."""
    first = halves[0]
    own = [half for half in halves if (half.name, stages[half.rank]) == (first.name, stages[first.rank])]
    parts = {half.part: half for half in own}
    for half in halves:
        other = parts.get(half.part)
        if other is None:
            raise CheckpointError(
                f"{first.name} on rank {first.rank} and {half.name} on rank {half.rank} are one tensor in the model, "
                f"but sharded or optimized differently: the latter has {half.part}, which the former has not. Nothing "
                "was written. Shard both stages alike, and give both halves to optimizers of one kind"
            )
        if half.digest != other.digest:
            raise TieConflictError(
                f"{other.name} on rank {other.rank} and {half.name} on rank {half.rank} are one tensor in the model, "
                f"and hold different values of it ({half.part}): the gradient of what stages share must be synced "
                "between them before every step. Nothing was written and nothing is merged. Give both the values of "
                "one, or plan the model untied",
                names=[other.name, half.name],
            )
