"""Step 7, state: what of a model and an optimizer goes into a checkpoint, each tied tensor once and nothing pickled."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

import tiepolicy
from tiepolicy import TiePlan
from tiepolicy_dcp.errors import CheckpointError

#: Bytes kept for the hyperparameters of one parameter group, as JSON padded with spaces. Fixed, since a loader must
#: make room for a tensor before it has seen it.
HYPERPARAMETER_BYTES = 4096


class ModelState(Stateful):
    """A model's parameters and persistent buffers, for `dcp.save({"model": ModelState(model)})` and `dcp.load`.

    Args:
        model: Any module; names lose the prefixes of wrappers.
        plan: The model's plan; made by the default policy if not given.
    """

    def __init__(self, model: nn.Module, *, plan: TiePlan | None = None) -> None:
        self.model = model
        self.plan = plan or tiepolicy.plan(model)

    def state_dict(self) -> dict[str, Any]:
        """The stored names with the live tensors (no copies)."""
        live: dict[str, Any] = dict(get_model_state_dict(self.model))
        return self.plan.compact(live)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Give every name of the model its tensor, aliases from their canonical ones.

        Raises:
            BrokenTieError: If the model's ties did not survive.
        """
        whole: dict[str, Any] = dict(self.plan.expand(state_dict))
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
        live = self._live()
        flat: dict[str, torch.Tensor] = {}
        for name, state in live["state"].items():
            for key, value in state.items():
                if value is not None:  # SGD keeps a None where it has no momentum
                    flat[f"state.{self.plan.canonical(name)}.{key}"] = torch.as_tensor(value)
        for index, group in enumerate(live["param_groups"]):
            flat[f"param_groups.{index}"] = self._encode(index, group)
        return flat

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Give every parameter its state and every group its hyperparameters.

        Raises:
            CheckpointError: If a parameter group holds other parameters than it did when saved.
        """
        live = self._live()
        for name, state in live["state"].items():
            for key, value in state.items():
                if value is not None:
                    loaded = state_dict[f"state.{self.plan.canonical(name)}.{key}"]
                    state[key] = loaded if isinstance(value, torch.Tensor) else type(value)(loaded.item())
        for index, group in enumerate(live["param_groups"]):
            group.update(self._decode(index, group, state_dict[f"param_groups.{index}"]))
        set_optimizer_state_dict(self.model, self.optimizer, live)

    def _live(self) -> dict[str, Any]:
        """State and groups by the names that torch gives the parameters; the values are the live ones."""
        return dict(get_optimizer_state_dict(self.model, self.optimizer))

    def _encode(self, index: int, group: Mapping[str, Any]) -> torch.Tensor:
        values = {key: _plain(value) for key, value in group.items() if key != "params"}
        encoded = json.dumps({"names": self._names_digest(group), "values": values}).encode()
        if len(encoded) > HYPERPARAMETER_BYTES:
            raise CheckpointError(
                f"the hyperparameters of parameter group {index} take {len(encoded)} bytes as JSON, more than the "
                f"{HYPERPARAMETER_BYTES} that fit; keep large values out of the optimizer's param_groups"
            )
        return torch.frombuffer(bytearray(encoded.ljust(HYPERPARAMETER_BYTES)), dtype=torch.uint8)

    def _decode(self, index: int, group: Mapping[str, Any], encoded: torch.Tensor) -> dict[str, Any]:
        try:
            saved = json.loads(bytes(encoded.tolist()))
            names, values = saved["names"], saved["values"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the hyperparameters of parameter group {index} are damaged: {error}") from error
        if names != self._names_digest(group):
            raise CheckpointError(
                f"parameter group {index} holds other parameters than when it was saved: build the optimizer with the "
                "same groups, or load the model without its optimizer"
            )
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

    def _names_digest(self, group: Mapping[str, Any]) -> str:
        names = sorted(self.plan.canonical(name) for name in group["params"])
        return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A hyperparameter as JSON has it: tensors (a capturable learning rate) as numbers, tuples as lists."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
