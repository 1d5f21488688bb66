"""Step 10, state: what of a model and an optimizer goes into a checkpoint, tied tensors once and nothing pickled."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
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
from tiepolicy import Owners, TiePlan
from tiepolicy_dcp.errors import CheckpointError

#: Bytes kept for the hyperparameters of one parameter group, as JSON padded with spaces. Fixed, since a loader must
#: make room for a tensor before it has seen it.
HYPERPARAMETER_BYTES = 4096


class StateEntry(NamedTuple):
    """One tensor of an optimizer's state."""

    tensor: torch.Tensor
    #: Canonical name of the parameter, and which of its states this is; None for a group's hyperparameters.
    place: tuple[str, str] | None
    #: Of hyperparameters, the group they are for.
    group: "Group | None"


class Group(NamedTuple):
    """The parameters of one group, in words that do not depend on ties."""

    position: int
    #: Every name of each parameter, sorted: two parameters have the names that one has when they are tied.
    names: tuple[str, ...]
    num_parameters: int


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
        """Give every name of the model its tensor, aliases from their canonical ones.

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
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, plan: TiePlan | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.plan = plan or tiepolicy.plan(model)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State tensors (live, no copies) and encoded hyperparameters, by flat name."""
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
            flat[f"param_groups.{index}"] = StateEntry(_encode(group, values), None, group)
        return flat

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], *, compared: bool = False) -> None:
        """Give every parameter its state and every group its hyperparameters.

        Args:
            state_dict: Values for all names of `state_dict()`.
            compared: Whether somebody has made sure that what is one parameter here had one state when it was saved.
                `tiepolicy_dcp.load` does; a plain `dcp.load` reads one state and looks at no other.

        Raises:
            CheckpointError: If a parameter group holds other parameters than it did when saved.
        """
        live = self._live()
        stored_as = self._stored_names(live)
        for name, state in live["state"].items():
            for key, value in state.items():
                if value is not None:
                    loaded = state_dict[f"state.{stored_as[name]}.{key}"]
                    state[key] = loaded if isinstance(value, torch.Tensor) else type(value)(loaded.item())
        for index, values in enumerate(live["param_groups"]):
            group = self._group(index, values, stored_as)
            values.update(hyperparameters(group, state_dict[f"param_groups.{index}"], compared=compared))
        set_optimizer_state_dict(self.model, self.optimizer, live)

    def _live(self) -> dict[str, Any]:
        """State and groups by the names that torch gives the parameters; the values are the live ones."""
        own = {id(parameter) for parameter in self.model.parameters()}
        for index, group in enumerate(self.optimizer.param_groups):
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
        names = {stored_as[name] for name in values["params"]}
        others = set(stored_as.values()) - names
        for name in sorted(names):
            names |= {alias.name for alias in self.plan.whole_aliases(name)} - others
        return Group(index, tuple(sorted(names)), len(values["params"]))


def _is_in_place(own: Any, value: Any) -> bool:
    """Whether two values are one tensor in memory."""
    if own is value:
        return True
    if isinstance(own, DTensor) and isinstance(value, DTensor) and own.placements == value.placements:
        own, value = own.to_local(), value.to_local()
    # Other subclasses may have no memory of their own, and then no address.
    if not {type(own), type(value)} <= {torch.Tensor, nn.Parameter}:
        return False
    same = (own.shape, own.stride(), own.dtype, own.data_ptr()) == (
        value.shape,
        value.stride(),
        value.dtype,
        value.data_ptr(),
    )
    return same and own.device == value.device


def hyperparameters(group: Group, encoded: torch.Tensor, *, compared: bool) -> dict[str, Any]:
    """Decode what `OptimizerState` stores of one parameter group.

    Args:
        group: The live group.
        encoded: What was stored.
        compared: Whether it is known that each live parameter had one state when it was saved.

    Raises:
        CheckpointError: If the group held other parameters, or the values are damaged.
    """
    try:
        saved = json.loads(bytes(encoded.tolist()))
        digest, num_parameters, values = saved["names"], int(saved["num_parameters"]), dict(saved["values"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the hyperparameters of parameter group {group.position} are damaged: {error}"
        ) from error
    if digest != _digest(group.names):
        raise CheckpointError(
            f"parameter group {group.position} holds other parameters than when it was saved: build the optimizer with "
            "the same groups, or load the model without its optimizer"
        )
    if num_parameters > group.num_parameters and not compared:
        raise CheckpointError(
            f"parameter group {group.position} had {num_parameters} parameters when it was saved and has "
            f"{group.num_parameters}, as names are tied that were not: plain DCP cannot tell which of their states is "
            "right. Use tiepolicy_dcp.load, which compares them, or load the model without its optimizer"
        )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _encode(group: Group, values: Mapping[str, Any]) -> torch.Tensor:
    saved = {
        "names": _digest(group.names),
        "num_parameters": group.num_parameters,
        "values": {key: _plain(value) for key, value in values.items() if key != "params"},
    }
    encoded = json.dumps(saved).encode()
    if len(encoded) > HYPERPARAMETER_BYTES:
        raise CheckpointError(
            f"the hyperparameters of parameter group {group.position} take {len(encoded)} bytes as JSON, more than the "
            f"{HYPERPARAMETER_BYTES} that fit; keep large values out of the optimizer's param_groups"
        )
    return torch.frombuffer(bytearray(encoded.ljust(HYPERPARAMETER_BYTES)), dtype=torch.uint8)


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A hyperparameter as JSON has it: tensors (a capturable learning rate) as numbers, tuples as lists."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
