"""What can go wrong with a checkpoint folder, beside the other errors of `tiepolicy`."""

from tiepolicy.errors import CheckpointError as CheckpointError
from tiepolicy.errors import LostRankError as LostRankError
from tiepolicy.errors import UntrustedCheckpointError as UntrustedCheckpointError
