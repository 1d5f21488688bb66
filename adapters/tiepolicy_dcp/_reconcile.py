"""Step 13, reconciling: which stored state each parameter gets; what is stored twice for one tensor is compared first.

Parameters are called as the checkpoint calls them. Values to compare are read aside, before the model is touched.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from tiepolicy import (
    Action,
    ActionKind,
    Conflict,
    Moment,
    TensorSpec,
    TiePlan,
    View,
    first_difference,
    settle,
    view_of,
)
from tiepolicy.errors import MissingTensorError, ShapeMismatchError, TieConflictError
from tiepolicy_dcp._ranks import on_all_ranks
from tiepolicy_dcp._reader import StoredTensors, read_tensors
from tiepolicy_dcp._state import StateEntry

_AFRESH = "Nothing was loaded. Load the model without its optimizer to start it afresh"


class SavedNames:
    """What the checkpoint calls the parameters of the live model, by what was decided for the model's tensors.

    Args:
        actions: What `tiepolicy.reconcile` decided.
        plan: The live model's plan.
    """

    def __init__(self, actions: Iterable[Action], plan: TiePlan) -> None:
        self._first: dict[str, Action] = {}
        self._further: dict[str, list[str]] = {}
        for action in actions:
            if action.kind is ActionKind.COMPARE:
                self._further.setdefault(plan.canonical(action.name), []).append(action.saved)
            elif action.kind is not ActionKind.EXTERNAL:
                self._first[action.name] = action

    def of(self, name: str) -> list[str]:
        """Every name under which the checkpoint may hold the state of one parameter, the likeliest first."""
        first = [self._first[name].saved] if name in self._first else [name]
        return first + self._further.get(name, [])

    def copied_from(self, name: str) -> Action | None:
        """How a parameter gets its values that had none of its own when saved; None if it had."""
        action = self._first.get(name)
        return action if action is not None and action.kind is ActionKind.COPY else None


def reconcile_optimizer(entries: Mapping[str, StateEntry], stored: StoredTensors, names: SavedNames) -> list[Action]:
    """Hold the optimizer state of a checkpoint against that of a live model.

    Args:
        entries: The live state by flat name.
        stored: The checkpoint.
        names: What it calls the parameters.

    Returns:
        For each flat name one `load`, or one `copy` where two parameters were one when saved; and one `compare` for
        each further state that is stored for one parameter.

    Raises:
        MissingTensorError: If the checkpoint holds no such state.
        ShapeMismatchError: If it has another shape.
    """
    specs = stored.specs("optimizer.")
    actions: list[Action] = []
    for flat, (tensor, place, _) in entries.items():
        copied = None if place is None else names.copied_from(place[0])
        candidates = [flat] if place is None else [f"state.{name}.{place[1]}" for name in names.of(place[0])]
        if (
            copied is not None
            and flat in specs
            and not stored.same_bytes(f"optimizer.{flat}", f"optimizer.{candidates[0]}")
        ):
            candidates, copied = [flat], None  # two parameters on one storage had a state each
        present = [candidate for candidate in candidates if candidate in specs]
        if not present:
            raise MissingTensorError(_missing(flat, specs, stored.objects), names=[flat])
        if copied is not None and copied.view is not None:
            raise MissingTensorError(
                f"{copied.name} was a part of {copied.saved} when it was saved and had no optimizer state of its own, "
                f"so there is no {flat}. {_AFRESH}",
                names=[flat],
            )
        _check_shapes(flat, tensor, {candidate: specs[candidate] for candidate in present})
        kind, note = ActionKind.LOAD, ""
        if copied is not None:
            kind = ActionKind.COPY
            note = f"{copied.name} and {copied.saved} were one parameter when saved; each gets its state"
        actions.append(Action(kind=kind, saved=present[0], name=flat, note=note))
        actions += [Action(kind=ActionKind.COMPARE, saved=other, name=flat) for other in present[1:]]
    return actions


def _check_shapes(flat: str, tensor: torch.Tensor, specs: Mapping[str, TensorSpec]) -> None:
    for name, spec in specs.items():
        if spec.shape != tuple(tensor.shape):
            raise ShapeMismatchError(
                f"the optimizer state {name} has shape {spec.shape} in the checkpoint, the live one "
                f"{tuple(tensor.shape)}. Nothing was loaded",
                names=[flat],
            )


def _missing(flat: str, stored: Mapping[str, TensorSpec], objects: Sequence[str]) -> str:
    why = "the optimizer was of another kind, or its parameters were grouped differently"
    if any(name.startswith("optimizer.param_groups") for name in objects):
        why = "its param_groups are pickled objects, and pickles are never run"
    elif not stored:
        why = "the checkpoint holds no optimizer"
    elif any(name.endswith(flat[flat.rindex(".") :]) for name in stored):
        why = "the parameter had no state when it was saved"
    return f"the optimizer state {flat} is not in the checkpoint: {why}. {_AFRESH}"


class _Pair(NamedTuple):
    """Two stored values that have to be equal."""

    #: Stored name of the first, None if the tensor holds it already.
    first: str | None
    owner: torch.Tensor
    second: str
    #: How the second lies within the first; None if it is the whole of it.
    view: View | None = None


def settle_model(
    stored: StoredTensors,
    actions: Sequence[Action],
    *,
    live: Mapping[str, torch.Tensor],
    taken: Mapping[str, torch.Tensor],
    plan: TiePlan,
) -> list[Action]:
    """Compare the values that a checkpoint has for one tensor of the model. Called by all ranks.

    Args:
        stored: The checkpoint.
        actions: What `tiepolicy.reconcile` decided.
        live: The model's tensors by canonical name.
        taken: What comes from other models, by the name it has here.
        plan: The model's plan.

    Returns:
        The actions that fill the model; where a plugin prefers the value of an alias, that is loaded instead.

    Raises:
        TieConflictError: On every rank, if values differ and no plugin chooses one.
    """
    fill, compared = _split(actions)
    views = {alias.name: alias.view for group in plan.groups for alias in group.aliases}
    pairs: dict[Action, _Pair] = {}
    for action in compared:
        name = plan.canonical(action.name)
        first = None if name in taken else f"model.{fill[name].saved}"
        owner = taken[name] if name in taken else torch.empty_like(live[name])
        pairs[action] = _Pair(first, owner, f"model.{action.saved}", views.get(action.name))
    for action, difference in _differences(stored, pairs).items():
        name = plan.canonical(action.name)
        tie = fill[name].external
        # The value of an alias may be kept only if that writes to no other model and leaves no rest.
        whole = tie is None and action.name in {alias.name for alias in plan.whole_aliases(name)}
        first = fill[name].saved if tie is None else tie.source
        conflict = Conflict(canonical=first, alias=action.saved, difference=difference, moment=Moment.LOAD, whole=whole)
        kept = _kept(conflict, plan)
        fill[name] = replace(fill[name], note=f"of two values, a plugin keeps that of {kept}")
        if kept == action.saved:
            fill[name] = replace(fill[name], kind=ActionKind.LOAD, saved=action.saved, view=None)
    return list(fill.values())


def settle_optimizer(
    stored: StoredTensors,
    actions: Sequence[Action],
    *,
    places: Mapping[str, tuple[str, str] | None],
    live: Mapping[str, torch.Tensor],
    plan: TiePlan,
) -> list[Action]:
    """Compare the states that a checkpoint has for one parameter of the optimizer. Called by all ranks.

    Args:
        stored: The checkpoint.
        actions: What `reconcile_optimizer` decided.
        places: Parameter and key of each flat name; None for hyperparameters.
        live: The live state by flat name.
        plan: The model's plan.

    Returns:
        The actions that fill the state. Where a plugin prefers the state of an alias, all of that is loaded.

    Raises:
        TieConflictError: On every rank, if states differ and no plugin chooses one.
    """
    fill, compared = _split(actions)
    pairs = {
        action: _Pair(
            f"optimizer.{fill[action.name].saved}", torch.empty_like(live[action.name]), f"optimizer.{action.saved}"
        )
        for action in compared
    }
    preferred: dict[tuple[str, str], str] = {}
    for action, difference in _differences(stored, pairs).items():
        one, other, key = _parameters(fill[action.name], action, places)
        if (one, other) not in preferred:
            conflict = Conflict(canonical=one, alias=other, difference=f"{key} {difference}", moment=Moment.OPTIMIZER)
            preferred[one, other] = _kept(conflict, plan)
    chosen = dict(fill)
    for action in compared:
        one, other, _ = _parameters(fill[action.name], action, places)
        kept = preferred.get((one, other))
        if kept is not None:
            saved = action.saved if kept == other else fill[action.name].saved
            note = f"of two states, a plugin keeps that of {kept}"
            chosen[action.name] = replace(fill[action.name], saved=saved, note=note)
    return list(chosen.values())


def performed(decided: Sequence[Action], settled: Sequence[Action]) -> tuple[Action, ...]:
    """What was `decided`, with the actions that were `settled` for those that fill the same names."""
    fill = {action.name: action for action in settled}
    return tuple(action if action.kind is ActionKind.COMPARE else fill[action.name] for action in decided)


def _split(actions: Sequence[Action]) -> tuple[dict[str, Action], list[Action]]:
    """The action that fills each name, and those that compare."""
    fill = {action.name: action for action in actions if action.kind is not ActionKind.COMPARE}
    return fill, [action for action in actions if action.kind is ActionKind.COMPARE]


def _parameters(first: Action, second: Action, places: Mapping[str, tuple[str, str] | None]) -> tuple[str, str, str]:
    """Whose states two actions are about, by the names in the checkpoint, and which of the states."""
    place = places[first.name]
    assert place is not None, "hyperparameters have one name"
    one, other = (action.saved.removeprefix("state.").removesuffix(f".{place[1]}") for action in (first, second))
    return one, other, place[1]


def _kept(conflict: Conflict, plan: TiePlan) -> str:
    """The name whose value a plugin wants."""
    kept = settle(conflict, plan.resolver)
    if kept is None:
        raise TieConflictError(
            f"a plugin wants {conflict.canonical} and {conflict.alias} untied, but they are one tensor in the model: "
            "untie the model before its plan is made. Nothing was loaded",
            names=conflict.names,
        )
    return kept


def _differences(stored: StoredTensors, pairs: Mapping[Action, _Pair]) -> dict[Action, str]:
    """Where the two of each pair differ on any rank; on the lowest such rank, if on several."""
    seconds = [torch.empty_like(view_of(pair.owner, pair.view)) for pair in pairs.values()]
    targets: dict[str, tuple[str, torch.Tensor]] = {}
    for index, (pair, second) in enumerate(zip(pairs.values(), seconds, strict=True)):
        targets[f"{index} second"] = pair.second, second
        if pair.first is not None:
            targets[f"{index} first"] = pair.first, pair.owner
    read_tensors(stored, targets)

    def compare() -> dict[tuple[str, str], str]:
        found: dict[tuple[str, str], str] = {}
        for (action, pair), second in zip(pairs.items(), seconds, strict=True):
            difference = first_difference(view_of(pair.owner, pair.view), second)
            if difference is not None:
                found[action.name, action.saved] = difference
        return found

    merged: dict[tuple[str, str], str] = {}
    for of_rank in reversed(on_all_ranks(compare)):
        merged |= of_rank
    by_name = {(action.name, action.saved): action for action in pairs}
    return {by_name[key]: difference for key, difference in merged.items() if key in by_name}
