"""Step 11, loading: reconcile first, then read; every tensor of the model is filled, or an error says why."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import tiepolicy
from tiepolicy import (
    Action,
    ActionKind,
    Conflict,
    Moment,
    TensorSpec,
    TiePlan,
    first_difference,
    reconcile,
    settle,
    view_of,
)
from tiepolicy.errors import ManifestError, MissingTensorError, ShapeMismatchError, TieConflictError
from tiepolicy_dcp._digests import Verify, check_files, read_digests
from tiepolicy_dcp._extra import read_extra
from tiepolicy_dcp._folder import MANIFEST, read_manifest
from tiepolicy_dcp._ranks import agreed_plan, is_distributed, num_ranks, on_all_ranks, rank
from tiepolicy_dcp._reader import SafeReader, TensorLoadPlanner, read_metadata
from tiepolicy_dcp._state import ModelState, OptimizerState
from tiepolicy_dcp.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What came out of a checkpoint beside the tensors."""

    extra: Mapping[str, Any]
    #: What was done for each tensor of the model.
    actions: tuple[Action, ...]


def load(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    plan: TiePlan | None = None,
    verify: Verify = "full",
) -> Restored:
    """Read a checkpoint into a live model and optimizer. Called by all ranks, or by a single process.

    Works at another world size and into a model with other ties than were saved. Everything that can be known from
    the metadata, and every file's digest, is checked before the first tensor is read. Runs no code from the checkpoint.

    Args:
        folder: A checkpoint written by `save`, or a folder of plain DCP whose model lies under `model.`.
        model: What to load into, already materialised and sharded.
        optimizer: Its optimizer, to load as well.
        plan: The model's plan; made by the default policy if not given.
        verify: What to check of the files: size and digest, "size" only, or nothing, which is "off". Ranks share the
            work.

    Raises:
        MissingTensorError: If nothing in the checkpoint holds a tensor of the model or its optimizer state.
        ShapeMismatchError: If what holds it has another shape.
        DtypeMismatchError: If what holds it has another dtype.
        TieConflictError: If the checkpoint holds different values for names that are one tensor in the model, and no
            plugin chooses one.
        PlanMismatchError: If ranks made different plans.
        ManifestError: If the manifest contradicts itself or the metadata.
        CheckpointError: If the folder is no checkpoint, is damaged, or asks for more than reading tensors.
    """
    folder = Path(folder).absolute()
    plan = agreed_plan(lambda: plan or tiepolicy.plan(model))
    model_state = ModelState(model, plan=plan)
    live = model_state.state_dict()
    optimizer_state = None if optimizer is None else OptimizerState(model, optimizer, plan=plan)
    wanted = {} if optimizer_state is None else optimizer_state.state_dict()

    def check() -> tuple[list[Action], dict[str, Any]]:
        records = {} if verify == "off" else read_digests(folder)
        check_files(folder, records, sorted(records)[rank() :: num_ranks()], verify=verify)
        metadata = read_metadata(folder)
        actions = reconcile(plan, _saved(folder, metadata))
        _check_owners(folder, actions)
        _check_optimizer(wanted, _specs(metadata, "optimizer."))
        return actions, read_extra(folder) if (folder / MANIFEST).exists() else {}

    actions, extra = on_all_ranks(check)[0]
    _read_model(folder, _settle_conflicts(folder, actions, live, plan), live)
    model_state.load_state_dict(live)
    if optimizer_state is not None:
        _read(folder, {f"optimizer.{name}": tensor for name, tensor in wanted.items()})
        optimizer_state.load_state_dict(wanted)
    return Restored(extra=extra, actions=tuple(actions))


def _specs(metadata: Metadata, prefix: str) -> dict[str, TensorSpec]:
    return {
        name.removeprefix(prefix): TensorSpec(tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def _saved(folder: Path, metadata: Metadata) -> TiePlan | dict[str, TensorSpec]:
    """The plan that was saved, if it describes what is there; names and shapes of a checkpoint without one."""
    stored = _specs(metadata, "model.")
    manifest = read_manifest(folder)
    if manifest is None:
        return stored
    # An alias that is the whole of its tensor has an entry of its own there; a view, or what another model owns, none.
    absent = {alias.name for group in manifest.groups for alias in group.aliases if alias.view is not None}
    absent |= {name for name in manifest.tensors if manifest.canonical(name) in manifest.owned_elsewhere}
    expected = {name: spec for name, spec in manifest.tensors.items() if name not in absent}
    if expected != stored:
        different = min(set(expected.items()) ^ set(stored.items()), key=lambda item: item[0])[0]
        raise ManifestError(
            f"{folder / MANIFEST} and the metadata beside it disagree about {different}: one of the files was replaced "
            "or edited. Nothing was loaded",
            names=[different],
        )
    return manifest


def _check_owners(folder: Path, actions: Sequence[Action]) -> None:
    """This loader reads from one folder only; what another model owns would silently stay as it is."""
    for action in actions:
        if action.kind is ActionKind.EXTERNAL:
            raise CheckpointError(
                f"{action.name} {action.note} and is to be taken from there, which loading {folder} into a live model "
                "does not do. Nothing was loaded. Load it into a plain model and use TiePlan.expand(..., external=...)"
            )


def _check_optimizer(wanted: Mapping[str, torch.Tensor], saved: Mapping[str, TensorSpec]) -> None:
    for name, tensor in wanted.items():
        if name not in saved:
            hint = "the checkpoint holds no optimizer" if not saved else "the model was tied or grouped differently"
            raise MissingTensorError(
                f"the optimizer state {name} is not in the checkpoint: {hint}. Nothing was loaded. Load the model "
                "without its optimizer to start it afresh",
                names=[name],
            )
        if saved[name].shape != tuple(tensor.shape):
            raise ShapeMismatchError(
                f"the optimizer state {name} has shape {saved[name].shape} in the checkpoint, the live one "
                f"{tuple(tensor.shape)}. Nothing was loaded",
                names=[name],
            )


def _settle_conflicts(
    folder: Path, actions: Sequence[Action], live: Mapping[str, torch.Tensor], plan: TiePlan
) -> list[Action]:
    """Read the stored tensors that are one in the model aside, and compare them, before the model is touched.

    Returns:
        The actions that fill the model; where a plugin prefers the value of an alias, it is loaded instead.
    """
    fill = {action.name: action for action in actions if action.kind is not ActionKind.COMPARE}
    for action in actions:
        if action.kind is ActionKind.COMPARE:
            owner = plan.canonical(action.name)
            first = torch.empty_like(live[owner])
            second = torch.empty_like(plan.expand({owner: live[owner]})[action.name])
            _read(folder, {f"model.{fill[owner].saved}": first, f"model.{action.saved}": second})
            difference = first_difference(plan.expand({owner: first})[action.name], second)
            if difference is not None:
                fill[owner] = _settled(fill[owner], action, difference, plan)
    return list(fill.values())


def _settled(first: Action, second: Action, difference: str, plan: TiePlan) -> Action:
    """What to load where two stored values differ that are one tensor in the model."""
    whole = second.name in {alias.name for alias in plan.whole_aliases(first.name)}
    conflict = Conflict(
        canonical=first.saved, alias=second.saved, difference=difference, moment=Moment.LOAD, whole=whole
    )
    kept = settle(conflict, plan.resolver)
    if kept is None:
        raise TieConflictError(
            f"a plugin wants {first.saved} and {second.saved} untied, but they are one tensor in the model: untie the "
            "model before its plan is made. Nothing was loaded",
            names=conflict.names,
        )
    return first if kept == first.saved else replace(first, kind=ActionKind.LOAD, saved=second.saved, view=None)


def _read_model(folder: Path, actions: Sequence[Action], live: Mapping[str, torch.Tensor]) -> None:
    targets: dict[str, torch.Tensor] = {}
    copies: list[Action] = []
    for action in actions:
        if action.kind is ActionKind.LOAD:
            targets[f"model.{action.saved}"] = live[action.name]
        elif action.kind is ActionKind.COPY:
            copies.append(action)
    specs = _specs(read_metadata(folder), "model.") if copies else {}
    for action in copies:
        targets.setdefault(f"model.{action.saved}", _room_for(specs[action.saved], action, live[action.name]))
    _read(folder, targets)
    for action in copies:
        with torch.no_grad():
            live[action.name].copy_(view_of(targets[f"model.{action.saved}"], action.view))


def _room_for(spec: TensorSpec, action: Action, like: torch.Tensor) -> torch.Tensor:
    """Memory to read a stored tensor into that the model has under another name, or only a part of."""
    if action.view is None:
        return torch.empty_like(like)
    if isinstance(like, DTensor):
        raise CheckpointError(
            f"{action.name} is a part of {action.saved} in the checkpoint and sharded in the model; load it into an "
            "unsharded model first"
        )
    return torch.empty(spec.shape, dtype=spec.dtype, device=like.device)


def _read(folder: Path, targets: dict[str, torch.Tensor]) -> None:
    """Read stored tensors into live ones, in place."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp_load(
                targets, storage_reader=SafeReader(folder), planner=TensorLoadPlanner(), no_dist=not is_distributed()
            )
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder} could not be read: {type(cause).__name__}: {cause}") from error
