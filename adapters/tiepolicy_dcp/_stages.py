"""Step 12, stages: the ranks of a pipeline hold parts of one model, and a tie between two of them is stored once."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from tiepolicy import TiePlan, content_digest
from tiepolicy.errors import MissingTensorError, TieConflictError
from tiepolicy_dcp._ranks import on_all_ranks
from tiepolicy_dcp._state import StateEntry
from tiepolicy_dcp.errors import CheckpointError


class _Half(NamedTuple):
    """What a rank has of a tied tensor."""

    name: str
    #: Which part of the tensor or of its optimizer state it is, in words that are equal on the ranks of either stage.
    part: str
    digest: str


def store_once(
    model: Mapping[str, torch.Tensor], optimizer: Iterable[StateEntry], plan: TiePlan
) -> tuple[dict[str, torch.Tensor], bool]:
    """Leave out what another rank stores under the canonical name. Called by all ranks, with the plan of the whole.

    What stages have of one optimizer state has one name already; as weights, it must be equal.

    Args:
        model: The state of this rank's part, as `ModelState` gives it.
        optimizer: The state of its optimizer.
        plan: The plan of the whole model, equal on all ranks.

    Returns:
        The model's state without those names, and whether the ranks hold different parts at all.

    Raises:
        MissingTensorError: If no rank holds a name of the plan.
        TieConflictError: If two ranks hold different values of one tensor. Nothing is ever merged.
        CheckpointError: If two ranks hold one tensor sharded differently.
    """
    stored = plan.stored()
    names = on_all_ranks(lambda: None if model.keys() >= stored.keys() else sorted(model))
    parts = [of_rank for of_rank in names if of_rank is not None]
    if not parts:
        return dict(model), False
    missing = sorted(set(stored).difference(*parts)) if len(parts) == len(names) else []
    if missing:
        raise MissingTensorError(
            f"no rank holds {missing[0]}, which the plan says is stored ({len(missing)} such names in all). Nothing "
            "was written. Save all stages of the model that was planned, or plan what there is",
            names=missing,
        )
    crossing = [
        group.canonical
        for group in plan.groups
        if any(group.canonical not in part and set(group.names).intersection(part) for part in parts)
    ]
    states = [entry for entry in optimizer if entry.place is not None and entry.place[0] in crossing]
    halves = on_all_ranks(lambda: {canonical: _halves(model, states, plan, canonical) for canonical in crossing})
    for canonical in crossing:
        _check_equal([half for of_rank in halves for half in of_rank[canonical]])
    others = {alias.name for canonical in crossing for alias in plan.whole_aliases(canonical)}
    return {name: tensor for name, tensor in model.items() if name not in others}, True


def _halves(
    model: Mapping[str, torch.Tensor], states: Sequence[StateEntry], plan: TiePlan, canonical: str
) -> list[_Half]:
    names = [name for name in (canonical, *(alias.name for alias in plan.whole_aliases(canonical))) if name in model]
    halves = [_half(name, "weight", model[name]) for name in names]
    places = [(tensor, place) for tensor, place, _ in states if place is not None and place[0] == canonical]
    return halves + [_half(name, key, tensor) for name in names[:1] for tensor, (_, key) in places]


def _half(name: str, what: str, tensor: torch.Tensor) -> _Half:
    if not isinstance(tensor, DTensor):
        return _Half(name, f"all of its {what}", content_digest(tensor.detach()))
    mesh = tensor.device_mesh
    part = f"part {mesh.get_coordinate()} of its {what}, {tuple(tensor.placements)} over {tuple(mesh.shape)}"
    return _Half(name, part, content_digest(tensor.to_local().detach()))


def _check_equal(halves: list[_Half]) -> None:
    """Compare the halves that are the same part of one tensor; each name must have the same parts."""
    first = halves[0].name
    parts = {half.part: half.digest for half in halves if half.name == first}
    for half in halves:
        if half.part not in parts:
            raise CheckpointError(
                f"{first} and {half.name} are one tensor in the model, but two ranks shard or optimize it differently: "
                f"{half.name} has {half.part}, which {first} has not. Nothing was written. Shard both stages "
                "alike, and give both halves to optimizers of one kind"
            )
        if half.digest != parts[half.part]:
            raise TieConflictError(
                f"{first} and {half.name} are one tensor in the model, and two ranks hold different values of it "
                f"({half.part}): the gradient of a tie must be synced between the stages that own it, before every "
                "step. Nothing was written and nothing is merged. Give both the values of one, or plan the model "
                "untied",
                names=[first, half.name],
            )
