"""Step 7, loading: transformers reads, the policy ties; every tensor comes from the folder, or an error says why not.

transformers asks a model to tie itself once its tensors are read, and tells it which were missing:
`tie_weights(missing_keys=...)`. That is where the decision belongs, and where it is made here. A class that answers by
the policy stands in for the model's own while it is read.
"""

import contextlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

import tiepolicy
from tiepolicy import Conflict, Moment, Policy, TiePlan, first_difference, settle
from tiepolicy.errors import (
    CheckpointError,
    MissingTensorError,
    ShapeMismatchError,
    TieConflictError,
    UntrustedCheckpointError,
)
from tiepolicy.files import Verify, read_json
from tiepolicy_hf._declared import FLAG, Declaration, declarations
from tiepolicy_hf._flags import correct_flags_
from tiepolicy_hf._folder import WEIGHTS, Weights, find_weights
from tiepolicy_hf._trust import check_folder, check_size, naming_config

#: What becomes of two stored values for what the config calls one tensor.
OnConflict = Literal["error", "untie", "canonical"]

_CONFIG = "config.json"
# Options of transformers that would let something be lost, and those that would have it open files nobody looked at.
_LOSING = ("ignore_mismatched_sizes", "output_loading_info", "state_dict", "weights_only", "use_safetensors")
_ELSEWHERE = ("subfolder", "variant", "gguf_file")
_Model = TypeVar("_Model", bound=PreTrainedModel)


@dataclass(slots=True)
class _Evidence:
    """What is learnt while a model is built and read."""

    policy: Policy
    on_conflict: OnConflict
    recorded: TiePlan | None
    #: Alias and stored name, as other tools note them.
    noted: Mapping[str, str]
    #: Whether the file of the config says that nothing is tied; the flag of the config that was made of it may not.
    denied: bool
    #: Where modules are put, by the beginning of their names; empty where the loader chooses.
    places: Mapping[str, object]
    #: Size of the files with weights.
    num_bytes: int
    #: What the class made one tensor while it was built, before reading took it apart.
    built: TiePlan | None = None
    missing: set[str] = field(default_factory=set)
    #: Two stored values of one tensor. Raised when it is known that no shape was wrong either.
    conflict: TieConflictError | None = None


def from_pretrained(
    cls: type[_Model],
    folder: str | Path,
    *,
    on_conflict: OnConflict = "error",
    allow_pickle: bool = False,
    policy: Policy | None = None,
    verify: Verify = "full",
    **kwargs: Any,
) -> _Model:
    """Read a model from a Hugging Face folder, whoever wrote it; what is tied is decided by what the folder holds.

    - One name of a declared tie is stored: both get it and are one tensor.
    - Both are stored with equal values: they are one tensor.
    - Both are stored with different values, or in different shapes: see `on_conflict`; different shapes are apart.
    - Neither is stored, or a head that cannot come from the embedding: an error. Nothing is left at random values.

    Flags of the config that say otherwise are set right on the model that is returned, so that `tie_weights()` and
    `resize_token_embeddings()` keep a trained head. Nothing outside the folder is opened.

    Args:
        cls: A model class of transformers, or one of its Auto classes.
        folder: A folder on this machine.
        on_conflict: "error" to stop where a config ties two names that are stored with different values; "untie" to
            keep both values apart; "canonical" to give both names the value that is stored for the embedding.
        allow_pickle: Read `pytorch_model.bin` where there is no safetensors file, by torch's weights-only unpickler.
        policy: Who decides; by default the built-in rules and the installed plugins.
        verify: What to check of the files if `save_pretrained` wrote them: size and digest, "size" only, or nothing,
            which is "off".
        kwargs: For `cls.from_pretrained`: dtype, device_map, config and the like.

    Returns:
        The model, in evaluation mode as transformers returns it.

    Raises:
        MissingTensorError: If the folder holds a tensor of the model under no name.
        ShapeMismatchError: If it holds one in another shape.
        TieConflictError: If it holds two values for one tensor, and neither `on_conflict` nor a plugin chooses.
        CheckpointError: If the folder is no checkpoint, is damaged, or was put together from two.
        UntrustedCheckpointError: If it points to files outside, or a pickle asks for more than tensors.
    """
    _check_options(on_conflict, kwargs)
    folder = Path(folder).absolute()
    check_folder(folder, verify=verify)
    weights = find_weights(folder, allow_pickle=allow_pickle)
    stated = read_json(folder / _CONFIG) if kwargs.get("config") is None or (folder / _CONFIG).exists() else {}
    device_map = kwargs.get("device_map")
    evidence = _Evidence(
        policy=policy or Policy.from_entry_points(),
        on_conflict=on_conflict,
        recorded=None if weights.manifest is None else TiePlan.from_manifest(weights.manifest),
        noted=weights.noted,
        denied=stated.get(FLAG) is False,
        places=device_map if isinstance(device_map, Mapping) else {},
        num_bytes=sum(file.stat().st_size for file in weights.files),
    )
    with naming_config(cls, folder) if kwargs.get("config") is None else contextlib.nullcontext():
        model, info = _read(_concrete(cls, folder, kwargs), folder, weights, evidence, kwargs)
    _check_complete(model, folder, info, evidence, stated.get("architectures"))
    correct_flags_(model, evidence.policy.plan(model))
    return model


def _check_options(on_conflict: str, kwargs: Mapping[str, object]) -> None:
    if on_conflict not in ("error", "untie", "canonical"):
        raise ValueError(f'on_conflict is {on_conflict!r}; it is "error", "untie" or "canonical"')
    for refused in _LOSING:
        if refused in kwargs:
            raise TypeError(f"{refused} cannot be given: what is missing or does not fit is always an error here")
    for refused in _ELSEWHERE:
        if refused in kwargs:
            raise TypeError(f"{refused} cannot be given: only {WEIGHTS} or its shards in the folder itself are read")


def _read(
    cls: type[_Model], folder: Path, weights: Weights, evidence: _Evidence, kwargs: dict[str, Any]
) -> tuple[_Model, dict[str, Any]]:
    """What transformers makes of a folder, and what it says was missing or did not fit."""
    try:
        model, info = _reading(cls, evidence).from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=not weights.pickled,
            weights_only=True,
            **kwargs,
        )
    except pickle.UnpicklingError as error:
        raise UntrustedCheckpointError(
            f"{weights.files[0]} is damaged, or asks for more than reading tensors. Nothing of it was run, and nothing "
            "was loaded"
        ) from error
    model.__class__ = cls
    return model, info


def _concrete(cls: type[_Model], folder: Path, kwargs: dict[str, Any]) -> type[_Model]:
    """The class of the model that an Auto class would build."""
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
        return cls
    if not hasattr(cls, "from_config"):
        name = cls.__name__ if isinstance(cls, type) else f"a {type(cls).__name__}"
        raise TypeError(f"{name} cannot be loaded; give a model class of transformers, or one of its Auto classes")
    trusted = {key: kwargs[key] for key in ("trust_remote_code", "code_revision") if key in kwargs}
    if not isinstance(kwargs.get("config"), str | Path | None):
        config = kwargs["config"]
    else:
        # Not asked whether to trust a folder's code, transformers asks on the terminal.
        config = AutoConfig.from_pretrained(kwargs.get("config") or folder, **{"trust_remote_code": False} | trusted)
        kwargs["config"] = config
    with torch.device("meta"):
        return type(cls.from_config(config, **trusted))


def _reading(cls: type[_Model], evidence: _Evidence) -> Any:
    """The class with another answer to the question how it is tied."""

    def tie_weights(self: Any, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        if cls.tie_weights is not PreTrainedModel.tie_weights:  # speech models load their adapters there
            cls.tie_weights(self, missing_keys=missing_keys, recompute_mapping=recompute_mapping)
        if missing_keys is None:
            evidence.built = evidence.policy.plan(self)
            check_size(evidence.built, evidence.num_bytes)
            _check_places(self, evidence)
        else:
            _tie_what_was_read_(self, missing_keys, evidence)

    namespace = {"tie_weights": tie_weights, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), namespace)


def _check_places(model: PreTrainedModel, evidence: _Evidence) -> None:
    if evidence.on_conflict == "untie" or not evidence.places:
        return
    names = _Names(model, set())
    for (source, alias), force in _pairs(model, evidence).items():
        here, there = (_place(name, evidence.places) for name in (source, alias))
        if here != there and force is _Force.BINDING and names.could_be_one(source, alias):
            raise CheckpointError(
                f"device_map puts {source} on {here} and {alias} on {there}, but they are one tensor by the model's "
                'config: give both modules one place, or keep them apart by on_conflict="untie". Nothing was loaded',
                names=[source, alias],
            )


def _place(name: str, places: Mapping[str, object]) -> object:
    """What a device map says of a tensor: the entry of the innermost module around it."""
    around = [module for module in places if not module or f"{name}.".startswith(f"{module}.")]
    return places[max(around, key=len)] if around else "no device"


def _tie_what_was_read_(model: PreTrainedModel, missing: set[str], evidence: _Evidence) -> None:
    """Tie what is declared, was built so or was recorded, as far as what was read allows.

    Args:
        model: What was read into.
        missing: Names that were in no file. Those that get the value of another name are taken out.
        evidence: Gets the first conflict, and what is missing still.
    """
    pairs = _pairs(model, evidence)
    names = _Names(model, missing)
    # A name that was missing may be the source of the next one.
    while any(names.fill_(pair) for pair in pairs):
        pass
    for (source, alias), force in pairs.items():
        difference = names.difference(source, alias) if force is _Force.BINDING else None
        if difference is not None:
            kept = _kept(Conflict(canonical=source, alias=alias, difference=difference, moment=Moment.LOAD), evidence)
            if kept is not None:
                names.share_(alias if kept == source else source, kept)
    for (source, alias), force in pairs.items():
        ties = force is not _Force.IF_MISSING and names.could_be_one(source, alias)
        if ties and names.difference(source, alias) is None:
            names.share_(alias, source)
    evidence.missing = set(missing)


class _Force(IntEnum):
    """How far a declared tie goes; the stronger counts."""

    #: One name is filled with the other's value where it is in no file.
    IF_MISSING = 1
    #: And equal values are one tensor, different ones are apart.
    IF_EQUAL = 2
    #: And different values are a conflict.
    BINDING = 3


def _pairs(model: PreTrainedModel, evidence: _Evidence) -> dict[tuple[str, str], _Force]:
    """Source and alias of the ties that were built, recorded or declared, the most certain first."""
    pairs = {(name, alias): _Force.IF_MISSING for alias, name in evidence.noted.items()}
    for plan in (known for known in (evidence.built, evidence.recorded) if known is not None):
        for group in plan.groups:
            whole = plan.whole_aliases(group.canonical)
            pairs |= dict.fromkeys(((group.canonical, alias.name) for alias in whole), _Force.BINDING)
    for declared in declarations(model, tiepolicy.observe(model)):
        for pair in declared.pairs if declared.value else ():
            pairs[pair] = max(_force(declared, pair, model, evidence), pairs.get(pair, _Force.IF_MISSING))
    noted = {(name, alias) for alias, name in evidence.noted.items()}
    # Of two names that could fill a third, the one that it is bound to comes before the one that merely could; then the
    # alphabet decides, as the order in which a class declares its keys changes between releases.
    return dict(sorted(pairs.items(), key=lambda item: (item[0] not in noted, -item[1], item[0])))


def _force(declared: Declaration, pair: tuple[str, str], model: PreTrainedModel, evidence: _Evidence) -> _Force:
    if not declared.binding or (evidence.recorded is not None and set(pair) <= set(evidence.recorded.tensors)):
        return _Force.IF_MISSING
    # T5's config, for one, makes its flag true whatever the file says.
    return _Force.IF_EQUAL if declared.config is model.config and evidence.denied else _Force.BINDING


class _Names:
    """The tensors of a model by name, as they become one."""

    def __init__(self, model: PreTrainedModel, missing: set[str]) -> None:
        self._facts = tiepolicy.observe(model)
        self._tensors = {name: self._facts.tensor(name) for name in self._facts}
        self._model = model
        self._missing = missing

    def could_be_one(self, source: str, alias: str) -> bool:
        """Whether two names can be one parameter."""
        a, b = (self._tensors.get(name) for name in (source, alias))
        if not isinstance(a, nn.Parameter) or type(a) is not type(b):  # one may be quantized
            return False
        # What was in no file may still be on the meta device.
        somewhere = a.device == b.device or not self._missing.isdisjoint((source, alias))
        return a.shape == b.shape and a.dtype == b.dtype and somewhere

    def fill_(self, pair: tuple[str, str]) -> bool:
        """Give a name that was missing the tensor of its partner; whether it did."""
        there = [name for name in pair if name not in self._missing]
        if len(there) != 1 or not self.could_be_one(*pair):
            return False
        gone = next(name for name in pair if name in self._missing)
        self.share_(gone, there[0])
        self._missing.discard(gone)
        return True

    def difference(self, source: str, alias: str) -> str | None:
        """Where two names that could be one and were both read differ; None if they do not."""
        if not self.could_be_one(source, alias) or not self._missing.isdisjoint((source, alias)):
            return None
        first, second = self._tensors[source], self._tensors[alias]
        return None if first is second or first.is_meta else first_difference(first, second)

    def share_(self, name: str, owner: str) -> None:
        """Make a name, and all that are one with it, the parameter of another name."""
        replaced, tensor = self._tensors[name], self._tensors[owner]
        if replaced is tensor:
            return
        for other in [other for other, held in self._tensors.items() if held is replaced]:
            path, _, attribute = other.rpartition(".")
            setattr(self._model.get_submodule(path), attribute, tensor)
            self._tensors[other] = tensor


def _kept(conflict: Conflict, evidence: _Evidence) -> str | None:
    """The name whose value both get; None to leave them apart."""
    try:
        return settle(conflict, evidence.policy.resolve)
    except TieConflictError as error:
        if evidence.on_conflict == "canonical":
            return conflict.canonical
        if evidence.on_conflict == "error" and evidence.conflict is None:
            evidence.conflict = TieConflictError(
                f"{conflict.alias} and {conflict.canonical} are one tensor by the model's config, but both are stored, "
                f'and differ: {conflict.difference}. Nothing was loaded. Choose: on_conflict="untie" keeps both apart '
                f'and sets the flag right, on_conflict="canonical" gives both the value of {conflict.canonical}',
                names=error.names,
            )
        return None


def _check_complete(
    model: nn.Module, folder: Path, info: dict[str, Any], evidence: _Evidence, architectures: object
) -> None:
    saved_as = architectures[0] if isinstance(architectures, list) and architectures else None
    other = f" The folder says that it holds a {saved_as}." if saved_as not in (None, type(model).__name__) else ""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ShapeMismatchError(
            f"{name} has shape {tuple(found)} in {folder}, the model expects {tuple(expected)}: its config or its "
            f"class is another than the one that was saved.{other} Nothing was loaded",
            names=[name],
        )
    if evidence.conflict is not None:
        raise evidence.conflict
    declared = [declared for declared in declarations(model, tiepolicy.observe(model)) if declared.value]
    tied = {name for declaration in declared for pair in declaration.pairs for name in pair}
    # transformers leaves out of its report what a class says may be missing; a tied name may not.
    missing = sorted(set(info["missing_keys"]) | (evidence.missing & tied))
    if missing:
        plan = evidence.policy.plan(model)
        claims = [str(refusal) for refusal in plan.refused if missing[0] in refusal.claim.names]
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        why = f" It cannot be derived from another tensor: {claims[0]}." if claims else ""
        shape = plan.tensors[missing[0]].shape if missing[0] in plan.tensors else "of no known shape"
        raise MissingTensorError(
            f"{missing[0]} {shape}{others} is not in {folder}, under its own name or an alias.{why}{other} Nothing was "
            "loaded. Load a folder that holds it, or a class that does without",
            names=missing,
        )
