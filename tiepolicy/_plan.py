"""Step 10, the plan: all tied groups and all refused claims of one model, and what can be done with them."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tiepolicy import _manifest, _table
from tiepolicy._evidence import relate, view_within
from tiepolicy._facts import TensorSpec
from tiepolicy._groups import Alias, RefusedClaim, TieGroup
from tiepolicy._observe import Facts, observe
from tiepolicy._values import first_difference, view_of
from tiepolicy._verdicts import Reason, Verdict
from tiepolicy.errors import BrokenTieError, MissingTensorError, ShapeMismatchError, TieConflictError


@dataclass(frozen=True, kw_only=True, eq=False)
class TiePlan:
    """Which names of one model are one tensor, and which were claimed to be but are not.

    Made by `tiepolicy.plan`. Plans are equal if the models they describe have the same names, shapes and dtypes and
    the same decisions about them.
    """

    #: Global shape and dtype of every name, sorted by name.
    tensors: Mapping[str, TensorSpec]
    #: Sorted by canonical name.
    groups: tuple[TieGroup, ...]
    refused: tuple[RefusedClaim, ...]

    @functools.cached_property
    def _places(self) -> dict[str, tuple[TieGroup, Alias | None]]:
        places: dict[str, tuple[TieGroup, Alias | None]] = {}
        for group in self.groups:
            places[group.canonical] = (group, None)
            places.update((alias.name, (group, alias)) for alias in group.aliases)
        return places

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the plan as hexadecimal; equal on all ranks that made the same plan."""
        return hashlib.sha256(json.dumps(self.to_manifest(), sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TiePlan):
            return NotImplemented
        return (dict(self.tensors), self.groups, self.refused) == (dict(other.tensors), other.groups, other.refused)

    def __hash__(self) -> int:
        return hash((self.groups, self.refused))

    def __str__(self) -> str:
        return _table.render(self.tensors, self.groups, self.refused, bytes_saved=self.bytes_saved)

    @property
    def bytes_saved(self) -> int:
        """Bytes that a checkpoint of the whole model saves by storing each tied tensor once."""
        return sum(self.tensors[alias.name].nbytes for group in self.groups for alias in group.aliases)

    def canonical(self, name: str) -> str:
        """The name under which the tensor called `name` is stored: itself unless it is an alias."""
        place = self._places.get(name)
        return name if place is None else place[0].canonical

    def stored(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor that a checkpoint of the whole model holds, by name."""
        return {name: spec for name, spec in self.tensors.items() if self.canonical(name) == name}

    def whole_aliases(self, canonical: str) -> tuple[Alias, ...]:
        """The aliases that are the whole of a stored tensor."""
        return tuple(alias for alias in self._aliases(canonical) if alias.view is None)

    def part_aliases(self, canonical: str) -> tuple[Alias, ...]:
        """The aliases that are views of a part of a stored tensor, or of its elements in another order."""
        return tuple(alias for alias in self._aliases(canonical) if alias.view is not None)

    def _aliases(self, canonical: str) -> tuple[Alias, ...]:
        place = self._places.get(canonical)
        return () if place is None else place[0].aliases

    def verdict(self, a: str, b: str) -> Verdict | None:
        """The decision on two names, in either order; None if nobody claims that they are one tensor."""
        group_a, group_b = self._places.get(a), self._places.get(b)
        if group_a is not None and group_b is not None and group_a[0] is group_b[0]:
            alias = group_a[1] or group_b[1]
            return Verdict.alias(alias.reason if alias else Reason.SAME_OBJECT, f"both are {group_a[0].canonical}")
        for refusal in self.refused:
            if set(refusal.claim.names) == {a, b}:
                return refusal.verdict
        return None

    def compact(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Leave out the aliases of a state dict.

        Copies no tensor and changes nothing: the result is a new mapping of the same tensors. An alias whose canonical
        name is not in the mapping stays. An alias whose tensor no longer shares memory with the canonical one (the
        state was gathered, cloned or offloaded) is compared with it byte by byte and left out if equal.

        Raises:
            TieConflictError: If tied names hold different values.
        """
        compacted = dict(state_dict)
        for group in self.groups:
            if group.canonical not in compacted:
                continue
            for alias in group.aliases:
                if alias.name in compacted:
                    _check_holds_alias(state_dict, group, alias)
                    del compacted[alias.name]
        return compacted

    def expand(self, compacted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give every alias back whose canonical name is in the mapping; the inverse of `compact`.

        The tensors given back are the canonical ones or views of them: no memory is copied.

        Raises:
            ShapeMismatchError: If a canonical tensor has another shape than the plan says.
            TieConflictError: If an alias is in the mapping with other values than its canonical tensor.
        """
        expanded = dict(compacted)
        for group in self.groups:
            owner = compacted.get(group.canonical)
            if owner is None:
                continue
            _check_shape(group.canonical, owner, self.tensors[group.canonical])
            for alias in group.aliases:
                if alias.name in compacted:
                    _check_holds_alias(compacted, group, alias)
                expanded[alias.name] = view_of(owner, alias.view)
        return expanded

    def verify(self, model: nn.Module | Mapping[str, torch.Tensor], *, after: str = "") -> None:
        """Check that every tie of the plan still holds in a model.

        Args:
            model: The module or mapping to look at.
            after: What was done to it since the plan was made, such as `to_empty()`, for the message.

        Raises:
            MissingTensorError: If a tied name is gone.
            BrokenTieError: If names that were one tensor no longer are.
        """
        facts = observe(model)
        for group in self.groups:
            for alias in group.aliases:
                _check_present((alias.name, group.canonical), facts)
                if not _holds(facts, group, alias):
                    raise BrokenTieError(
                        f"{alias.name} and {group.canonical} were one tensor{f' before {after}' if after else ''} and "
                        "no longer are: training would let them drift apart. Tie them again before the optimizer is "
                        "built",
                        names=[alias.name, group.canonical],
                    )

    def to_manifest(self) -> dict[str, Any]:
        """The plan as JSON-ready values; `from_manifest` reads it."""
        return _manifest.write(self.tensors, self.groups, self.refused)

    @staticmethod
    def from_manifest(manifest: Mapping[str, Any]) -> "TiePlan":
        """Read what `to_manifest` wrote.

        Raises:
            ManifestError: If it is malformed, contradicts itself, or is of a newer version.
        """
        tensors, groups, refused = _manifest.read(manifest)
        return TiePlan(tensors=tensors, groups=groups, refused=refused)


def _check_holds_alias(state_dict: Mapping[str, torch.Tensor], group: TieGroup, alias: Alias) -> None:
    """Refuse a state dict in which an alias could not be rebuilt from the canonical tensor, bit for bit."""
    owner, tensor = state_dict[group.canonical], state_dict[alias.name]
    if _holds(Facts({group.canonical: owner, alias.name: tensor}, {}), group, alias):
        return
    difference = first_difference(view_of(owner, alias.view), tensor)
    if difference is not None:
        raise TieConflictError(
            f"{alias.name} and {group.canonical} are one tensor in the plan, but their values differ: {difference}. "
            "Keep one of them (drop the other name from the state dict), tie the model again, or plan it anew if it "
            "was untied on purpose",
            names=[alias.name, group.canonical],
        )


def _holds(facts: Facts, group: TieGroup, alias: Alias) -> bool:
    owner, part = facts[group.canonical], facts[alias.name]
    reason = relate(owner, part)
    if alias.view is None:
        return reason in (Reason.SAME_OBJECT, Reason.SAME_STORAGE)
    return reason is Reason.VIEW_OF and view_within(owner, part) == alias.view


def _check_present(names: tuple[str, ...], facts: Facts) -> None:
    missing = [name for name in names if name not in facts]
    if missing:
        raise MissingTensorError(
            f"{' and '.join(missing)} of the tied {' and '.join(names)} is not in the model: it is another model than "
            "the plan was made for",
            names=missing,
        )


def _check_shape(name: str, tensor: torch.Tensor, planned: TensorSpec) -> None:
    if tuple(tensor.shape) != planned.shape:
        raise ShapeMismatchError(
            f"{name} has shape {tuple(tensor.shape)}, but was {planned.shape} when the plan was made: the state "
            "belongs to another model, or its vocabulary was resized; plan the model it belongs to",
            names=[name],
        )
