"""torch.distributed.checkpoint under the tie policy: each tied tensor once, whole or absent, and nothing unpickled."""

from tiepolicy.errors import CheckpointError as CheckpointError
from tiepolicy.errors import LostRankError as LostRankError
from tiepolicy.errors import UntrustedCheckpointError as UntrustedCheckpointError
from tiepolicy_dcp._async import PendingSave as PendingSave
from tiepolicy_dcp._async import async_save as async_save
from tiepolicy_dcp._load import Restored as Restored
from tiepolicy_dcp._load import load as load
from tiepolicy_dcp._root import BEST as BEST
from tiepolicy_dcp._root import LATEST as LATEST
from tiepolicy_dcp._save import save as save
from tiepolicy_dcp._state import ModelState as ModelState
from tiepolicy_dcp._state import OptimizerState as OptimizerState
from tiepolicy_dcp._store import CheckpointStore as CheckpointStore
