"""Step 4, claims and verdicts: who says that names are one tensor, and what is decided about it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NoReturn

from tiepolicy.errors import TiePolicyError


class _Word(StrEnum):
    """One of a few words."""

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(f"{value!r} is no {cls.__name__}; it is one of {', '.join(cls)}")


class Source(_Word):
    """Where a claim comes from."""

    STORAGE = "storage"
    DECLARED = "declared"
    USER = "user"


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement that some names may be one tensor. It decides nothing.

    Args:
        names: Two or more different names. The first is the one that the claimant would store.
        source: Where the claim comes from; its string value is accepted too.
        detail: What exactly says so, such as `config.tie_word_embeddings`.

    Raises:
        ValueError: If `source` is none of `Source`.
        TiePolicyError: If there are fewer than two names, one occurs twice, or one is no string.
    """

    names: tuple[str, ...]
    source: Source | str
    detail: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "source", Source(self.source))
        are_names = all(isinstance(name, str) for name in self.names)
        if not are_names or len(self.names) < 2 or len(set(self.names)) != len(self.names):
            raise TiePolicyError(
                f"a claim needs two or more different names, not {list(self.names)}", names=map(str, self.names)
            )

    def pairs(self) -> list["Claim"]:
        """The claim as claims of two names each, every one with the first name."""
        if len(self.names) == 2:
            return [self]
        return [Claim((self.names[0], other), self.source, self.detail) for other in self.names[1:]]


class Reason(_Word):
    """Why a claim was accepted or refused."""

    SAME_OBJECT = "same-object"
    SAME_STORAGE = "same-storage"
    VIEW_OF = "view-of"
    SHAPE_MISMATCH = "shape-mismatch"
    DTYPE_MISMATCH = "dtype-mismatch"
    PLACEMENT_MISMATCH = "placement-mismatch"
    STORAGE_DISJOINT = "storage-disjoint"
    STORAGE_OVERLAP_PARTIAL = "storage-overlap-partial"
    PARTNER_ABSENT = "partner-absent"
    #: A claimed name is computed from other tensors at each use, as by a parametrization.
    COMPUTED = "computed"
    #: Declared, and possible by shape, dtype and placement, but each has its own memory; `tiepolicy.tie` ties them.
    DECLARED_NOT_TIED = "declared-not-tied"
    #: The tensor belongs to another model.
    EXTERNAL_OWNER = "external-owner"

    @property
    def proves_alias(self) -> bool:
        """Whether one tensor can be rebuilt from the other where this is the relation between them."""
        return self in (Reason.SAME_OBJECT, Reason.SAME_STORAGE, Reason.VIEW_OF)


class Decision(StrEnum):
    """The two possible decisions on a claim."""

    ALIAS = "alias"
    INDEPENDENT = "independent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The decision on one claim; build it with `alias` or `independent`."""

    decision: Decision
    reason: Reason
    #: The fact behind the reason, as the end of a sentence: "shapes differ".
    detail: str

    @staticmethod
    def alias(reason: Reason | str, detail: str = "") -> "Verdict":
        """The claimed names are one tensor, for a `reason` with a `detail`.

        Raises:
            ValueError: If `reason` is none of `Reason`.
        """
        return Verdict(decision=Decision.ALIAS, reason=Reason(reason), detail=detail)

    @staticmethod
    def independent(reason: Reason | str, detail: str = "") -> "Verdict":
        """The claimed names are separate tensors, for a `reason` with a `detail`.

        Raises:
            ValueError: If `reason` is none of `Reason`.
        """
        return Verdict(decision=Decision.INDEPENDENT, reason=Reason(reason), detail=detail)

    @property
    def is_alias(self) -> bool:
        """Whether the names are one tensor."""
        return self.decision is Decision.ALIAS
