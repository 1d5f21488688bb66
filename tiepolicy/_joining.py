"""Step 9, joining: the sets of names that accepted claims connect, and of each the name that can stand for all."""

from collections.abc import Iterable, Mapping, Sequence

from tiepolicy._claims import Claim
from tiepolicy._evidence import relate, view_within
from tiepolicy._facts import TensorFact
from tiepolicy._groups import Alias, RefusedClaim, TieGroup
from tiepolicy._observe import Facts
from tiepolicy._verdicts import Reason

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
        The names, sorted, and how every name relates to the first of them, where that was looked at.
    """
    members = [facts[name] for name in names]
    if len({fact.object_id for fact in members}) == 1:
        return tuple(sorted(names)), dict.fromkeys(names, Reason.SAME_OBJECT)
    longest = max(fact.extent for fact in members)
    # Whatever contains a view is dense; looking there first finds the owner at once.
    long = sorted((fact for fact in members if fact.extent == longest), key=_is_strided)
    for owner in long:
        relations = {fact.name: relate(owner, fact) for fact in members}
        if all(reason.proves_alias for reason in relations.values()):
            return tuple(sorted(name for name, reason in relations.items() if reason in _EXACT)), relations
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


def _is_strided(fact: TensorFact) -> bool:
    return not fact.is_dense


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
