"""Step 14, the plan: all tied groups and all refused claims of one model, and what can be done with them."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tiepolicy import _display, _manifest
from tiepolicy._claims import Reason, Verdict
from tiepolicy._conflict import Conflict, Moment, Resolver, settle, unresolved
from tiepolicy._external import ExternalTie, Owners, check_digest, observe_owners, take
from tiepolicy._facts import TensorSpec
from tiepolicy._groups import Alias, Companion, RefusedClaim, TieGroup, holds, is_one
from tiepolicy._observe import Facts, TensorSource, observe
from tiepolicy._retie import Keep, check_present, share
from tiepolicy._values import first_difference, view_of
from tiepolicy.errors import BrokenTieError, ObservationError, ShapeMismatchError


@dataclass(frozen=True, kw_only=True, eq=False)
class TiePlan:
    """Which names of one model are one tensor, and which were claimed to be but are not.

    Made by `tiepolicy.plan`. Plans are equal if the models they describe have the same names, shapes and dtypes and
    the same decisions about them. A plan keeps no tensor.
    """

    #: Global shape and dtype of every name when the plan was made, sorted by name.
    tensors: Mapping[str, TensorSpec]
    #: Sorted by canonical name.
    groups: tuple[TieGroup, ...]
    refused: tuple[RefusedClaim, ...]
    #: Stored names whose tensors belong to other models, sorted by name.
    external: tuple[ExternalTie, ...] = ()
    #: Tensors that others cannot be used without, sorted by name.
    companions: tuple[Companion, ...] = ()
    #: Who is asked where tied names hold different values; no part of what the plan says.
    resolver: Resolver = unresolved

    @functools.cached_property
    def _places(self) -> dict[str, tuple[TieGroup, Alias | None]]:
        places: dict[str, tuple[TieGroup, Alias | None]] = {}
        for group in self.groups:
            places[group.canonical] = (group, None)
            places.update((alias.name, (group, alias)) for alias in group.aliases)
        return places

    @functools.cached_property
    def owned_elsewhere(self) -> dict[str, ExternalTie]:
        """The external ties that `compact` leaves out, by name; no checkpoint of the model holds these names."""
        return {tie.name: tie for tie in self.external if tie.digest is not None}

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the plan as hexadecimal; equal on all ranks that made the same plan."""
        return hashlib.sha256(json.dumps(self._written(), sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TiePlan):
            return NotImplemented
        mine, theirs = ((plan.groups, plan.refused, plan.external, plan.companions) for plan in (self, other))
        return mine == theirs and dict(self.tensors) == dict(other.tensors)

    def __hash__(self) -> int:
        return hash((self.groups, self.refused, self.external, self.companions))

    def __str__(self) -> str:
        return _display.render(
            self.tensors, self.groups, self.refused, self.external, self.companions, title=self._title()
        )

    def _title(self) -> str:
        counts = len(self.groups), len(self.owned_elsewhere), len(self.refused)
        summary = _display.summary(*counts, bytes_saved=self.bytes_saved)
        return f"{_display.count(len(self.tensors), 'tensor')}, {summary}"

    @property
    def bytes_saved(self) -> int:
        """Bytes that a checkpoint of the whole model saves by what `compact` leaves out."""
        tied = sum(self.tensors[alias.name].nbytes for group in self.groups for alias in group.aliases)
        return tied + sum(self.tensors[name].nbytes for name in self.owned_elsewhere)

    def canonical(self, name: str) -> str:
        """The name under which the tensor called `name` is stored: itself unless it is an alias."""
        place = self._places.get(name)
        return name if place is None else place[0].canonical

    def alias(self, name: str) -> Alias | None:
        """How the tensor called `name` is rebuilt from another; None if it is stored itself."""
        place = self._places.get(name)
        return None if place is None else place[1]

    def stored(self) -> dict[str, TensorSpec]:
        """The shape and dtype of every tensor that a checkpoint of the whole model holds, by name."""
        left_out = self.owned_elsewhere
        return {
            name: spec for name, spec in self.tensors.items() if self.canonical(name) == name and name not in left_out
        }

    def whole_aliases(self, canonical: str) -> tuple[Alias, ...]:
        """The aliases that are the whole of the tensor stored as `canonical`."""
        return tuple(alias for alias in self._aliases(canonical) if alias.view is None)

    def part_aliases(self, canonical: str) -> tuple[Alias, ...]:
        """The aliases that are a part of what is stored as `canonical`, or its elements in another order."""
        return tuple(alias for alias in self._aliases(canonical) if alias.view is not None)

    def _aliases(self, canonical: str) -> tuple[Alias, ...]:
        place = self._places.get(canonical)
        return () if place is None else place[0].aliases

    def verdict(self, a: str, b: str) -> Verdict | None:
        """The decision on names `a` and `b`, in either order; None if nobody claims that they are one tensor.

        A tensor of another model is named by its owner and its name there: `target:embed_tokens.weight`.
        """
        group_a, group_b = self._places.get(a), self._places.get(b)
        if group_a is not None and group_b is not None and group_a[0] is group_b[0]:
            alias = group_a[1] or group_b[1]
            return Verdict.alias(alias.reason if alias else Reason.SAME_OBJECT, f"both are {group_a[0].canonical}")
        for refusal in self.refused:
            if set(refusal.claim.names) == {a, b}:
                return refusal.verdict
        for tie in self.external:
            if {self.canonical(a), self.canonical(b)} == {tie.name, tie.source}:
                return Verdict.alias(Reason.EXTERNAL_OWNER, f"it belongs to {tie.source}")
        return None

    def compact(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Leave out the aliases of `state_dict`, and what other models own.

        Copies no tensor and changes nothing. An alias whose canonical name is not in the mapping stays. An alias whose
        tensor no longer shares memory with the canonical one (the state was gathered, cloned or offloaded) is compared
        with it byte by byte and left out if equal. An external tensor is left out if the plan has its digest and the
        tensor still has that digest; it is read for that.

        Example:
            >>> import tiepolicy
            >>> embed = torch.zeros(6, 2)
            >>> state = {"embed.weight": embed, "head.weight": embed}
            >>> plan = tiepolicy.plan(state)
            >>> sorted(plan.compact(state))
            ['embed.weight']

        Returns:
            A new mapping of the same tensors.

        Raises:
            TieConflictError: If tied names hold different values and no plugin resolves it.
            ExternalOwnerError: If a tensor of another model has changed since the plan was made.
        """
        compacted = _mapping(state_dict)
        for group in self.groups:
            if group.canonical not in compacted:
                continue
            for alias in group.aliases:
                if alias.name in compacted:
                    kept = self._kept(state_dict, group, alias, Moment.COMPACT)
                    if kept is not None:
                        compacted[group.canonical] = compacted[kept]
                        del compacted[alias.name]
        for name, tie in self.owned_elsewhere.items():
            if name in compacted:
                check_digest(tie, compacted[name])
                del compacted[name]
        return compacted

    def expand(
        self, compacted: Mapping[str, torch.Tensor], *, external: Owners | None = None
    ) -> dict[str, torch.Tensor]:
        """Give every alias back whose canonical name is in the mapping; the inverse of `compact`.

        The tensors given back are the canonical ones or views of them: no memory is copied.

        Example:
            >>> import tiepolicy
            >>> embed = torch.zeros(6, 2)
            >>> plan = tiepolicy.plan({"embed.weight": embed, "head.weight": embed})
            >>> full = plan.expand({"embed.weight": embed})
            >>> full["head.weight"] is embed
            True

        Args:
            compacted: What `compact` returned.
            external: The models that own external tensors, by the names the plan was made with.

        Returns:
            A new mapping with every name.

        Raises:
            ShapeMismatchError: If a canonical tensor has another shape than the plan says.
            TieConflictError: If an alias is in the mapping with other values than its canonical tensor.
            MissingTensorError: If a tensor that another model owns was left out and that model is not given.
            ExternalOwnerError: If the model given does not hold what was recorded.
        """
        expanded = _mapping(compacted)
        left_out = [tie for name, tie in self.owned_elsewhere.items() if name not in compacted]
        owners = observe_owners(external or {}) if left_out else {}
        expanded |= {tie.name: take(tie, owners) for tie in left_out}
        for group in self.groups:
            owner = expanded.get(group.canonical)
            if owner is None:
                continue
            _check_shape(group.canonical, owner, self.tensors[group.canonical])
            untied = set()
            for alias in group.aliases:
                if alias.name in compacted:
                    kept = self._kept(expanded, group, alias, Moment.EXPAND)
                    owner = owner if kept is None else compacted.get(kept, owner)
                    untied |= {alias.name} if kept is None else set()
            expanded[group.canonical] = owner
            expanded |= {alias.name: view_of(owner, alias.view) for alias in group.aliases if alias.name not in untied}
        return expanded

    def verify(self, model: TensorSource, *, after: str = "") -> None:
        """Check that every tie of the plan still holds in a model.

        What was one parameter must be one parameter: of two over one memory, each would have a gradient and an
        optimizer state. For all else (buffers, views, mappings, parameters that were two already when the plan was
        made) the memory decides.

        Example:
            >>> import tiepolicy
            >>> embed = torch.zeros(6, 2)
            >>> state = {"embed.weight": embed, "head.weight": embed}
            >>> plan = tiepolicy.plan(state)
            >>> plan.verify(state)
            >>> try:
            ...     plan.verify(state | {"head.weight": embed.clone()}, after="a conversion")
            ... except BrokenTieError as error:
            ...     print(str(error).split(":")[0])
            head.weight and embed.weight were one tensor before a conversion and no longer are

        Args:
            model: The module or mapping to look at.
            after: What was done to it since the plan was made, such as `to_empty()`, for the message.

        Raises:
            MissingTensorError: If a tied name is gone.
            BrokenTieError: If names that were one tensor, or one parameter, no longer are.
        """
        facts = observe(model)
        for group in self.groups:
            for alias in group.aliases:
                check_present((alias.name, group.canonical), facts)
                broken = _break(group, alias, facts, after)
                if broken is not None:
                    raise BrokenTieError(broken, names=[alias.name, group.canonical])

    def retie(self, model: nn.Module, *, keep: Keep | None = None) -> None:
        """Make the names of every group one tensor again, in a module that lost it; changes the module.

        Use it after `to_empty()`, `load_state_dict(assign=True)`, conversions, and before the optimizer is built.
        Parameters become one object, also those that only share memory; a view becomes a view again. What still holds
        is left alone. A tensor without data (meta device) gives way to one with data.

        Args:
            model: The module to change.
            keep: "canonical" to give all names of a group the canonical value without looking at the others. After
                `to_empty()` that is right: its memory holds nothing yet. By default values must be equal.

        Raises:
            MissingTensorError: If a tied name is gone.
            TieConflictError: If values differ and no plugin resolves it. Nothing was changed then.
        """
        facts = observe(model)
        share(
            model,
            self.groups,
            holds=lambda group, alias: is_one(group, alias, facts),
            keep=keep,
            moment=Moment.RETIE,
            resolver=self.resolver,
        )

    def to_svg(self) -> str:
        """The plan as a picture: what is stored under which name, and what was claimed in vain.

        Returns:
            An SVG document of at most 800 pixels' width, legible on light and dark pages, with a title and a
            description for those who do not see it.
        """
        links = _display.links_of(self.tensors, self.groups, self.refused, self.external)
        return _display.draw(self._title(), links, [str(companion) for companion in self.companions])

    def to_manifest(self) -> dict[str, Any]:
        """The plan as JSON-ready values; `from_manifest` reads it.

        Example:
            >>> import tiepolicy
            >>> embed = torch.zeros(6, 2)
            >>> plan = tiepolicy.plan({"embed.weight": embed, "head.weight": embed})
            >>> TiePlan.from_manifest(json.dumps(plan.to_manifest())) == plan
            True

        Raises:
            ManifestError: If a name (of a tensor, in a claim, of another model) cannot stand in a manifest, as it holds
                a path separator or control character.
        """
        _manifest.check(self.tensors, self.refused, self.external)
        return self._written()

    def _written(self) -> dict[str, Any]:
        return _manifest.write(self.tensors, self.groups, self.refused, self.external, self.companions)

    @staticmethod
    def from_manifest(manifest: Mapping[str, Any] | str | bytes) -> "TiePlan":
        """Read the `manifest` that `to_manifest` wrote, as JSON text or as the values in it.

        Returns:
            A plan equal to the one that was written.

        Raises:
            ManifestError: If it is malformed, contradicts itself, or is of a newer version.
        """
        tensors, groups, refused, external, companions = _manifest.read(manifest)
        return TiePlan(tensors=tensors, groups=groups, refused=refused, external=external, companions=companions)

    def _kept(
        self, state_dict: Mapping[str, torch.Tensor], group: TieGroup, alias: Alias, moment: Moment
    ) -> str | None:
        """The name whose value stands for both, which is the canonical one if they are equal; None to untie them."""
        owner, tensor = state_dict[group.canonical], state_dict[alias.name]
        if holds(group, alias, observe({group.canonical: owner, alias.name: tensor})):
            return group.canonical
        difference = first_difference(view_of(owner, alias.view), tensor)
        if difference is None:
            return group.canonical
        whole = alias.view is None
        conflict = Conflict(
            canonical=group.canonical, alias=alias.name, difference=difference, moment=moment, whole=whole
        )
        return settle(conflict, self.resolver)


def _mapping(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not isinstance(state_dict, Mapping):
        raise ObservationError(f"a {type(state_dict).__name__} is no state dict; hand over model.state_dict()")
    return dict(state_dict)


def _break(group: TieGroup, alias: Alias, facts: Facts, after: str) -> str | None:
    """How a tie was broken since the plan was made, as a sentence; None if it holds."""
    if not holds(group, alias, facts):
        return (
            f"{alias.name} and {group.canonical} were one tensor{f' before {after}' if after else ''} and no longer "
            "are: training would let them drift apart. Tie them again before the optimizer is built"
        )
    if alias.reason is Reason.SAME_OBJECT and not is_one(group, alias, facts):
        return (
            f"{alias.name} and {group.canonical} share memory{f' after {after}' if after else ''} but are two "
            "parameters, and were one: each would have a gradient and an optimizer state of its own. Call retie "
            "before the optimizer is built"
        )
    return None


def _check_shape(name: str, tensor: torch.Tensor, planned: TensorSpec) -> None:
    if tuple(tensor.shape) != planned.shape:
        raise ShapeMismatchError(
            f"{name} has shape {tuple(tensor.shape)}, but was {planned.shape} when the plan was made: the state "
            "belongs to another model, or its vocabulary was resized; plan the model it belongs to",
            names=[name],
        )
