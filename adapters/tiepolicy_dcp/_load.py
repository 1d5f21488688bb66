"""Step 14, loading: reconcile first, then read; every tensor of the model is filled, or an error says why."""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

import tiepolicy
from tiepolicy import Action, ActionKind, Owners, TensorSpec, TiePlan, observe, reconcile, take, view_of
from tiepolicy.errors import CheckpointError, ManifestError
from tiepolicy.files import (
    DIGESTS,
    READ_AHEAD_BYTES,
    FileRecord,
    Verify,
    check_files,
    check_recorded,
    member,
    read_digests,
    read_soon,
)
from tiepolicy_dcp._folder import MANIFEST, METADATA, read_manifest
from tiepolicy_dcp._groups import decode, joined
from tiepolicy_dcp._ranks import agreed_plan, num_ranks, on_all_ranks, rank
from tiepolicy_dcp._reader import StoredTensors, read_tensors
from tiepolicy_dcp._reconcile import SavedNames, performed, reconcile_optimizer, settle_model, settle_optimizer
from tiepolicy_dcp._state import (
    TENSORS,
    VALUES,
    ModelState,
    OptimizerState,
    StateEntry,
    are_in_place,
    observed,
    read_extra,
)
from tiepolicy_dcp._writer import data_file

logger = logging.getLogger("tiepolicy_dcp")

#: What every rank reads, and checks itself.
_READ_BY_ALL = frozenset({METADATA, MANIFEST, VALUES, TENSORS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What came out of a checkpoint beside the tensors."""

    extra: Mapping[str, Any]
    #: What was done for each tensor of the model.
    actions: tuple[Action, ...]
    #: What was done for each tensor of the optimizer's state.
    optimizer_actions: tuple[Action, ...] = ()


def load(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    plan: TiePlan | None = None,
    external: Owners | None = None,
    verify: Verify = "full",
) -> Restored:
    """Read a checkpoint into a live model and optimizer. Called by all ranks, or by a single process.

    Works at another world size and into a model with other ties than were saved. Everything that can be known from
    the metadata, and every file's digest, is checked before the first tensor is read. Runs no code from the checkpoint.

    Ranks may hold different models, as the stages of a pipeline do; what a stage has under the name of an alias only is
    read from the tensor that is stored. Two parameters that were one when saved both get its optimizer state, and
    `Restored.optimizer_actions` says so.

    Example:
        >>> from tiepolicy_dcp import save
        >>> model = nn.ModuleDict({"embed": nn.Embedding(6, 2), "head": nn.Linear(2, 6, bias=False)})
        >>> model["head"].weight = model["embed"].weight
        >>> folder = save("tied", model=model, extra={"step": 7})
        >>> untied = nn.ModuleDict({"embed": nn.Embedding(6, 2), "head": nn.Linear(2, 6, bias=False)})
        >>> restored = load(folder, model=untied)
        >>> restored.extra["step"], torch.equal(untied["head"].weight, model["embed"].weight)
        (7, True)
        >>> restored.actions[1].note
        'head.weight and embed.weight were one tensor when saved; each gets its values'

    Args:
        folder: A checkpoint written by `save`, or a folder of plain DCP whose model lies under `model.`.
        model: What to load into, already materialised and sharded.
        optimizer: Its optimizer, to load as well.
        plan: The model's plan; made by the default policy if not given.
        external: The models that own what was left out of the checkpoint, by the names it was saved with. Their
            tensors are taken once they have the recorded digest, and are never written.
        verify: What to check of the files: size and digest, "size" only, or nothing, which is "off". Ranks share the
            work.

    Returns:
        What was done, and what rode along.

    Raises:
        MissingTensorError: If nothing in the checkpoint holds a tensor of the model or its optimizer state, or its
            owner is not given.
        ShapeMismatchError: If what holds it has another shape.
        DtypeMismatchError: If what holds it has another dtype.
        ExternalOwnerError: If its owner has other elements than were recorded.
        TieConflictError: If the checkpoint holds different values for names that are one tensor in the model, and no
            plugin chooses one.
        PlanMismatchError: If ranks that hold the same names made different plans.
        ManifestError: If the manifest contradicts itself or the metadata.
        CheckpointError: If the folder is no checkpoint, is damaged, or asks for more than reading tensors.
    """
    _read_early(Path(folder))
    plan = agreed_plan(lambda: plan or tiepolicy.plan(model, external=external), stages=True)
    model_state = ModelState(model, plan=plan, external=external)
    optimizer_state = None if optimizer is None else OptimizerState(model, optimizer, plan=plan)
    return _restore(Path(folder).absolute(), model_state, optimizer_state, verify)


def _read_early(folder: Path) -> None:
    """Have the disk read, while ranks plan, what this one most likely wants first; what is wrong is found later."""
    for name in (METADATA, MANIFEST, DIGESTS, VALUES, data_file(rank())):  # the short ones would wait behind the long
        with contextlib.suppress(CheckpointError, OSError), member(folder, name).open("rb") as file:
            read_soon(file.fileno(), 0, min(os.fstat(file.fileno()).st_size, READ_AHEAD_BYTES))


def _restore(folder: Path, model: ModelState, optimizer: OptimizerState | None, verify: Verify) -> Restored:
    plan = model.plan
    live, entries = observed(model, optimizer)
    in_place = are_in_place(live.values(), model.model)
    found, compared, optimized = _check(folder, plan, entries, external=model.external or {}, verify=verify)
    model_actions, optimizer_actions = found.actions, found.optimizer_actions
    states = {name: entry.tensor for name, entry in entries.items()}
    if compared:
        places = {name: entry.place for name, entry in entries.items()}
        model_actions = settle_model(found.stored, model_actions, live=live, taken=found.taken, plan=plan)
        optimizer_actions = settle_optimizer(found.stored, optimizer_actions, places=places, live=states, plan=plan)
    hyperparameters = _hyperparameters(found.stored, entries) if optimized else {}
    _read(found, model_actions, live, optimizer_actions, states)
    if in_place and not found.taken:
        plan.verify(model.model, after="its state was loaded")
    else:
        model.load_state_dict(live)
    if optimizer is not None:
        optimizer.fill(states, hyperparameters)
    return Restored(
        extra=found.extra,
        actions=performed(found.actions, model_actions),
        optimizer_actions=performed(found.optimizer_actions, optimizer_actions),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What is known of a checkpoint and a live model before any tensor is read."""

    stored: StoredTensors
    extra: Mapping[str, Any]
    actions: Sequence[Action]
    #: Tensors of other models, by the name they have here.
    taken: Mapping[str, torch.Tensor]
    optimizer_actions: Sequence[Action]


def _check(
    folder: Path, plan: TiePlan, entries: Mapping[str, StateEntry], *, external: Owners, verify: Verify
) -> tuple[_Found, bool, bool]:
    """Look at everything but the tensors. Called by all ranks; an error on one is an error on all.

    Returns:
        What was found; whether any rank has values to compare; whether any has an optimizer.
    """
    found: list[_Found] = []

    def look() -> None:
        records = _records(folder, verify)
        known = records or {}
        check_files_of = partial(check_files, folder, known, advice="Load an earlier checkpoint")
        # By number: a rank then reads the file into its host's memory that it will load most of.
        data = sorted(known.keys() - _READ_BY_ALL, key=lambda name: (name[:2] != "__", len(name), name))
        share = data[rank() :: num_ranks()]
        check_files_of(share, verify="size")
        check_files_of(known.keys() & _READ_BY_ALL, verify=verify)
        stored = StoredTensors(folder)
        check_recorded(folder, records, _READ_BY_ALL | stored.files)
        actions = reconcile(plan, _saved(folder, stored.specs("model.")))
        ties = {action.name: action.external for action in actions if action.external is not None}
        owners = {owner: observe(model) for owner, model in external.items()} if ties else {}
        taken = {name: take(tie, owners) for name, tie in ties.items()}
        optimizer_actions = reconcile_optimizer(entries, stored, SavedNames(actions, plan))
        extra = read_extra(folder) if (folder / MANIFEST).exists() else {}
        found.append(
            _Found(stored=stored, extra=extra, actions=actions, taken=taken, optimizer_actions=optimizer_actions)
        )
        check_files_of(share, verify=verify)  # the disk has been reading these all the while

    def check() -> tuple[bool, bool]:
        try:
            look()
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read: {error}. Nothing was loaded") from error
        kinds = {action.kind for action in (*found[0].actions, *found[0].optimizer_actions)}
        return ActionKind.COMPARE in kinds, bool(entries)

    compared, optimized = zip(*on_all_ranks(check), strict=True)
    return found[0], any(compared), any(optimized)


def _records(folder: Path, verify: Verify) -> Mapping[str, FileRecord] | None:
    """What to hold the files against; None if there is nothing."""
    if verify == "off":
        return None
    records = read_digests(folder)
    if records is None and (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{folder / DIGESTS} is missing: a part of the checkpoint was lost. Nothing was loaded. To load it "
            'unchecked, pass verify="off"'
        )
    if verify == "full" and records and not all(record.digest for record in records.values()):
        logger.warning("%s was saved without digests: only the sizes of its files are checked", folder)
    return records  # None if plain DCP wrote it


def _saved(folder: Path, stored: Mapping[str, TensorSpec]) -> TiePlan | Mapping[str, TensorSpec]:
    """The plan that was saved, if it describes what is there; names and shapes of a checkpoint without one."""
    manifest = read_manifest(folder)
    if manifest is None:
        return stored
    # A view has an entry of its own only if it is made of whole rows; what another model owns has none.
    optional = {alias.name for group in manifest.groups for alias in group.aliases if alias.view is not None}
    absent = {name for name in manifest.tensors if manifest.canonical(name) in manifest.owned_elsewhere}
    absent |= optional - set(stored)
    expected = {name: spec for name, spec in manifest.tensors.items() if name not in absent}
    if expected != stored:
        different = min(set(expected.items()) ^ set(stored.items()), key=lambda item: item[0])[0]
        raise ManifestError(
            f"{folder / MANIFEST} and the metadata beside it disagree about {different}: one of the files was replaced "
            "or edited. Nothing was loaded",
            names=[different],
        )
    return manifest


def _hyperparameters(stored: StoredTensors, entries: Mapping[str, StateEntry]) -> dict[str, dict[str, Any]]:
    """Read them, and refuse those of other parameters, before the model is touched. Called by all ranks."""
    encoded = {name: entry.tensor for name, entry in entries.items() if entry.group is not None}
    # The live values are about to be replaced, so they may differ.
    groups = joined([entry.group._replace(values={}) for entry in entries.values() if entry.group is not None])
    read_tensors(stored, {name: (f"optimizer.{name}", tensor) for name, tensor in encoded.items()})
    decoded: dict[str, dict[str, Any]] = {}

    def check() -> None:
        for name, group in zip(encoded, groups, strict=True):
            decoded[name] = decode(group, encoded[name], compared=True)

    on_all_ranks(check)
    return decoded


def _read(
    found: _Found,
    model_actions: Sequence[Action],
    live: dict[str, torch.Tensor],
    optimizer_actions: Sequence[Action],
    states: Mapping[str, torch.Tensor],
) -> None:
    """Fill the model and the optimizer's state, in place; what another model owns takes its place in `live`."""
    targets = {
        f"optimizer.{action.name}": (f"optimizer.{action.saved}", states[action.name]) for action in optimizer_actions
    }
    parts: list[tuple[Action, torch.Tensor]] = []
    specs = found.stored.specs("model.")
    for action in model_actions:
        if action.kind is ActionKind.LEAVE:
            continue
        if action.external is not None:
            live[action.name] = _placed(found.taken[action.name], live.get(action.name))
            continue
        tensor = live[action.name]
        if action.view is not None:
            tensor = _room_for(specs[action.saved], action, tensor)
            parts.append((action, tensor))
        targets[f"model.{action.name}"] = (f"model.{action.saved}", tensor)
    read_tensors(found.stored, targets)
    for action, whole in parts:
        with torch.no_grad():
            live[action.name].copy_(view_of(whole, action.view))


def _room_for(spec: TensorSpec, action: Action, like: torch.Tensor) -> torch.Tensor:
    """Memory to read a stored tensor into of which the model has only a part."""
    if isinstance(like, DTensor):
        raise CheckpointError(
            f"{action.name} is a part of {action.saved} in the checkpoint and sharded in the model; load it into an "
            "unsharded model first"
        )
    return torch.empty(spec.shape, dtype=spec.dtype, device=like.device)


def _placed(taken: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """Another model's tensor, sharded as the live one is."""
    if isinstance(like, DTensor) and not isinstance(taken, DTensor):
        return distribute_tensor(taken, like.device_mesh, like.placements)
    return taken
