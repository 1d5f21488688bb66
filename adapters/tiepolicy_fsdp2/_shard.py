"""Step 3, sharding: tied modules in one group under FSDP2, tied parameters cut alike under tensor parallelism."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict, TypeVar, Unpack

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.parallel import parallelize_module as torch_parallelize_module

from tiepolicy import Reason, TiePlan
from tiepolicy.errors import PlanMismatchError, ShardingError
from tiepolicy_fsdp2._groups import Block, ShardGroup, shard_groups
from tiepolicy_fsdp2._kept import keep_plan, kept_plan, places, verify

T = TypeVar("T")


def gathered(find: Callable[[], T], groups: Sequence[dist.ProcessGroup | None]) -> dict[int, T]:
    """What every rank found, by rank of the default group. Called by all ranks.

    Args:
        find: May not communicate.
        groups: Groups of this rank whose members, and the members of whose members, are meant; None is the default.

    Raises:
        Exception: On every rank, what `find` raised on the first of those where it did.
    """
    finding: tuple[T | None, Exception | None]
    try:
        finding = find(), None
    except Exception as error:  # handed on whole, to every rank
        finding = None, error
    known = {dist.get_rank(): finding}
    for group in groups:  # what one dimension of a mesh brought together, the next one spreads
        of_ranks = [known] * dist.get_world_size(group)
        dist.all_gather_object(of_ranks, known, group=group)
        known = {rank: found for ranks in of_ranks for rank, found in ranks.items()}
    results: dict[int, T] = {}
    for rank in sorted(known):
        found, failure = known[rank]
        if failure is not None:
            raise failure
        if found is not None:
            results[rank] = found
    return results


def agreed(decide: Callable[[], tuple[T, str]], mesh: DeviceMesh | None) -> T:
    """What this rank decided, once every rank is known to have decided the same. Called by all ranks.

    Args:
        decide: Returns a decision and a digest of it, equal on all ranks. May not communicate.
        mesh: The ranks; all of the default group if it is None.

    Raises:
        PlanMismatchError: On every rank, if two ranks decided differently.
        Exception: On every rank, what `decide` raised on the first of those where it did.
    """
    if not dist.is_initialized():
        return decide()[0]
    decisions: list[T] = []

    def digest() -> str:
        decision, its_digest = decide()
        decisions.append(decision)
        return its_digest

    known = gathered(digest, [None] if mesh is None else mesh.get_all_groups())
    first = min(known)
    different = [rank for rank, found in known.items() if found != known[first]]
    if different:
        raise PlanMismatchError(
            f"rank {first} and rank {different[0]} decided differently what is one tensor or what is sharded together "
            f"(ranks that differ from rank {first}: {different}); nothing was sharded. Build the same model, with the "
            "same ties and the same blocks, on every rank"
        )
    return decisions[0]


M = TypeVar("M", bound=nn.Module)


class ShardOptions(TypedDict, total=False):
    """What torch's `fully_shard` takes beside the module and the mesh; what is not given has torch's default."""

    reshard_after_forward: bool | int | None
    shard_placement_fn: Callable[[nn.Parameter], Shard | None] | None
    mp_policy: MixedPrecisionPolicy
    offload_policy: OffloadPolicy
    ignored_params: set[nn.Parameter] | None


def fully_shard(
    model: M,
    *,
    blocks: Iterable[Block | Sequence[Block]] = (),
    mesh: DeviceMesh | None = None,
    **options: Unpack[ShardOptions],
) -> M:
    """Shard a model with FSDP2 so that tied weights stay one parameter, whatever the blocks. Called by all ranks.

    Takes the model's plan first and keeps it for `verify`. Two parameters over one memory (a tie through `.data`)
    become one. Works on the meta device; `materialize` gives the model its memory afterwards. Build the optimizer last.

    Example:
        In a script that torchrun starts; here, one process.

        >>> import torch.distributed as dist
        >>> dist.init_process_group("cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        >>> model = nn.Sequential(nn.Embedding(6, 2), nn.Linear(2, 6, bias=False))
        >>> model[1].weight = model[0].weight
        >>> model = fully_shard(model, blocks=["0", "1"], mesh=mesh)
        >>> model[1].weight is model[0].weight
        True
        >>> dist.destroy_process_group()

    Args:
        model: The whole module; changed in place, its class as well, as torch does it.
        blocks: What to gather on its own, as `shard_groups` takes it. The rest of the model is the last group.
        mesh: One dimension to shard over, or two: replicate, then shard. By default all ranks shard.
        options: Handed to torch for every group as they are.

    Returns:
        The same module, which now is an `FSDPModule` too.

    Raises:
        ShardingError: If a block is not in the model or has no forward(), a part is sharded already, a parameter is a
            scalar or not contiguous, or a tie cannot survive: a view of a part of a parameter, or a buffer that is one.
        BrokenTieError: If a tie was lost since the plan was kept.
        PlanMismatchError: If ranks have other ties or other blocks. Whatever is wrong on one rank is raised on every
            rank, before anything is sharded.
    """

    def decide() -> tuple[tuple[ShardGroup, ...], str]:
        plan = kept_plan(model) or keep_plan(model)
        plan.verify(model, after="its plan was kept")
        _check_can_be_sharded(model, plan)
        ignored = _one_parameter_each(model, plan, set(options.get("ignored_params") or ()))
        options["ignored_params"] = ignored or None
        groups = shard_groups(model, blocks=blocks, ignored_params=ignored)
        _check_torch_takes(model, groups, ignored)
        return groups, _digest(plan, groups)

    for group in agreed(decide, mesh):
        modules = group.modules[0] if len(group.modules) == 1 else list(group.modules)
        torch_fully_shard(modules, mesh=mesh, **options)
    verify(model, step="fully_shard")
    return model


def _digest(plan: TiePlan, groups: Sequence[ShardGroup]) -> str:
    return hashlib.sha256(repr((plan.digest, [group.paths for group in groups])).encode()).hexdigest()


def _check_can_be_sharded(model: nn.Module, plan: TiePlan) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            raise ShardingError(
                f"a {type(module).__name__} in the {type(model).__name__} is sharded already, so its ties can no "
                "longer be put in one group: hand the whole model to fully_shard before, and name its parts in blocks"
            )
    parameters = {place.name for place in places(model)}
    for group in plan.groups:
        for alias in group.aliases:
            pair = {alias.name, group.canonical}
            if alias.view is not None and pair & parameters:
                raise ShardingError(
                    f"{alias.name} is a part of {group.canonical} in one memory, and sharding gives each parameter "
                    f"memory of its own, so the two would be trained apart. Keep only {group.canonical} as a parameter "
                    "and take the part from it in forward()",
                    names=sorted(pair),
                )
            if len(pair & parameters) == 1:
                raise ShardingError(
                    f"of {alias.name} and {group.canonical}, which are one tensor, one is a buffer and one a "
                    "parameter; sharding would move the parameter only. Make both parameters",
                    names=sorted(pair),
                )
    for refusal in plan.refused:
        names = refusal.claim.names
        if refusal.verdict.reason is Reason.STORAGE_OVERLAP_PARTIAL and parameters.intersection(names):
            raise ShardingError(
                f"{' and '.join(names)} overlap in one memory, and sharding gives each parameter memory of its own, so "
                "the two would be trained apart. Give each its own memory before",
                names=names,
            )


def _check_torch_takes(model: nn.Module, groups: Sequence[ShardGroup], ignored: set[nn.Parameter]) -> None:
    """Refuse what torch refuses of one group once others are sharded."""
    for group in groups:
        for module in group.modules:
            if isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward:
                raise ShardingError(
                    f"a {type(module).__name__} of the group {list(group.paths)} has no forward(), at which FSDP2 "
                    "would gather it: name the modules in it as blocks, or wrap it in a module that has one"
                )
    for place in places(model):
        parameter = place.parameter
        if parameter not in ignored and (parameter.dim() == 0 or not parameter.is_contiguous()):
            problem = (
                "not contiguous; assign a contiguous copy" if parameter.dim() else "a scalar; give it the shape (1,)"
            )
            raise ShardingError(
                f"FSDP2 cannot shard {place.name}, which is {problem}, or name it in ignored_params", names=[place.name]
            )


def _one_parameter_each(model: nn.Module, plan: TiePlan, ignored: set[nn.Parameter]) -> set[nn.Parameter]:
    """Tie what only shares memory, and follow the ignored parameters to the ones that stand for them."""
    before = {place.name: place.parameter for place in places(model)}
    for group in plan.groups:
        left_out = {name: before[name] in ignored for name in group.names if name in before}
        if len(set(left_out.values())) > 1:
            names = sorted(left_out, key=lambda name: not left_out[name])
            raise ShardingError(
                f"{names[0]} is among the ignored parameters and {names[-1]}, the same tensor, is not: ignore both or "
                "neither",
                names=names,
            )
    plan.retie(model)
    kept = {place.parameter for place in places(model) if before[place.name] in ignored}
    return kept | (ignored - set(before.values()))


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
