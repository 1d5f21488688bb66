"""Step 10, state: what goes into a checkpoint, of a model, an optimizer and what rides along, and nothing pickled."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import tiepolicy
from tiepolicy import Owners, TensorSpec, TiePlan
from tiepolicy.errors import CheckpointError
from tiepolicy.files import member
from tiepolicy_dcp._files import write_safetensors
from tiepolicy_dcp._folder import read_json, write_text
from tiepolicy_dcp._groups import Group, decode, encode
from tiepolicy_dcp._ranks import on_all_ranks


class StateEntry(NamedTuple):
    """One tensor of an optimizer's state."""

    tensor: torch.Tensor
    #: Canonical name of the parameter, and which of its states this is; None for a group's hyperparameters.
    place: tuple[str, str] | None
    #: Of hyperparameters, the group they are for.
    group: Group | None


class ModelState(Stateful):
    """A model's parameters and persistent buffers, for `dcp.save({"model": ModelState(model)})` and `dcp.load`.

    A plain `dcp.load` reads the canonical name of a tie and looks at no other: whether a checkpoint of an untied model
    holds two values, it cannot tell. `tiepolicy_dcp.load` compares them.

    Args:
        model: Any module; names lose the prefixes of wrappers.
        plan: The model's plan; made by the default policy if not given.
        external: Other models, by the names to know them under. What is theirs is not stored, but taken from them
            again if it still has the digest of the plan.
    """

    def __init__(self, model: nn.Module, *, plan: TiePlan | None = None, external: Owners | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise CheckpointError(
                f"model is of the type {type(model).__name__}, not a module: hand over the model itself, not its "
                "state_dict(), since only a module has parameters to tie and to read back into"
            )
        self.model = model
        self.external = external
        self.plan = plan or tiepolicy.plan(model, external=external, digests=external is not None)

    def state_dict(self) -> dict[str, Any]:
        """The stored names with the live tensors (no copies)."""
        live: dict[str, Any] = dict(get_model_state_dict(self.model))
        return self.plan.compact(live)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Give every name of the model its tensor in `state_dict`, aliases from their canonical ones.

        Raises:
            BrokenTieError: If the model's ties did not survive.
            MissingTensorError: If another model owns a tensor and is not given.
            ExternalOwnerError: If it does not hold what was recorded.
        """
        whole: dict[str, Any] = dict(self.plan.expand(state_dict, external=self.external))
        own: dict[str, Any] = dict(get_model_state_dict(self.model))
        if set(own) == set(whole):
            # DCP reads into the live tensors; copying them onto themselves would cost as much as reading.
            whole = {name: value for name, value in whole.items() if not _is_in_place(own[name], value)}
            if whole:
                set_model_state_dict(self.model, whole, options=StateDictOptions(strict=False))
        else:
            set_model_state_dict(self.model, whole)
        self.plan.verify(self.model, after="its state was loaded")


class OptimizerState(Stateful):
    """An optimizer's state under the canonical names of the parameters, as tensors only.

    `state.<name>.<key>` is the state of one parameter, `param_groups.<i>` the hyperparameters of one group as JSON
    bytes. Which name a tied parameter has does not depend on the order in which modules were registered.

    Args:
        model: The model whose parameters are optimized.
        optimizer: The optimizer. If it has no state yet, reading its state makes it (a step with no effect).
        plan: The model's plan; made by the default policy if not given.

    Raises:
        CheckpointError: If `optimizer` is no optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, plan: TiePlan | None = None) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise CheckpointError(f"optimizer is a {type(optimizer).__name__}: hand over the optimizer itself")
        self.model = model
        self.optimizer = optimizer
        self.plan = plan or tiepolicy.plan(model)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state tensors (live, no copies) and encoded hyperparameters, by flat name."""
        return {name: entry.tensor for name, entry in self.entries().items()}

    def entries(self) -> dict[str, StateEntry]:
        """What `state_dict` returns, with whose it is."""
        live = self._live()
        stored_as = self._stored_names(live)
        flat: dict[str, StateEntry] = {}
        for parameter, state in live["state"].items():
            name = stored_as[parameter]
            for key, value in state.items():
                if value is not None:  # SGD keeps a None where it has no momentum
                    flat[f"state.{name}.{key}"] = StateEntry(torch.as_tensor(value), (name, key), None)
        for index, values in enumerate(live["param_groups"]):
            group = self._group(index, values, stored_as)
            flat[f"param_groups.{index}"] = StateEntry(encode(group), None, group)
        return flat

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Give every parameter its state and every group its hyperparameters.

        A plain `dcp.load` reads one state of each parameter and looks at no other.

        Args:
            state_dict: Values for all names of `state_dict()`.

        Raises:
            CheckpointError: If a parameter group holds other parameters than it did when saved, or fewer, as names are
                tied that were not.
        """
        groups = {name: entry.group for name, entry in self.entries().items() if entry.group is not None}
        self.fill(state_dict, {name: decode(group, state_dict[name], compared=False) for name, group in groups.items()})

    def fill(self, states: Mapping[str, torch.Tensor], hyperparameters: Mapping[str, Mapping[str, Any]]) -> None:
        """Give parameters their `states` and groups their `hyperparameters`, by the names of `state_dict()`."""
        live = self._live()
        stored_as = self._stored_names(live)
        for name, state in live["state"].items():
            for key, value in state.items():
                if value is not None:
                    loaded = states[f"state.{stored_as[name]}.{key}"]
                    state[key] = loaded if isinstance(value, torch.Tensor) else type(value)(loaded.item())
        for index, values in enumerate(live["param_groups"]):
            values.update(hyperparameters[f"param_groups.{index}"])
        set_optimizer_state_dict(self.model, self.optimizer, live)
        for index, group in enumerate(self.optimizer.param_groups):
            if not group["params"]:  # torch 2.13 leaves nothing in it, not even a learning rate
                group.update(hyperparameters[f"param_groups.{index}"])

    def _live(self) -> dict[str, Any]:
        """State and groups by the names that torch gives the parameters; the values are the live ones."""
        own = {id(parameter): name for name, parameter in self.model.named_parameters()}
        seen: set[int] = set()
        for index, group in enumerate(self.optimizer.param_groups):
            held = {id(parameter) for parameter in group["params"]}
            for twice in sorted(own[parameter] for parameter in held & seen):
                raise CheckpointError(
                    f"parameter group {index} of the optimizer holds {twice}, which an earlier group holds too: each "
                    "step changes it twice. Leave it in one"
                )
            seen |= held & own.keys()
            lost = sum(id(parameter) not in own for parameter in group["params"])
            if lost:
                raise CheckpointError(
                    f"parameter group {index} of the optimizer holds {lost} parameter{'s' * (lost > 1)} that the model "
                    "does not have: the model's were replaced after the optimizer was built, by loading with "
                    "assign=True, converting or tying. Build the optimizer after that"
                )
        return dict(get_optimizer_state_dict(self.model, self.optimizer))

    def _stored_names(self, live: Mapping[str, Any]) -> dict[str, str]:
        """What each parameter is called in a checkpoint: the canonical name, but only of one parameter each.

        Views of a tensor, and parameters that share a storage without being one object, have states of their own.
        """
        names: dict[str, str] = {}
        for parameter in sorted(name for group in live["param_groups"] for name in group["params"]):
            canonical = self.plan.canonical(parameter)
            whole = {canonical, *(alias.name for alias in self.plan.whole_aliases(canonical))}
            names[parameter] = canonical if parameter in whole else parameter
        taken: set[str] = set()
        for parameter, name in sorted(names.items(), key=lambda item: item[0] != item[1]):
            names[parameter] = parameter if name in taken else name
            taken.add(names[parameter])
        return names

    def _group(self, index: int, values: Mapping[str, Any], stored_as: Mapping[str, str]) -> Group:
        parameters = tuple(sorted(stored_as[name] for name in values["params"]))
        others = set(stored_as.values()).difference(parameters)
        aliases = {alias.name for name in parameters for alias in self.plan.whole_aliases(name)}
        plain = {key: _plain(value) for key, value in values.items() if key != "params"}
        return Group(index, tuple(sorted((aliases - others).union(parameters))), parameters, plain)


def observed(model: ModelState, optimizer: OptimizerState | None) -> tuple[dict[str, Any], dict[str, StateEntry]]:
    """The live tensors of a model and the entries of its optimizer. Called by all ranks: one's error is that of all."""
    live: dict[str, Any] = {}
    entries: dict[str, StateEntry] = {}

    def look() -> None:
        live.update(model.state_dict())
        for name, value in live.items():
            if not isinstance(value, torch.Tensor):
                continue
            if name not in model.plan.tensors:
                raise CheckpointError(
                    f"the plan does not know {name}: it is of another model, or older than this tensor. Plan this model"
                )
            if value.is_meta:
                raise CheckpointError(
                    f"{name} {tuple(value.shape)} is on the meta device, where no values are: give the model memory "
                    "first, by tiepolicy_fsdp2.materialize or by to_empty"
                )
        entries.update({} if optimizer is None else optimizer.entries())

    on_all_ranks(look)
    return live, entries


def are_in_place(values: Iterable[Any], model: nn.Module) -> bool:
    """Whether all values are tensors in the memory of the model's own, so that to read into them fills it."""
    own = {_place(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return {_place(value) for value in values} <= own - {None}


def _is_in_place(own: Any, value: Any) -> bool:
    """Whether two values are one tensor in memory."""
    return own is value or _place(own) == _place(value) is not None


def _place(value: Any) -> tuple[Any, ...] | None:
    """Where a tensor lies and how; None for what may have no memory of its own, and then no address."""
    placements = None
    if isinstance(value, DTensor):
        placements, value = value.placements, value.to_local()
    if type(value) not in (torch.Tensor, nn.Parameter):
        return None
    return placements, value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _plain(value: Any) -> Any:
    """A hyperparameter as JSON has it: tensors (a capturable learning rate) as numbers, tuples as lists."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


VALUES = "extra.json"
TENSORS = "extra.safetensors"
_REFERENCE = "tensor in extra.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """Extra state as its two files hold it; the tensors are copies on the CPU."""

    values: str = "{}"
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def pack_extra(extra: Mapping[str, Any]) -> Extra:
    """Take a nested structure of JSON values and tensors apart.

    Raises:
        CheckpointError: If it holds what is neither, or would come back as something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    if not isinstance(extra, Mapping):
        raise CheckpointError(f"extra must be a dict, not a {type(extra).__name__}")
    try:
        return Extra(values=json.dumps(_take_tensors(extra, "", tensors), indent=1), tensors=tensors)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"extra state can hold tensors and what JSON can (strings, numbers, lists, dicts with string keys): {error}"
        ) from error


def write_extra(folder: Path, extra: Extra) -> None:
    """Write both files; the one for tensors only if there are any."""
    if extra.tensors:
        specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in extra.tensors.items()}
        write_safetensors(folder / TENSORS, specs, lambda names: [extra.tensors[name] for name in names])
    write_text(folder / VALUES, extra.values)


def read_extra(folder: Path) -> dict[str, Any]:
    """What was packed and written; tensors come back on the CPU, tuples as lists.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    values = read_json(folder / VALUES, allow_nan=True)
    if values is None:
        raise CheckpointError(f"{folder / VALUES} is missing: a part of the checkpoint was lost")
    try:
        tensors = load_file(member(folder, TENSORS)) if os.path.lexists(folder / TENSORS) else {}
        return dict(_put_tensors(values, tensors))
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:  # RuntimeError: cannot be opened
        raise CheckpointError(f"{folder / TENSORS} is damaged or does not belong to {VALUES}: {error}") from error


def _take_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        while path in tensors:  # a key may have a slash of its own
            path += "/"
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_REFERENCE: path}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{key!r}, a key of {path or 'it'}, would come back as a string")
        return {key: _take_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_REFERENCE}:
            return tensors[value[_REFERENCE]]
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    return [_put_tensors(item, tensors) for item in value] if isinstance(value, list) else value
