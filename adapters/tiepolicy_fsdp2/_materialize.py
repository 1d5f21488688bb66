"""Step 4, memory: a model from the meta device gets it without losing a tie, and each tensor its first value once."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

import tiepolicy
from tiepolicy import TiePlan
from tiepolicy.errors import MissingTensorError
from tiepolicy_fsdp2._kept import keep_plan, kept_plan, verify

#: Writes the first values of the tensors that a module holds itself, as transformers' `_init_weights` does.
Init = Callable[[nn.Module], object]


class _Slot(NamedTuple):
    """One name of one tensor."""

    name: str
    module: nn.Module
    attribute: str
    tensor: torch.Tensor


def materialize(model: nn.Module, device: torch.device | str, *, init: Init | None = None) -> None:
    """Give memory to what is on the meta device; ties stay ties. Called by all ranks of a sharded model.

    Tensors that have data already keep it. Each other tensor is initialised once, by the module that holds it under
    its canonical name; a module that holds it under an alias gets scratch memory there. `init` sees whole tensors, and
    the first rank's values are given to all, so a model starts equal at every world size.

    Args:
        model: A module that is sharded already, or not at all; changed in place.
        device: Where the memory is.
        init: Called for each module that holds such tensors, inner modules first, and may write only what the module
            holds itself. Without it the memory is for a checkpoint to fill: floats are NaN until then.

    Raises:
        MissingTensorError: If `init` left a tensor, or a part of it, unwritten; or there is no `init` and a buffer is
            not persistent, so that no checkpoint will fill it. The model then has memory but not all of its values.
        BrokenTieError: If `init` untied what was one tensor.
    """
    plan = kept_plan(model) or keep_plan(model)
    before = list(_slots(model))
    # A tensor object may outlive its memory here: torch gives parameters new data, FSDP2 swaps them.
    data = [None if slot.tensor.is_meta else slot.tensor.detach() for slot in before]
    model.to_empty(device=device)
    plan.retie(model, keep="canonical")
    _restore_buffers(before)
    after = list(_slots(model))
    fresh: dict[str, _Slot] = {}
    with torch.no_grad():
        for slot, values in zip(after, data, strict=True):
            if values is None:
                fresh[slot.name] = slot
            else:
                slot.tensor.copy_(values)
        for slot in fresh.values():
            _clear(slot.tensor)
    if init is None:
        _check_loadable(fresh, model)
    else:
        _initialise(fresh, after, plan, init)
    verify(model, step="materialize")


def _slots(model: nn.Module) -> Iterator[_Slot]:
    """Every parameter and buffer, also those that are not persistent, under each of its names."""
    for path, module in tiepolicy.named_modules(model):
        tensors = [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for attribute, tensor in tensors:
            yield _Slot(f"{path}.{attribute}" if path else attribute, module, attribute, tensor)


def _restore_buffers(before: list[_Slot]) -> None:
    """Make one object again of what was one buffer; the plan does not know those that are not persistent."""
    first: dict[int, torch.Tensor] = {}
    for slot in before:
        now = getattr(slot.module, slot.attribute)
        if not isinstance(now, nn.Parameter):
            setattr(slot.module, slot.attribute, first.setdefault(id(slot.tensor), now))


def _clear(tensor: torch.Tensor) -> None:
    """Fill memory with what cannot pass for a value."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype is not torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).min)


def _is_unwritten(tensor: torch.Tensor) -> bool:
    """Whether memory still holds, in whole or for floats in part, what `_clear` wrote."""
    if tensor.numel() == 0 or tensor.dtype is torch.bool:
        return False
    if tensor.is_floating_point() or tensor.is_complex():
        wide = tensor if tensor.is_complex() else tensor.float()
        return bool(wide.isnan().any())
    return bool((tensor == torch.iinfo(tensor.dtype).min).all())


def _check_loadable(fresh: dict[str, _Slot], model: nn.Module) -> None:
    kept = model.state_dict(keep_vars=True).values()
    loadable = {id(value) for value in kept}
    lost = sorted(name for name, slot in fresh.items() if id(slot.tensor) not in loadable)
    if lost:
        raise MissingTensorError(
            f"{', '.join(lost)} had no data and is in no state dict (a buffer that is not persistent), so no "
            "checkpoint will fill it: pass an init that computes it, or build its module on a real device",
            names=lost,
        )


def _initialise(fresh: dict[str, _Slot], slots: list[_Slot], plan: TiePlan, init: Init) -> None:
    primary: dict[int, str] = {}
    of_module: dict[int, list[_Slot]] = {}
    for slot in slots:
        if slot.name in fresh and plan.canonical(slot.name) == slot.name:
            primary.setdefault(id(slot.tensor), slot.name)
        of_module.setdefault(id(slot.module), []).append(slot)
    unwritten: list[str] = []
    for held in reversed(list(of_module.values())):
        own = {slot.attribute: slot for slot in held if primary.get(id(slot.tensor)) == slot.name}
        if own:
            unwritten += _initialise_module(held[0].module, held, own, init)
    if unwritten:
        raise MissingTensorError(
            f"init left {', '.join(sorted(unwritten))} unwritten, wholly or in part: the memory would have passed for "
            "weights. Let it write every tensor that the module it is called with holds, buffers too",
            names=sorted(unwritten),
        )


def _initialise_module(module: nn.Module, held: list[_Slot], own: dict[str, _Slot], init: Init) -> list[str]:
    """Run `init` on whole tensors, and on scratch memory where the module holds what others initialise."""
    live = {slot.attribute: slot.tensor for slot in held}
    for attribute, tensor in live.items():
        if attribute not in own or isinstance(tensor, DTensor):
            setattr(module, attribute, _scratch(tensor))
    try:
        with torch.no_grad():
            init(module)
        written = {attribute: getattr(module, attribute) for attribute in own}
    finally:
        for attribute, tensor in live.items():
            setattr(module, attribute, tensor)
    unwritten = [own[attribute].name for attribute, values in written.items() if _is_unwritten(values)]
    with torch.no_grad():
        for attribute, values in written.items():
            target = live[attribute]
            if isinstance(target, DTensor):
                target.copy_(distribute_tensor(values.detach(), target.device_mesh, target.placements))
            elif values is not target:
                target.copy_(values)
    return unwritten


def _scratch(tensor: torch.Tensor) -> torch.Tensor:
    """Cleared memory for the whole of a tensor, a parameter if it is one."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=local.device)
    _clear(whole)
    return nn.Parameter(whole, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
