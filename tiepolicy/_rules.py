"""Step 16, the built-in plugin: storage claims, shapes and storage decide, and a stable name is stored."""

import itertools
from collections.abc import Hashable, Iterable

from tiepolicy._claims import Claim, Reason, Source, Verdict
from tiepolicy._evidence import layout, relate, view_within
from tiepolicy._facts import TensorFact
from tiepolicy._groups import Companion
from tiepolicy._observe import Facts
from tiepolicy.hookspecs import hookimpl

# Ends of sentences that name the claim's second name first, as the one that is derived from the other.
_DETAILS = {
    Reason.SAME_OBJECT: "they are one object",
    Reason.SAME_STORAGE: "they are the same elements of one storage",
    Reason.VIEW_OF: "one is a view of the other",
    Reason.SHAPE_MISMATCH: "shapes differ",
    Reason.DTYPE_MISMATCH: "dtypes differ ({b.dtype} and {a.dtype})",
    Reason.STORAGE_DISJOINT: "each has its own storage",
    Reason.DECLARED_NOT_TIED: "each has its own storage",
    Reason.STORAGE_OVERLAP_PARTIAL: "they overlap in one storage, but neither contains the other",
}


@hookimpl(trylast=True)
def tiepolicy_claims(facts: Facts) -> list[Claim]:
    """Claim what shares an object or memory; separate parts of one storage claim nothing."""
    return claims_of(facts.sharing(), facts)


def claims_of(sets: Iterable[tuple[str, ...]], facts: Facts) -> list[Claim]:
    """The claims within sets of names that meet in memory."""
    claims = []
    for names in sets:
        if len({id(facts.tensor(name)) for name in names}) == 1:  # by far the most common tie needs no facts
            claims += [_claim(names[0], other) for other in names[1:]]
        else:
            claims += _claims_within([facts[name] for name in names])
    return claims


@hookimpl(trylast=True)
def tiepolicy_decide(claim: Claim, facts: Facts) -> Verdict:
    """Let the shapes and the storage decide."""
    absent = [name for name in claim.names if name not in facts]
    if absent:
        return _absent(absent, facts)
    a, b = (facts[name] for name in claim.names)
    reason = relate(a, b)
    if not reason.proves_alias and relate(b, a).proves_alias:
        reason = relate(b, a)
    if reason is Reason.STORAGE_DISJOINT and claim.source is not Source.STORAGE:
        reason = Reason.DECLARED_NOT_TIED
    if reason is Reason.PLACEMENT_MISMATCH:
        return Verdict.independent(reason, _where_they_lie(b, a))
    detail = _DETAILS[reason].format(a=a, b=b)
    return Verdict.alias(reason, detail) if reason.proves_alias else Verdict.independent(reason, detail)


@hookimpl(trylast=True)
def tiepolicy_canonical(group: tuple[str, ...], claims: tuple[Claim, ...]) -> str:
    """Store the name that declarations derive the others from, else the first in alphabetical order.

    `tiepolicy.Policy` asks only among the names that contain all others. Declarations that go round in a circle name
    no source, so the alphabet decides there too.
    """
    declared = [claim.names for claim in claims if claim.source is not Source.STORAGE]
    sources = {names[0] for names in declared} - {name for names in declared for name in names[1:]}
    return min(sources.intersection(group), default=group[0])


def companions_by_shape(facts: Facts) -> list[Companion]:
    """Persistent buffers of integers or truth values that have one entry for each row of parameters of their module.

    Args:
        facts: What was seen of a module; a mapping has no buffers.

    Returns:
        Each with the parameters of its module, or of a module below, that have as many rows.
    """
    # By the module that holds it and the number of its entries.
    maps: dict[tuple[str, int], list[str]] = {}
    for name in facts.buffers():
        tensor = facts.tensor(name)
        if tensor.dim() == 1 and not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
            maps.setdefault((name.rpartition(".")[0], tensor.shape[0]), []).append(name)
    if not maps:
        return []
    found: dict[str, list[str]] = {}
    for name in facts:
        tensor = facts.tensor(name)
        if tensor.dim() > 1 and not facts.is_buffer(name):
            for module in _modules_around(name):
                for companion in maps.get((module, tensor.shape[0]), ()):
                    found.setdefault(companion, []).append(name)
    return [Companion(name, tuple(sorted(of))) for name, of in found.items()]


def _absent(absent: list[str], facts: Facts) -> Verdict:
    for name in absent:
        module, _, attribute = name.rpartition(".")
        start = f"{module}.parametrizations.{attribute}." if module else f"parametrizations.{attribute}."
        numbered = (f"{start}original{number}" for number in itertools.count())
        originals = [name for name in (f"{start}original",) if name in facts]
        originals += itertools.takewhile(facts.__contains__, numbered)
        if originals:
            detail = f"{name} is computed by a parametrization from {' and '.join(originals)}; claim those instead"
            return Verdict.independent(Reason.COMPUTED, detail)
    verb = "is" if len(absent) == 1 else "are"
    return Verdict.independent(Reason.PARTNER_ABSENT, f"{' and '.join(absent)} {verb} not in the model")


def _where_they_lie(a: TensorFact, b: TensorFact) -> str:
    if a.device != b.device:
        return f"they lie on different devices ({a.device} and {b.device})"
    sharded = (fact.placement or "not sharded" for fact in (a, b))
    return f"they are sharded differently ({' and '.join(sharded)})"


def _claims_within(facts: list[TensorFact]) -> list[Claim]:
    """Claims between tensors whose memory may meet: each with its double, its owner, or one that it only overlaps.

    Doubles are found by their layout. Of the others, sorted by where they start, longest first, a tensor can lie only
    within one that comes before it; so one pass with the farthest-reaching owner of its dtype so far is enough.
    """
    claims = []
    doubles: dict[Hashable, TensorFact] = {}
    owners: dict[Hashable, TensorFact] = {}
    widest: dict[Hashable, TensorFact] = {}
    for fact in sorted(facts, key=_reading_order):
        # Two objects without memory have two layouts, and one object under two names has one.
        first = doubles.setdefault(layout(fact), fact)
        region = fact.region
        if first is not fact:
            claims.append(_claim(first.name, fact.name))
            continue
        if region.space is None:
            continue
        family = (region.space, fact.dtype, region.start % fact.dtype.itemsize)
        owner, farthest = owners.get(family), widest.get(region.space)
        if owner is not None and view_within(owner, fact) is not None:
            claims.append(_claim(owner.name, fact.name))
        elif farthest is not None and farthest.region.meets(region):
            claims.append(_claim(farthest.name, fact.name))
        if fact.is_dense and not fact.placement and (owner is None or region.end > owner.region.end):
            owners[family] = fact
        if farthest is None or region.end > farthest.region.end:
            widest[region.space] = fact
    return claims


def _reading_order(fact: TensorFact) -> tuple[int, int, bool, str]:
    return fact.region.start, -fact.region.end, not fact.is_dense, fact.name


def _claim(first: str, second: str) -> Claim:
    return Claim((first, second), Source.STORAGE, "the storage of their data")


def _modules_around(name: str) -> Iterable[str]:
    """The paths of the modules that a tensor lies in, from the innermost to the whole model."""
    while name:
        name = name.rpartition(".")[0]
        yield name
