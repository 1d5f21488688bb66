"""Step 6, loading: transformers reads, the policy ties; every tensor comes from the folder, or an error says why not.

transformers asks a model to tie itself once its tensors are read, and tells it which were missing:
`tie_weights(missing_keys=...)`. That is where the decision belongs, and where it is made here. A class that answers by
the policy stands in for the model's own while it is read.
"""

import contextlib
import functools
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

import tiepolicy
from tiepolicy import Policy, TiePlan
from tiepolicy.errors import MissingTensorError, ShapeMismatchError, UntrustedCheckpointError
from tiepolicy.files import Verify, read_json
from tiepolicy_hf._flags import correct_flags_
from tiepolicy_hf._folder import CONFIG, WEIGHTS, check_folder, check_size, find_weights, naming_config
from tiepolicy_hf._plugin import FLAG, declarations
from tiepolicy_hf._ties import Evidence, OnConflict, check_places, tie_what_was_read_

# Options of transformers that would let something be lost, and those that would have it open files nobody looked at.
_REFUSED = dict.fromkeys(
    ("ignore_mismatched_sizes", "output_loading_info", "state_dict", "weights_only", "use_safetensors"),
    "what is missing or does not fit is always an error here",
) | dict.fromkeys(("subfolder", "variant", "gguf_file"), f"only {WEIGHTS} or its shards in the folder itself are read")
_Model = TypeVar("_Model", bound=PreTrainedModel)


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
    is_given = kwargs.get("config") is not None
    stated = {} if is_given and not (folder / CONFIG).exists() else read_json(folder / CONFIG)
    evidence = Evidence(
        policy=policy or Policy.from_entry_points(),
        on_conflict=on_conflict,
        weights=weights,
        recorded=None if weights.manifest is None else TiePlan.from_manifest(weights.manifest),
        denied=stated.get(FLAG) is False,
    )
    with contextlib.nullcontext() if is_given else naming_config(cls, folder):
        model, info = _read(_concrete(cls, folder, kwargs), folder, evidence, kwargs)
    _check_complete(model, folder, info, evidence, stated.get("architectures"))
    correct_flags_(model, evidence.policy.plan(model))
    return model


def _check_options(on_conflict: str, kwargs: Mapping[str, object]) -> None:
    if on_conflict not in ("error", "untie", "canonical"):
        raise ValueError(f'on_conflict is {on_conflict!r}; it is "error", "untie" or "canonical"')
    for option, reason in _REFUSED.items():
        if option in kwargs:
            raise TypeError(f"{option} cannot be given: {reason}")


def _read(cls: type[_Model], folder: Path, evidence: Evidence, kwargs: dict[str, Any]) -> tuple[_Model, dict[str, Any]]:
    """What transformers makes of a folder, and what it says was missing or did not fit."""
    try:
        model, info = _reading(cls, evidence, kwargs.get("device_map")).from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=not evidence.weights.pickled,
            weights_only=True,
            **kwargs,
        )
    except pickle.UnpicklingError as error:
        raise UntrustedCheckpointError(
            f"{evidence.weights.files[0]} is damaged, or asks for more than reading tensors. Nothing of it was run or "
            "loaded"
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


def _reading(cls: type[_Model], evidence: Evidence, places: object) -> Any:
    """The class with another answer to the question how it is tied."""

    @functools.wraps(cls.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        if isinstance(places, Mapping):  # not before: a class may replace its head after it first tied what it had
            check_places(self, places, evidence)

    def tie_weights(self: Any, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        if cls.tie_weights is not PreTrainedModel.tie_weights:  # speech models load their adapters there
            cls.tie_weights(self, missing_keys=missing_keys, recompute_mapping=recompute_mapping)
        if missing_keys is None:
            evidence.built = evidence.policy.plan(self)
            check_size(evidence.built, evidence.weights)
        else:
            tie_what_was_read_(self, missing_keys, evidence)

    namespace = {"__init__": init, "tie_weights": tie_weights, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), namespace)


def _check_complete(
    model: nn.Module, folder: Path, info: dict[str, Any], evidence: Evidence, architectures: object
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
