"""One class per cause. Each message is a sentence for a person and each error carries the names it is about."""

from collections.abc import Iterable


def _visible(text: str) -> str:
    """A text with escapes for line ends and whatever else moves a cursor or forges a line of a log."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class TiePolicyError(ValueError):
    """Base of everything this library raises on purpose.

    Args:
        message: What is wrong, where, why, and what to do. Control characters in it are shown, not sent to a terminal:
            names come from files.
        names: The tensor names it is about, as they are.
    """

    def __init__(self, message: str, *, names: Iterable[str] = ()) -> None:
        super().__init__(_visible(message))
        self.names = tuple(names)


class ObservationError(TiePolicyError):
    """A model or mapping holds something that is no named tensor."""


class PluginError(TiePolicyError):
    """A plugin raised, or gave an answer that its hook does not allow."""


class UnsafeVerdictError(TiePolicyError):
    """A verdict calls two names one tensor although one could not be rebuilt from the other."""


class BrokenTieError(TiePolicyError):
    """Names that were one tensor no longer are."""


class TieConflictError(TiePolicyError):
    """Names that should be one tensor hold different values."""


class MissingTensorError(TiePolicyError):
    """A tensor that is needed is not there, and no other name holds it."""


class ShapeMismatchError(TiePolicyError):
    """A stored tensor has another shape than the place it is meant for."""


class DtypeMismatchError(TiePolicyError):
    """A stored tensor has another dtype than the place it is meant for."""


class ExternalOwnerError(TiePolicyError):
    """A tensor that belongs to another model is not the one that was recorded."""


class ManifestError(TiePolicyError):
    """A manifest is not one this version can trust."""


class PlanMismatchError(TiePolicyError):
    """Ranks that save or load together made different plans."""


class ShardingError(TiePolicyError):
    """A model cannot be sharded, materialised or cut into stages as it was asked without losing a tie or a value."""


class CheckpointError(TiePolicyError):
    """A checkpoint cannot be written, found or read."""


class LostRankError(CheckpointError):
    """Another rank of the run is gone while all ranks save or load together."""


class UntrustedCheckpointError(CheckpointError):
    """A checkpoint asks for more than reading tensors: to run code, or to open files outside its folder."""


class BrokenLawError(AssertionError):
    """A plugin breaks a law that every plugin keeps; raised by `tiepolicy.testing.check_plugin` only.

    Args:
        message: Which plugin breaks which law, how, and with which model.
        law: The law, as a sentence.
    """

    def __init__(self, message: str, *, law: str) -> None:
        super().__init__(message)
        self.law = law
