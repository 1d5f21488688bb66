"""Step 19, reconciling: a live plan against what a checkpoint holds becomes a list of actions, or one clear error."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tiepolicy._claims import Reason
from tiepolicy._conflict import Missing, Way, settle_missing
from tiepolicy._evidence import View
from tiepolicy._external import ExternalTie
from tiepolicy._facts import TensorSpec
from tiepolicy._groups import RefusedClaim
from tiepolicy._plan import TiePlan
from tiepolicy.errors import (
    DtypeMismatchError,
    ExternalOwnerError,
    MissingTensorError,
    ObservationError,
    PluginError,
    ShapeMismatchError,
)


class ActionKind(StrEnum):
    """What a loader has to do with one stored tensor."""

    #: Read it into the live tensor.
    LOAD = "load"
    #: Read it, or a view of it, into a live tensor that the checkpoint knows as its alias.
    COPY = "copy"
    #: Read it aside; the live tensor, once loaded, must hold the same bits.
    COMPARE = "compare"
    #: Take it from the model that owns it, after its digest matches; read nothing.
    EXTERNAL = "external"
    #: Read nothing: the checkpoint does not hold the tensor, and a plugin leaves the live one as it is.
    LEAVE = "leave"


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing to do to bring a checkpoint into a live model."""

    kind: ActionKind
    #: Name in the checkpoint; of a `leave` action, which reads none, the live name.
    saved: str
    #: Name in the live model.
    name: str
    #: Which part of the stored tensor is meant; None for the whole.
    view: View | None = None
    #: Why, where it is not plain from the names.
    note: str = ""
    #: Whose the tensor is, of an `external` action.
    external: ExternalTie | None = None


def reconcile(plan: TiePlan, saved: TiePlan | Mapping[str, TensorSpec]) -> list[Action]:
    """Hold the tensors of a checkpoint against a live plan.

    Example:
        A checkpoint that holds only the alias of a tie.

        >>> import tiepolicy, torch
        >>> embed = torch.zeros(6, 2)
        >>> plan = tiepolicy.plan({"embed.weight": embed, "head.weight": embed})
        >>> (action,) = reconcile(plan, {"head.weight": TensorSpec((6, 2), torch.float32)})
        >>> str(action.kind), action.saved, action.name
        ('load', 'head.weight', 'embed.weight')

    Args:
        plan: The plan of the model that is loaded into.
        saved: The plan in the checkpoint's manifest; or, for a checkpoint without one, shape and dtype of every
            stored tensor by name.

    Returns:
        For each tensor of the live model one `load`, `copy`, `external` or `leave`, and one `compare` for each further
        stored tensor that the live model has under the same storage. Sorted by live name. What is stored of a tensor
        that the live model shares with another model is compared, never loaded: that would overwrite the other model.

    Raises:
        MissingTensorError: If nothing in the checkpoint holds a tensor of the model, or the model has no place for a
            companion of its tensors, and no plugin (`tiepolicy_resolve`) says what to do.
        ShapeMismatchError: If what holds it has another shape.
        DtypeMismatchError: If what holds it has another dtype.
        ExternalOwnerError: If the model and the checkpoint know different tensors of another model by one name.
        PluginError: If a plugin answers about a missing tensor what cannot be done.
        ObservationError: If `plan` or `saved` is something else.
    """
    _check_known(plan, saved)
    stored = saved.stored() if isinstance(saved, TiePlan) else saved
    theirs = {tie.name: tie for tie in saved.external if tie.digest} if isinstance(saved, TiePlan) else {}
    mine = {tie.name: tie for tie in plan.external}
    refused = _refused_by_name([*plan.refused, *(saved.refused if isinstance(saved, TiePlan) else ())])
    actions: list[Action] = []
    for name in (name for name in plan.tensors if plan.canonical(name) == name):
        members = [name, *(alias.name for alias in plan.whole_aliases(name))]
        present = [member for member in members if member in stored]
        tie = next((theirs[member] for member in members if member in theirs), None)
        if name in mine or (tie is not None and not present):
            actions.append(_from_owner(name, mine.get(name), tie))
            present.insert(0, name)  # whatever is stored of it is compared, not loaded
        elif present:
            actions.append(Action(kind=ActionKind.LOAD, saved=present[0], name=name))
        else:
            refusals = refused.get(name, [])
            actions.append(_derive(name, members, refusals, saved) or _resolve(name, refusals, plan, stored))
        others = present[1:] + [alias.name for alias in plan.part_aliases(name) if alias.name in stored]
        _check_filled(actions[-1], others)
        actions += [
            Action(kind=ActionKind.COMPARE, saved=other, name=other, note=f"one tensor with {name} in the model")
            for other in others
        ]
    if isinstance(saved, TiePlan):
        _check_companions(plan, saved, stored)
    for action in actions:
        if action.kind not in (ActionKind.EXTERNAL, ActionKind.LEAVE):
            _check_fits(action, plan, stored)
    return sorted(actions, key=lambda action: (action.name, action.kind is ActionKind.COMPARE))


def _refused_by_name(refused: list[RefusedClaim]) -> dict[str, list[RefusedClaim]]:
    found: dict[str, list[RefusedClaim]] = {}
    for refusal in refused:
        for name in refusal.claim.names:
            found.setdefault(name, []).append(refusal)
    return found


def _check_known(plan: object, saved: object) -> None:
    specs = saved.values() if isinstance(saved, Mapping) else ()
    is_known = isinstance(saved, TiePlan | Mapping) and all(hasattr(spec, "dtype") for spec in specs)
    if not isinstance(plan, TiePlan) or not is_known:
        raise ObservationError(
            f"reconcile takes a plan, and a plan (TiePlan.from_manifest) or a TensorSpec for each name, not a "
            f"{type(plan).__name__} and a {type(saved).__name__} of something else"
        )


def _from_owner(name: str, mine: ExternalTie | None, theirs: ExternalTie | None) -> Action:
    """Take a tensor from its owner; the checkpoint's record counts, as it says what was trained with."""
    if mine and theirs and mine.digest and theirs.digest and mine.digest != theirs.digest:
        raise ExternalOwnerError(
            f"{name} belongs to {mine.source} in the model and to {theirs.source} in the checkpoint, but they are not "
            f"the same tensor: SHA-256 {mine.digest[:12]} and {theirs.digest[:12]}. Nothing was loaded. Give the model "
            "that the checkpoint was made with",
            names=[name],
        )
    tie = theirs or mine
    assert tie is not None
    note = f"belongs to {tie.source}"
    return Action(kind=ActionKind.EXTERNAL, saved=tie.owner_name, name=name, note=note, external=tie)


def _derive(
    name: str, members: list[str], refusals: list[RefusedClaim], saved: TiePlan | Mapping[str, TensorSpec]
) -> Action | None:
    """Find a tensor that is stored under another name only."""
    if isinstance(saved, TiePlan):
        for alias in filter(None, map(saved.alias, members)):
            canonical = saved.canonical(alias.name)
            note = f"{alias.name} and {canonical} were one tensor when saved; each gets its values"
            return Action(kind=ActionKind.COPY, saved=canonical, name=name, view=alias.view, note=note)
    else:
        for refusal in refusals:
            claim, reason = refusal.claim, refusal.verdict.reason
            partner = next((partner for partner in claim.names if partner != name and partner in saved), None)
            if partner is not None and reason is Reason.DECLARED_NOT_TIED:  # they could be one in the live model
                claimant = claim.detail or claim.source
                note = f"assumed one tensor with {partner} when saved, as {claimant} claims; both get its values"
                return Action(kind=ActionKind.COPY, saved=partner, name=name, note=note)
    return None


def _resolve(name: str, refusals: list[RefusedClaim], plan: TiePlan, stored: Mapping[str, TensorSpec]) -> Action:
    """What the plugins say about a tensor that is not stored under any name; an error if they say nothing."""
    missing = Missing(name=name, spec=plan.tensors[name], stored=stored, refused=tuple(map(str, refusals)))
    resolution = settle_missing(missing, plan.resolver)
    if resolution is None:
        raise MissingTensorError(_sentence(missing, plan), names=[name])
    if resolution.way is Way.LEAVE:
        note = "it is not in the checkpoint, and a plugin leaves it as it is"
        return Action(kind=ActionKind.LEAVE, saved=name, name=name, note=note)
    note = f"it is not in the checkpoint, and a plugin takes the values of {resolution.name}"
    return Action(kind=ActionKind.COPY, saved=resolution.name, name=name, note=note)


def _check_filled(action: Action, others: list[str]) -> None:
    """A tensor that is left as it is can hold nothing of what is stored of its parts."""
    if action.kind is ActionKind.LEAVE and others:
        raise PluginError(
            f"tiepolicy_resolve leaves {action.name} as it is, but the checkpoint holds {' and '.join(others)}, "
            "which is a part of it in the model. Nothing was loaded",
            names=[action.name, *others],
        )


def _check_companions(plan: TiePlan, saved: TiePlan, stored: Mapping[str, TensorSpec]) -> None:
    """A part of a model needs the companions of what it has, whoever else may have them too."""
    for companion in saved.companions:
        needed_by = [name for name in companion.of if name in plan.tensors]
        if not needed_by or companion.name in plan.tensors:
            continue
        missing = Missing(name=companion.name, spec=saved.tensors[companion.name], stored=stored)
        resolution = plan.resolver(missing)
        if resolution is None or resolution.way is not Way.LEAVE:
            raise MissingTensorError(
                f"the checkpoint holds {missing.name} {missing.spec.shape}, which is needed to use "
                f"{' and '.join(needed_by)}, and the model has no tensor of that name. Nothing was loaded. Build the "
                "model with it, as a persistent buffer",
                names=[missing.name, *needed_by],
            )


def _sentence(missing: Missing, plan: TiePlan) -> str:
    why = f" It cannot be derived from another tensor: {missing.refused[0]}." if missing.refused else ""
    for companion in plan.companions:
        if companion.name == missing.name:
            why += f" Without it the rows of {' and '.join(companion.of)} cannot be told."
    return (
        f"{missing.name} {missing.spec.shape} is not in the checkpoint, under its own name or an alias.{why} Nothing "
        "was loaded. Load a checkpoint that holds it, or initialise it and load the other names only"
    )


def _check_fits(action: Action, plan: TiePlan, stored: Mapping[str, TensorSpec]) -> None:
    live, found = plan.tensors[action.name], stored[action.saved]
    shape = found.shape if action.view is None else action.view.shape
    if shape != live.shape:
        source = action.saved if action.saved == action.name else f"{action.saved}, which stands for {action.name},"
        raise ShapeMismatchError(
            f"{source} has shape {shape} in the checkpoint, the model expects {live.shape}: "
            f"{_likely_cause(live, shape)}. Nothing was loaded",
            names=[action.name],
        )
    if found.dtype != live.dtype:
        raise DtypeMismatchError(
            f"{action.saved} is {found.dtype} in the checkpoint, the model's {action.name} is {live.dtype}: convert "
            f"the model with .to({found.dtype}) before loading. Nothing was loaded",
            names=[action.name],
        )


def _likely_cause(live: TensorSpec, shape: tuple[int, ...]) -> str:
    if len(shape) == len(live.shape) == 1:
        return "the two differ in length, as with another vocabulary or model size"
    if len(shape) == len(live.shape) and shape[1:] == live.shape[1:]:
        return "the two differ in rows only, as with another (draft) vocabulary size or its padding"
    if len(shape) == len(live.shape) and shape[:1] == live.shape[:1]:
        return "the two differ in width, as with another model size"
    return "the checkpoint belongs to another model"
