"""FSDP2 under the tie policy: what was one parameter stays one through sharding, memory, loading and training."""

from tiepolicy.errors import BrokenTieError as BrokenTieError
from tiepolicy.errors import ShardingError as ShardingError
from tiepolicy_fsdp2._groups import Block as Block
from tiepolicy_fsdp2._groups import ShardGroup as ShardGroup
from tiepolicy_fsdp2._groups import shard_groups as shard_groups
from tiepolicy_fsdp2._kept import keep_plan as keep_plan
from tiepolicy_fsdp2._kept import kept_plan as kept_plan
from tiepolicy_fsdp2._kept import retie as retie
from tiepolicy_fsdp2._kept import verified as verified
from tiepolicy_fsdp2._kept import verify as verify
from tiepolicy_fsdp2._materialize import Init as Init
from tiepolicy_fsdp2._materialize import materialize as materialize
from tiepolicy_fsdp2._pipeline import StageTies as StageTies
from tiepolicy_fsdp2._pipeline import sync_tied_gradients as sync_tied_gradients
from tiepolicy_fsdp2._pipeline import tie_stages as tie_stages
from tiepolicy_fsdp2._pipeline import verify_stages as verify_stages
from tiepolicy_fsdp2._shard import ShardOptions as ShardOptions
from tiepolicy_fsdp2._shard import fully_shard as fully_shard
from tiepolicy_fsdp2._shard import parallelize_module as parallelize_module
