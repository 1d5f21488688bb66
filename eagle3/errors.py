"""Everything that can be wrong with a run's input, each a sentence that says what, where, why and what to do."""


class Eagle3Error(ValueError):
    """Base of all errors that a user of the trainer can cause; the command line prints them and exits with 2."""


class ConfigError(Eagle3Error):
    """Two settings contradict each other, or one contradicts the target."""


class DataError(Eagle3Error):
    """A conversation file, or a line of one, cannot be read, or nothing in it can be trained on."""


class TargetError(Eagle3Error):
    """The target model cannot serve as one: missing, too shallow, or of a kind the trainer does not know."""


class CacheError(Eagle3Error):
    """States on disk cannot be written or read, or were made from another target, other data or other settings."""


class DraftError(Eagle3Error):
    """The draft cannot be built from its config."""


class CheckpointError(Eagle3Error):
    """The folder of a run, or a checkpoint in it, cannot be written where asked, or belongs to another run."""


class NumericsError(Eagle3Error):
    """A loss or a state of the target is no finite number."""


class LostProcessError(Eagle3Error):
    """Another process of the run is gone."""


class ExportError(Eagle3Error):
    """What was exported is not the draft."""
