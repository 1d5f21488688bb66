"""Step 10, tying: names of a live module become one tensor, once it is known that no value is lost."""

from collections.abc import Callable, Container, Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from tiepolicy._conflict import Conflict, Moment, Resolver, settle
from tiepolicy._groups import Alias, TieGroup
from tiepolicy._observe import buffers_of, named_modules, parameters_of
from tiepolicy._values import first_difference, view_of
from tiepolicy.errors import MissingTensorError, TiePolicyError

#: Whose value all names of a tie get, without a look at the others: that of the name which is stored.
Keep = Literal["canonical"]


class _Place(NamedTuple):
    """Where a module holds a tensor."""

    module: nn.Module
    attribute: str
    tensor: torch.Tensor
    is_buffer: bool


class _Change(NamedTuple):
    """What will be done to one group, decided before anything is touched."""

    owner: torch.Tensor
    #: Values to copy into the owner first, where a plugin keeps those of an alias.
    values: torch.Tensor | None
    names: tuple[str, ...]
    parts: tuple[Alias, ...]


def share(
    model: nn.Module,
    groups: Sequence[TieGroup],
    *,
    holds: Callable[[TieGroup, Alias], bool],
    keep: Keep | None,
    moment: Moment,
    resolver: Resolver,
) -> None:
    """Make the names of each group one tensor where they are not; changes the module, all groups or none.

    Args:
        model: The module to change.
        groups: Names that are to be one tensor.
        holds: Whether an alias is tied already.
        keep: "canonical" to give all names of a group the canonical value; None to compare values first.
        moment: What is being done, for the message.
        resolver: Who is asked where values differ.

    Raises:
        ValueError: If `keep` is neither None nor "canonical".
        MissingTensorError: If the module lacks a name of a group.
        TieConflictError: If values differ and nobody says which to keep.
    """
    if keep not in (None, "canonical"):
        raise ValueError(f'keep is {keep!r}; it is "canonical", or None to compare the values')
    places = _places(model)
    for group in groups:
        check_present(group.names, places)
        _check_shapes(group, places)
    changes = [
        _change(group, {name: places[name][0].tensor for name in group.names}, holds, keep, moment, resolver)
        for group in groups
        if not all(holds(group, alias) for alias in group.aliases)
    ]
    for change in changes:
        _apply(change, places)


def _places(model: nn.Module) -> dict[str, list[_Place]]:
    """Where each name is held; behind wrappers, and with shared modules, that is more than one place."""
    places: dict[str, list[_Place]] = {}
    for path, module in named_modules(model):
        found = [_Place(module, attribute, tensor, is_buffer=False) for attribute, tensor in parameters_of(module)]
        found += [_Place(module, attribute, tensor, is_buffer=True) for attribute, tensor in buffers_of(module)]
        for place in found:
            places.setdefault(f"{path}.{place.attribute}" if path else place.attribute, []).append(place)
    return places


def _change(
    group: TieGroup,
    tensors: dict[str, torch.Tensor],
    holds: Callable[[TieGroup, Alias], bool],
    keep: Keep | None,
    moment: Moment,
    resolver: Resolver,
) -> _Change:
    whole = [alias for alias in group.aliases if alias.view is None]
    owner = tensors[group.canonical]
    if owner.is_meta and keep is None:  # of several tensors only those with data have something to lose
        owner = next((tensors[alias.name] for alias in whole if not tensors[alias.name].is_meta), owner)
    values: torch.Tensor | None = None
    untied = set()
    for alias in group.aliases:
        tensor = tensors[alias.name]
        if keep is not None or tensor is owner or holds(group, alias):
            continue
        difference = _difference(view_of(owner, alias.view), tensor)
        if difference is None:
            continue
        conflict = Conflict(
            canonical=group.canonical,
            alias=alias.name,
            difference=difference,
            moment=moment,
            whole=alias.view is None,
        )
        kept = settle(conflict, resolver)
        if kept is None:
            untied.add(alias.name)
        elif kept == alias.name:
            values = tensor
    joined = [alias for alias in group.aliases if alias.name not in untied]
    names = (group.canonical, *(alias.name for alias in joined if alias.view is None))
    return _Change(owner, values, names, tuple(alias for alias in joined if alias.view is not None))


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> str | None:
    """Where two tensors differ in what tying them would settle; None if nothing is lost by it."""
    if (expected.shape, expected.dtype) == (actual.shape, actual.dtype) and actual.is_meta:
        return None
    if expected.device != actual.device:
        return f"one lies on {expected.device}, the other on {actual.device}"
    both_parameters = isinstance(expected, nn.Parameter) and isinstance(actual, nn.Parameter)
    if both_parameters and expected.requires_grad != actual.requires_grad:
        return "one is frozen (requires_grad is False) and the other is not"
    return first_difference(expected, actual)


def _apply(change: _Change, places: dict[str, list[_Place]]) -> None:
    if change.values is not None:
        with torch.no_grad():
            change.owner.copy_(change.values)
    held = [place for name in change.names for place in places[name]]
    owner = change.owner
    trained = next((place.tensor for place in held if not place.is_buffer), None)
    if trained is not None and not isinstance(owner, nn.Parameter):
        # A buffer is the owner: its parameters become one, not one each.
        owner = nn.Parameter(owner, requires_grad=trained.requires_grad)
    for place in held:
        _put(place, owner)
    for alias in change.parts:
        for place in places[alias.name]:
            _put(place, view_of(change.owner.detach(), alias.view))


def _put(place: _Place, tensor: torch.Tensor) -> None:
    if place.tensor is tensor:
        return
    if place.is_buffer:
        setattr(place.module, place.attribute, tensor.detach() if isinstance(tensor, nn.Parameter) else tensor)
        return
    if not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=place.tensor.requires_grad)
    setattr(place.module, place.attribute, tensor)


def check_present(tied: Sequence[str], present: Container[str]) -> None:
    """Refuse a model that lacks one of some `tied` names.

    Raises:
        MissingTensorError: If one is not among those that are `present`.
    """
    missing = [name for name in tied if name not in present]
    if missing:
        raise MissingTensorError(
            f"{' and '.join(missing)} of the tied {' and '.join(tied)} is not in the model: it is another model than "
            "the plan was made for, or a part of it; plan the part",
            names=missing,
        )


def _check_shapes(group: TieGroup, places: dict[str, list[_Place]]) -> None:
    whole = (group.canonical, *(alias.name for alias in group.aliases if alias.view is None))
    if len({places[name][0].tensor.shape for name in whole}) > 1:
        raise TiePolicyError(f"{list(group.names)} no longer have one shape and cannot be tied", names=group.names)
