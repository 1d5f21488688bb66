"""Step 8, grouping: the parts of a plan, as plain data."""

from dataclasses import dataclass

from tiepolicy._claims import Claim
from tiepolicy._evidence import View
from tiepolicy._verdicts import Reason, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
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
