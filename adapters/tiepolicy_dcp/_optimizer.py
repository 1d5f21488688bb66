"""Step 14, optimizer state across ties: which stored state each parameter gets, named as the checkpoint names it."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from tiepolicy import Action, ActionKind, TensorSpec, TiePlan
from tiepolicy.errors import MissingTensorError, ShapeMismatchError
from tiepolicy_dcp._reader import StoredTensors
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
