"""Step 11, the built-in plugin: storage claims, shapes and storage decide, and a stable name is stored."""

from tiepolicy._claims import Claim, Source
from tiepolicy._evidence import byte_span, is_dense, overlap, relate
from tiepolicy._facts import TensorFact
from tiepolicy._observe import Facts
from tiepolicy._verdicts import Reason, Verdict
from tiepolicy.hookspecs import hookimpl

_DETAILS = {
    Reason.SAME_OBJECT: "they are one object",
    Reason.SAME_STORAGE: "they are the same elements of one storage",
    Reason.VIEW_OF: "one is a view of the other",
    Reason.SHAPE_MISMATCH: "shapes differ",
    Reason.DTYPE_MISMATCH: "dtypes differ ({a.dtype} and {b.dtype})",
    Reason.PLACEMENT_MISMATCH: "they lie on different devices or are sharded differently",
    Reason.STORAGE_DISJOINT: "each has its own storage",
    Reason.STORAGE_OVERLAP_PARTIAL: "they overlap in one storage, but neither contains the other",
}


@hookimpl(trylast=True)
def tiepolicy_claims(facts: Facts) -> list[Claim]:
    """Claim what shares an object or a storage; separate parts of one storage claim nothing."""
    return [claim for names in facts.sharing() for claim in _claims_within([facts[name] for name in names])]


@hookimpl(trylast=True)
def tiepolicy_decide(claim: Claim, facts: Facts) -> Verdict:
    """Let the shapes and the storage decide."""
    absent = [name for name in claim.names if name not in facts]
    if absent:
        return Verdict.independent(Reason.PARTNER_ABSENT, f"{' and '.join(absent)} is not in the model")
    a, b = (facts[name] for name in claim.names)
    reason = relate(a, b)
    if not reason.proves_alias and relate(b, a).proves_alias:
        reason = relate(b, a)
    detail = _DETAILS[reason].format(a=a, b=b)
    return Verdict.alias(reason, detail) if reason.proves_alias else Verdict.independent(reason, detail)


@hookimpl(trylast=True)
def tiepolicy_canonical(group: tuple[str, ...], claims: tuple[Claim, ...]) -> str:
    """Store the name that declarations derive the others from, else the first in alphabetical order.

    `tiepolicy.Policy` asks only among the names that contain all others.
    """
    declared = [claim.names for claim in claims if claim.source is not Source.STORAGE]
    sources = {names[0] for names in declared} - {name for names in declared for name in names[1:]}
    return min(sources.intersection(group), default=group[0])


def _claims_within(facts: list[TensorFact]) -> list[Claim]:
    """Claims between the tensors of one storage: each with the one that contains it, or with one it only overlaps.

    Sorted by where they start, longest first, a tensor can lie only within one that comes before it; so one pass with
    the farthest-reaching tensor so far is enough.
    """
    claims = []
    widest: TensorFact | None = None
    for fact in sorted(facts, key=_reading_order):
        if widest is not None and (fact.object_id == widest.object_id or overlap(widest, fact)):
            claims.append(Claim((widest.name, fact.name), Source.STORAGE, "the storage of their data"))
        if widest is None or byte_span(fact)[1] > byte_span(widest)[1]:
            widest = fact
    return claims


def _reading_order(fact: TensorFact) -> tuple[int, int, bool, str]:
    start, end = byte_span(fact)
    return start, -end, not is_dense(fact), fact.name
