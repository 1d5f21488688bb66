"""Step 15, conflicts: stored values that are one in the model are read aside and compared, before it is touched."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from tiepolicy import Action, ActionKind, Conflict, Moment, TiePlan, View, first_difference, settle, view_of
from tiepolicy.errors import TieConflictError
from tiepolicy_dcp._ranks import on_all_ranks
from tiepolicy_dcp._reader import StoredTensors, read_tensors


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
    if not any(on_all_ranks(lambda: bool(pairs))):
        return {}
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
