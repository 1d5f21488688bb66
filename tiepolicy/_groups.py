"""Step 8, grouping: the parts of a plan, as plain data; and the group that memory alone settles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tiepolicy._claims import Claim
from tiepolicy._evidence import View, relate, view_within
from tiepolicy._memory import nested
from tiepolicy._observe import Facts
from tiepolicy._verdicts import Reason, Verdict


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


def holds(group: TieGroup, alias: Alias, facts: Facts) -> bool:
    """Whether an alias is still the part of the canonical tensor that it was, in memory."""
    owner, part = facts[group.canonical], facts[alias.name]
    reason = relate(owner, part)
    if alias.view is None:
        return reason in (Reason.SAME_OBJECT, Reason.SAME_STORAGE)
    return reason is Reason.VIEW_OF and view_within(owner, part) == alias.view


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
