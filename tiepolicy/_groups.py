"""Step 6, grouping: the parts of a plan, as plain data, and how memory or accepted claims make groups of names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tiepolicy._claims import Claim, Reason, Verdict
from tiepolicy._evidence import View, relate, view_within
from tiepolicy._memory import nested
from tiepolicy._observe import Facts


class Alias(NamedTuple):
    """A name that is not stored, because its tensor is, or lies within, the one stored under the canonical name."""

    name: str
    reason: Reason
    #: How the tensor lies within the canonical one; None if it is the whole of it.
    view: View | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TieGroup:
    """Names of one tensor: the canonical one, which a checkpoint stores, and its aliases, sorted by name."""

    canonical: str
    aliases: tuple[Alias, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical name, then the aliases."""
        return (self.canonical, *(alias.name for alias in self.aliases))


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedClaim:
    """A claim of two names that the evidence contradicts."""

    claim: Claim
    verdict: Verdict
    #: Of the two names; None where the tensor is absent.
    shapes: tuple[tuple[int, ...] | None, ...]

    def __str__(self) -> str:
        # The derived name comes first: the sentence is about what is kept although somebody claims it is a copy.
        second, first = (
            name if shape is None else f"{name} {shape}"
            for name, shape in zip(self.claim.names, self.shapes, strict=True)
        )
        claimant = self.claim.detail or self.claim.source
        return f"{first} and {second} cannot be one tensor: {self.verdict.detail}; claimed by {claimant}"


class Companion(NamedTuple):
    """A tensor that says what the rows of others are, such as the map from a draft's vocabulary to its target's.

    A model that has those others and not their companion would load them and mean something else by each row.
    """

    name: str
    #: The tensors that it belongs to, sorted.
    of: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} is needed to use {' and '.join(self.of)}"


def holds(group: TieGroup, alias: Alias, facts: Facts) -> bool:
    """Whether an alias is still the part of the canonical tensor that it was, in memory."""
    owner, part = facts[group.canonical], facts[alias.name]
    if alias.view is None:
        return relate(owner, part) in (Reason.SAME_OBJECT, Reason.SAME_STORAGE)
    return view_within(owner, part) == alias.view


def is_one(group: TieGroup, alias: Alias, facts: Facts) -> bool:
    """Whether a tie holds for whoever trains it too: two parameters over one memory have two gradients."""
    whole = (group.canonical, *(other.name for other in group.aliases if other.view is None))
    parameters = [facts[name] for name in whole if facts[name].kind == "parameter"]
    if alias.view is None and facts[alias.name].kind == "parameter":
        # The canonical tensor may be a buffer that shares the memory of several parameters.
        return facts[alias.name].object_id == parameters[0].object_id and holds(group, alias, facts)
    return holds(group, alias, facts)


def group_by_memory(names: Sequence[str], facts: Facts) -> TieGroup | None:
    """The group of names that meet in memory, where one of them holds all the others; None where it is not so plain.

    What claims, verdicts and the choice of a name come to for such names if no plugin has a say in it, in one look at
    each of them.

    Args:
        names: Sorted.
        facts: What was seen of them.
    """
    tensors = [facts.tensor(name) for name in names]
    if all(tensor is tensors[0] for tensor in tensors):
        return TieGroup(
            canonical=names[0], aliases=tuple(Alias(name=name, reason=Reason.SAME_OBJECT) for name in names[1:])
        )
    found = nested(tensors)
    if found is None:
        return None
    owner, offsets = found
    whole = tensors[owner]
    shape = tuple(whole.shape)
    aliases = []
    for name, tensor, offset in zip(names, tensors, offsets, strict=True):
        if tensor is whole:
            if name != names[owner]:
                aliases.append(Alias(name=name, reason=Reason.SAME_OBJECT))
        elif tensor.shape == shape and tensor.is_contiguous():
            aliases.append(Alias(name=name, reason=Reason.SAME_STORAGE))
        else:
            view = View(shape=tuple(tensor.shape), stride=tensor.stride(), offset=offset)
            aliases.append(Alias(name=name, reason=Reason.VIEW_OF, view=view))
    return TieGroup(canonical=names[owner], aliases=tuple(aliases))


#: Relations in which one tensor is the whole of the other.
_EXACT = (Reason.SAME_OBJECT, Reason.SAME_STORAGE)


def pairs_of(claims: Iterable[Claim]) -> list[Claim]:
    """The claims as claims of two names, each once, in an order of their own."""
    pairs = {pair for claim in claims for pair in claim.pairs()}
    return sorted(pairs, key=lambda claim: (claim.names, claim.source, claim.detail))


def join(claims: list[Claim]) -> list[tuple[tuple[str, ...], tuple[Claim, ...]]]:
    """Sets of names that accepted claims connect, with their claims (disjoint-set union)."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for claim in claims:
        first, second = map(find, claim.names)
        parent[max(first, second)] = min(first, second)
    names: dict[str, list[str]] = {}
    claims_of: dict[str, list[Claim]] = {}
    for name in parent:
        names.setdefault(find(name), []).append(name)
    for claim in claims:
        claims_of.setdefault(find(claim.names[0]), []).append(claim)
    return [(tuple(sorted(names[root])), tuple(claims_of[root])) for root in names]


def owners_of(names: Sequence[str], facts: Facts) -> tuple[tuple[str, ...], dict[str, Reason]]:
    """The names from which every other can be rebuilt: the longest tensor and its exact doubles; none if none can.

    Returns:
        Those of the names, in their order, and how every name relates to the first of them, where that was looked at.
    """
    members = [facts[name] for name in names]
    if len({fact.object_id for fact in members}) == 1:
        return tuple(names), dict.fromkeys(names, Reason.SAME_OBJECT)
    longest = max(fact.extent for fact in members)
    # Whatever contains a view is dense; looking there first finds the owner at once.
    long = sorted((fact for fact in members if fact.extent == longest), key=lambda fact: not fact.is_dense)
    for owner in long:
        relations = {fact.name: relate(owner, fact) for fact in members}
        if all(reason.proves_alias for reason in relations.values()):
            return tuple(name for name, reason in relations.items() if reason in _EXACT), relations
    return (), {}


def group_of(canonical: str, names: Sequence[str], relations: Mapping[str, Reason], facts: Facts) -> TieGroup:
    """The group of tied names.

    Args:
        canonical: The name to store.
        names: All names, sorted.
        relations: How they relate to the canonical one, as far as it is known.
        facts: What was seen of them.
    """
    owner = facts[canonical]
    aliases = []
    for name in names:
        if name != canonical:
            reason = relations[name] if name in relations else relate(owner, facts[name])
            view = view_within(owner, facts[name]) if reason is Reason.VIEW_OF else None
            aliases.append(Alias(name=name, reason=reason, view=view))
    return TieGroup(canonical=canonical, aliases=tuple(aliases))


def without_accepted(refused: list[RefusedClaim], groups: tuple[TieGroup, ...]) -> tuple[RefusedClaim, ...]:
    """Drop refusals of what another claim proved."""
    if not refused:
        return ()
    group_of = {name: group.canonical for group in groups for name in group.names}
    return tuple(
        refusal
        for refusal in refused
        if (first := group_of.get(refusal.claim.names[0])) is None or first != group_of.get(refusal.claim.names[1])
    )


def join_companions(companions: Iterable[Companion]) -> tuple[Companion, ...]:
    """Each companion once, with all that anybody says it belongs to, sorted by name."""
    found: dict[str, set[str]] = {}
    for companion in companions:
        found.setdefault(companion.name, set()).update(companion.of)
    return tuple(Companion(name, tuple(sorted(of))) for name, of in sorted(found.items()))
