"""What can go wrong while a model is sharded, beside the other errors of `tiepolicy`."""

from tiepolicy.errors import BrokenTieError as BrokenTieError
from tiepolicy.errors import MissingTensorError as MissingTensorError
from tiepolicy.errors import PlanMismatchError as PlanMismatchError
from tiepolicy.errors import TieConflictError as TieConflictError
from tiepolicy.errors import TiePolicyError


class ShardingError(TiePolicyError):
    """A model cannot be sharded, materialised or cut into stages as it was asked without losing a tie or a value."""
