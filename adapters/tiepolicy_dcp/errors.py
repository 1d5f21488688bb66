"""What can go wrong with a checkpoint folder, beside the errors of `tiepolicy`."""

from tiepolicy.errors import TiePolicyError


class CheckpointError(TiePolicyError):
    """A checkpoint cannot be written, found or read."""


class UntrustedCheckpointError(CheckpointError):
    """A checkpoint asks for more than reading tensors: to run code, or to open files outside its folder."""
