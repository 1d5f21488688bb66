"""Step 10, conflicts: two values for what should be one tensor, and the ways out that a plugin may choose."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from tiepolicy.errors import PluginError, TieConflictError


class Moment(StrEnum):
    """When two values were found."""

    COMPACT = "compact"
    EXPAND = "expand"
    RETIE = "retie"
    TIE = "tie"
    LOAD = "load"
    #: Two states of an optimizer are stored for what is one parameter in the model.
    OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Two names that should be one tensor and hold different values."""

    #: The name that is stored.
    canonical: str
    alias: str
    #: Where the values first differ, as a phrase.
    difference: str
    moment: Moment
    #: Whether the alias is the whole of the canonical tensor, not a part; only then can the alias be kept for both.
    whole: bool = True

    @property
    def names(self) -> tuple[str, str]:
        """The canonical name, then the alias."""
        return self.canonical, self.alias


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What to do about a conflict; build it with `keep` or `untie`."""

    #: The name whose value both names get, or None to keep both values as separate tensors.
    kept: str | None

    @staticmethod
    def keep(name: str) -> "Resolution":
        """Both names get the value of this one; the other value is lost, by choice."""
        return Resolution(kept=name)

    @staticmethod
    def untie() -> "Resolution":
        """Both names keep their values and are separate tensors from now on."""
        return Resolution(kept=None)


_OTHERWISE = (
    "Keep one of them (drop the other name from the state dict), tie the model again, or plan it anew if it was untied "
    "on purpose"
)
_CHOOSE = (
    'Keep the value of {conflict.canonical} with keep="canonical", copy the value to keep into it first, or leave the '
    "two apart"
)
_LOADING = (
    "Nothing was loaded. Untie the model to keep both, delete one of the two from the checkpoint, or resolve the "
    "conflict in a plugin (tiepolicy_resolve)"
)
_LOADING_STATE = (
    "Nothing was loaded. Load the model without its optimizer to start the state afresh, or choose one of the two in a "
    "plugin (tiepolicy_resolve)"
)
#: What is claimed at each moment, and the ways out.
_SENTENCES = {
    Moment.COMPACT: ("are one tensor in the plan", _OTHERWISE),
    Moment.EXPAND: ("are one tensor in the plan", _OTHERWISE),
    Moment.RETIE: ("were one tensor when the plan was made", _CHOOSE),
    Moment.TIE: ("are declared to be one tensor", _CHOOSE),
    Moment.LOAD: ("are one tensor in the model", _LOADING),
    Moment.OPTIMIZER: ("are one parameter of the optimizer", _LOADING_STATE),
}

_DIFFERS = {Moment.OPTIMIZER: "stored states"}

Resolver = Callable[[Conflict], Resolution | None]


def unresolved(conflict: Conflict) -> None:
    """The resolver of those who have none: every conflict is an error."""


def settle(conflict: Conflict, resolver: Resolver) -> str | None:
    """The name to keep, or None to untie.

    Raises:
        TieConflictError: If the resolver has no answer.
        PluginError: If it names a tensor that the conflict is not about, or wants a part to stand for the whole.
    """
    resolution = resolver(conflict)
    if resolution is None:
        claim, advice = _SENTENCES[conflict.moment]
        raise TieConflictError(
            f"{conflict.alias} and {conflict.canonical} {claim}, but their {_DIFFERS.get(conflict.moment, 'values')} "
            f"differ: {conflict.difference}. "
            f"{advice.format(conflict=conflict)}",
            names=[conflict.alias, conflict.canonical],
        )
    allowed = (None, conflict.canonical, conflict.alias) if conflict.whole else (None, conflict.canonical)
    if resolution.kept not in allowed:
        raise PluginError(
            f"tiepolicy_resolve wants to keep {resolution.kept!r} where {conflict.alias} and {conflict.canonical} "
            f"differ; it may keep {' or '.join(name for name in allowed if name)}, or untie them",
            names=conflict.names,
        )
    return resolution.kept
