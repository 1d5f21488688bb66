"""Step 9, parameter groups: the hyperparameters of a group as bytes, with a digest of the names that it is for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tiepolicy.errors import CheckpointError
from tiepolicy_dcp._ranks import on_all_ranks

#: Bytes kept for the hyperparameters of one group, as JSON padded with spaces. Fixed, since a loader must make room for
#: a tensor before it has seen it.
_NUM_BYTES = 4096


class Group(NamedTuple):
    """The parameters of one group, in words that do not depend on ties."""

    position: int
    #: Every name of each parameter, sorted: two parameters have the names that one has when they are tied.
    names: tuple[str, ...]
    #: What each parameter is called in the checkpoint, sorted.
    parameters: tuple[str, ...]
    #: The hyperparameters as JSON has them, without the parameters.
    values: Mapping[str, Any]


def joined(groups: Sequence[Group]) -> list[Group]:
    """This rank's groups, each with what other ranks, as the stages of a pipeline, have at the same position.

    Called by all ranks.

    Raises:
        CheckpointError: On every rank, if hyperparameters at one position differ, or one tie lies in groups of several
            positions: no optimizer of the whole model is like that.
    """
    if len(set(on_all_ranks(lambda: hashlib.sha256(repr(groups).encode()).digest()))) == 1:
        return list(groups)
    whole: dict[int, Group] = {}
    for of_rank, theirs in enumerate(on_all_ranks(lambda: groups)):
        for group in theirs:
            first = whole.setdefault(group.position, group)
            for key in sorted({*first.values, *group.values}):
                if first.values.get(key) != group.values.get(key):
                    raise CheckpointError(
                        f"{key} of parameter group {group.position} is {group.values.get(key)} on rank {of_rank}, but "
                        f"{first.values.get(key)} on a rank before it. Nothing was written. Give groups of one "
                        "position the same hyperparameters on all ranks; a group may be empty"
                    )
            names = _union(first.names, group.names)
            whole[group.position] = Group(
                group.position, names, _union(first.parameters, group.parameters), first.values
            )
    positions: dict[str, int] = {}
    for group in whole.values():
        for name in group.names:
            if positions.setdefault(name, group.position) != group.position:
                raise CheckpointError(
                    f"{name} is in parameter group {positions[name]} on one rank, and what is one tensor with it in "
                    f"group {group.position} on another. Put both halves of a tie into groups of one position"
                )
    return [whole[group.position] for group in groups]


def encode(group: Group) -> torch.Tensor:
    """The hyperparameters of a group as a tensor of bytes.

    Raises:
        CheckpointError: If they are no JSON, or too many.
    """
    saved = {"names": _digest(group.names), "num_parameters": len(group.parameters), "values": group.values}
    try:
        encoded = json.dumps(saved).encode()
    except TypeError as error:
        raise CheckpointError(
            f"the hyperparameters of parameter group {group.position} are no JSON: {error}"
        ) from error
    if len(encoded) > _NUM_BYTES:
        raise CheckpointError(
            f"the hyperparameters of parameter group {group.position} take {len(encoded)} bytes as JSON, more than the "
            f"{_NUM_BYTES} that fit; keep large values out of the optimizer's param_groups"
        )
    return torch.frombuffer(bytearray(encoded.ljust(_NUM_BYTES)), dtype=torch.uint8)


def decode(group: Group, encoded: torch.Tensor, *, compared: bool) -> dict[str, Any]:
    """The hyperparameters that `encode` made bytes of.

    Args:
        group: The live group.
        encoded: What was stored.
        compared: Whether it is known that each live parameter had one state when it was saved.

    Raises:
        CheckpointError: If the group held other parameters, or the bytes are damaged.
    """
    try:
        saved = json.loads(bytes(encoded.tolist()))
        digest, num_parameters, values = saved["names"], int(saved["num_parameters"]), dict(saved["values"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the hyperparameters of parameter group {group.position} are damaged: {error}"
        ) from error
    if digest != _digest(group.names):
        raise CheckpointError(
            f"parameter group {group.position} holds other parameters than when it was saved: build the optimizer with "
            "the same groups, or load the model without its optimizer"
        )
    if num_parameters > len(group.parameters) and not compared:
        raise CheckpointError(
            f"parameter group {group.position} had {num_parameters} parameters when it was saved and has "
            f"{len(group.parameters)}, as names are tied that were not: plain DCP cannot tell which of their states is "
            "right. Use tiepolicy_dcp.load, which compares them, or load the model without its optimizer"
        )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _union(some: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({*some, *others}))


def _digest(names: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
