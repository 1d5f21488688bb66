"""Step 6, deciding: the words in which a decision on a claim is given."""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
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
        """The claimed names are one tensor.

        Raises:
            ValueError: If `reason` is none of `Reason`.
        """
        return Verdict(decision=Decision.ALIAS, reason=Reason(reason), detail=detail)

    @staticmethod
    def independent(reason: Reason | str, detail: str = "") -> "Verdict":
        """The claimed names are separate tensors.

        Raises:
            ValueError: If `reason` is none of `Reason`.
        """
        return Verdict(decision=Decision.INDEPENDENT, reason=Reason(reason), detail=detail)

    @property
    def is_alias(self) -> bool:
        """Whether the names are one tensor."""
        return self.decision is Decision.ALIAS
