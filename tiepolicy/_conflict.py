"""Step 8, conflicts: two values for one tensor, or none, and the ways out that a plugin may choose."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from tiepolicy._facts import TensorSpec
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
class Missing:
    """A tensor of a model that a checkpoint does not hold, under its own name or an alias."""

    name: str
    #: What the model has room for.
    spec: TensorSpec
    #: What the checkpoint holds, by name.
    stored: Mapping[str, TensorSpec]
    #: The claims about the name that were refused, as sentences.
    refused: tuple[str, ...] = ()


class Way(StrEnum):
    """The ways out of two values, then those out of a missing one."""

    KEEP = "keep"
    UNTIE = "untie"
    TAKE = "take"
    LEAVE = "leave"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What to do about a `Conflict` or a `Missing`; build it with `keep` or `untie`, `take` or `leave`."""

    way: Way
    #: The name that is kept, or taken from.
    name: str = ""

    @staticmethod
    def keep(name: str) -> "Resolution":
        """The way out of two values in which both names get that of `name`; the other is lost, by choice."""
        return Resolution(way=Way.KEEP, name=name)

    @staticmethod
    def untie() -> "Resolution":
        """The way out of two values in which both names keep theirs and are separate tensors from now on."""
        return Resolution(way=Way.UNTIE)

    @staticmethod
    def take(name: str) -> "Resolution":
        """The way out of a missing tensor in which it gets what is stored as `name`, of its shape and dtype."""
        return Resolution(way=Way.TAKE, name=name)

    @staticmethod
    def leave() -> "Resolution":
        """The way out of a missing tensor in which it stays as it is in the model."""
        return Resolution(way=Way.LEAVE)

    def __str__(self) -> str:
        return f"{self.way} {self.name!r}" if self.name else str(self.way)


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

Resolver = Callable[[Conflict | Missing], Resolution | None]


def unresolved(conflict: Conflict | Missing) -> None:
    """The resolver of those who have none: every conflict is an error."""


def settle(conflict: Conflict, resolver: Resolver) -> str | None:
    """The name to keep in a `conflict`, as the `resolver` wants it, or None to untie.

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
    names = conflict.names if conflict.whole else (conflict.canonical,)
    if resolution.way is Way.UNTIE:
        return None
    if resolution.way is not Way.KEEP or resolution.name not in names:
        raise PluginError(
            f"tiepolicy_resolve answers {resolution} where {conflict.alias} and {conflict.canonical} differ; it may "
            f"keep {' or '.join(names)}, or untie them",
            names=conflict.names,
        )
    return resolution.name


def settle_missing(missing: Missing, resolver: Resolver) -> Resolution | None:
    """How a tensor that is not stored is filled, or that it is left; None to make it an error.

    Raises:
        PluginError: If the resolver wants it taken from a name that is not stored, or kept or untied.
    """
    resolution = resolver(missing)
    if resolution is None or resolution.way is Way.LEAVE:
        return resolution
    if resolution.way is not Way.TAKE or resolution.name not in missing.stored:
        raise PluginError(
            f"tiepolicy_resolve answers {resolution} for {missing.name} {missing.spec.shape}, which is not in the "
            "checkpoint; it may take the values of a name that is stored, or leave the tensor as it is. Nothing was "
            "loaded",
            names=[missing.name],
        )
    return resolution
