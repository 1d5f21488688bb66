"""Step 6, tensor parallel: tied weights that were cut the same way become one parameter again."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.parallel import parallelize_module as torch_parallelize_module

from tiepolicy_fsdp2._kept import keep_plan, kept_plan, places, verify
from tiepolicy_fsdp2.errors import ShardingError


def parallelize_module(
    model: nn.Module, mesh: DeviceMesh, parallelize_plan: ParallelStyle | dict[str, ParallelStyle]
) -> nn.Module:
    """Cut a model for tensor parallelism as torch does, and keep its ties. Called by all ranks of the mesh.

    torch cuts each name for itself and leaves two parameters of one. A vocab-parallel embedding (`RowwiseParallel`)
    and head (`ColwiseParallel`) both have `Shard(0)` and become one parameter again, with one gradient.

    Args:
        model: The whole module; changed in place. Call it before `fully_shard` and before the optimizer is built.
        mesh: One dimension, of tensor parallelism.
        parallelize_plan: As torch takes it.

    Returns:
        The same module.

    Raises:
        ShardingError: If tied weights were cut differently. The module cannot be used then; build it again.
        BrokenTieError: If a tie was lost before.
    """
    plan = kept_plan(model) or keep_plan(model)
    plan.verify(model, after="its plan was kept")
    parallel = torch_parallelize_module(model, mesh, parallelize_plan)
    cuts = {place.name: _cut(place.parameter) for place in places(model)}
    for group in plan.groups:
        for alias in plan.whole_aliases(group.canonical):
            if cuts.get(alias.name) != cuts.get(group.canonical):
                raise ShardingError(
                    f"{group.canonical} and {alias.name} are one tensor, but the plan cuts them differently: "
                    f"{cuts.get(group.canonical)} and {cuts.get(alias.name)}. Give both the same placement, such as "
                    "RowwiseParallel for an embedding and ColwiseParallel for its head, or neither; then build the "
                    "model again",
                    names=[group.canonical, alias.name],
                )
    plan.retie(model)
    verify(model, step="parallelize_module")
    return parallel


def _cut(parameter: nn.Parameter) -> str:
    """How a parameter is spread, for comparison and for people."""
    if not isinstance(parameter, DTensor):
        return "not cut"
    return f"{tuple(parameter.placements)} over {tuple(parameter.device_mesh.mesh.flatten().tolist())}"
