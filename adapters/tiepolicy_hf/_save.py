"""Step 4, saving: a plain Hugging Face folder in which every tensor is stored once and no flag says otherwise."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

import tiepolicy
from tiepolicy import Policy, TiePlan
from tiepolicy.errors import CheckpointError, MissingTensorError, ObservationError, ShapeMismatchError
from tiepolicy.files import MANIFEST_KEY
from tiepolicy_hf._flags import corrected_config, corrections, declared_by, lasting, rebuilt_pairs
from tiepolicy_hf._folder import INDEX, remove_model_, replace_folder, write_digests, writing

_PATTERN = "model{suffix}.safetensors"


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    max_shard_size: int | str = "50GB",
    state_dict: Mapping[str, torch.Tensor] | None = None,
    policy: Policy | None = None,
) -> Path:
    """Write a model as a folder that transformers, safetensors and huggingface_hub read, and nothing of it is lost.

    A tied tensor is stored once, under the name that the others are derived from, as long as transformers would derive
    them; what it would not (a tie that nobody declares, a view of a part) is stored under each name. Flags in
    `config.json` say what is: a head of its own makes `tie_word_embeddings` false there, a real tie makes it true. The
    plan lies in the metadata of the first file. The live model and its config are not changed.

    The folder appears whole, or stays what it was; files in it that are no part of a model are kept.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        ...     num_attention_heads=1, tie_word_embeddings=True)
        >>> folder = save_pretrained(LlamaForCausalLM(config), "model")
        >>> sorted(path.name for path in folder.iterdir())
        ['config.json', 'digests.json', 'generation_config.json', 'model.safetensors']

    Args:
        model: A model whose tensors this process holds whole.
        folder: Where to; replaced if it exists.
        max_shard_size: Largest file in bytes, or as text such as "5GB".
        state_dict: The model's state, if it was gathered or offloaded; its tied names must hold equal values. Not for a
            quantized model, whose quantizer makes it.
        policy: Who decides; by default the built-in rules and the installed plugins.

    Returns:
        The folder as an absolute path.

    Raises:
        ObservationError: If the model is none of transformers, has adapters of PEFT, is quantized in a way that cannot
            be stored, or holds what cannot be.
        MissingTensorError: If a tensor of the model is not in `state_dict`.
        ShapeMismatchError: If one has another shape there.
        TieConflictError: If tied names hold different values in `state_dict`.
        CheckpointError: If the model is sharded or has no data, or the folder cannot be written.
    """
    _check_kind(model)
    folder = Path(folder).absolute()
    replace_folder(folder, _writer(model, state_dict, policy, max_shard_size, _renamed))
    return folder


def _check_kind(model: nn.Module) -> None:
    kind = type(model).__name__
    if hasattr(model, "peft_config"):
        raise ObservationError(
            f"the {kind} has adapters of PEFT, which only its own save_pretrained writes; merge them first, by "
            "merge_and_unload(), to save a model that holds them"
        )
    if not isinstance(model, PreTrainedModel):
        raise ObservationError(f"{kind} is no transformers model; unwrap it, or save it with tiepolicy_dcp.save")


def write_as_held(
    model: PreTrainedModel, folder: Path, *, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write into a folder of others, under the names that the live model has where its checkpoints have others.

    For those who read it back by `load_state_dict`, as `transformers.Trainer` does; `from_pretrained` reads it too.
    """
    write = _writer(model, state_dict, None, "50GB", lambda _, kept: kept)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_model_(folder)
        write(folder)


def _writer(
    model: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor] | None,
    policy: Policy | None,
    max_shard_size: int | str,
    named: Callable[[PreTrainedModel, dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> Callable[[Path], None]:
    """Decide all that there is to write; what is returned writes it into a folder."""
    quantizer = getattr(model, "hf_quantizer", None)
    made, notes = (state_dict, {}) if quantizer is None else _quantized(model, state_dict)
    state = dict(model.state_dict() if made is None else made)
    _check_data(state)
    plan = (policy or Policy.from_entry_points()).plan(model)
    if state_dict is not None:
        _check_complete(state, plan)
    declared = declared_by(model)
    fixes = lasting(model.config, corrections(declared, plan))
    left_out = _derivable(plan, rebuilt_pairs(declared, fixes))
    kept = {name: tensor for name, tensor in state.items() if name not in left_out}
    stored = _apart(named(model, kept | plan.compact(state)))
    config = corrected_config(model.config, fixes)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")

    def write(folder: Path) -> None:
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        _write_weights(folder, stored, max_shard_size, _metadata(plan, stored), notes)
        write_digests(folder)

    return write


def _quantized(model: PreTrainedModel, state_dict: object) -> tuple[Mapping[str, torch.Tensor] | None, dict[str, str]]:
    """The state that a quantizer makes, if it has to take tensors apart into plain ones, and what it notes of them."""
    quantizer: Any = model.hf_quantizer
    by = f"the {type(model).__name__} is quantized by {type(quantizer).__name__}"
    if not quantizer.is_serializable():
        raise ObservationError(f"{by}, which cannot be stored; save the model as it was before, and quantize it again")
    if state_dict is not None:
        raise ObservationError(f"{by}, which makes its own state to save; leave state_dict out")
    made: tuple[Mapping[str, torch.Tensor] | None, dict[str, str]] = quantizer.get_state_dict_and_metadata(model)
    return made


def _check_complete(state: Mapping[str, torch.Tensor], plan: TiePlan) -> None:
    for name, fact in plan.tensors.items():
        if name in state and tuple(state[name].shape) != fact.shape:
            raise ShapeMismatchError(
                f"{name} has shape {tuple(state[name].shape)} in the state_dict to save, and {fact.shape} in the "
                "model; nothing was written",
                names=[name],
            )
    absent = sorted(name for name in plan.tensors if state.keys().isdisjoint({name, plan.canonical(name)}))
    if absent:
        raise MissingTensorError(
            f"{absent[0]} {plan.tensors[absent[0]].shape} is in the model but not in the state_dict to save; nothing "
            "was written",
            names=absent,
        )


def _check_data(state: Mapping[str, object]) -> None:
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ObservationError(
                f"{name} is a {type(tensor).__name__}, not a tensor, and cannot be stored in safetensors", names=[name]
            )
        if tensor.layout is not torch.strided:
            raise ObservationError(
                f"{name} has the layout {tensor.layout}, which safetensors has not; make it dense", names=[name]
            )
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device and has no data to save", names=[name])
        if isinstance(tensor, DTensor):
            raise CheckpointError(
                f"{name} is sharded; save with tiepolicy_dcp.save(..., consolidated=True), which gathers it",
                names=[name],
            )
        if hasattr(tensor, "__tensor_flatten__"):
            raise ObservationError(
                f"{name} is a {type(tensor).__name__}, made of several tensors, which safetensors cannot hold; have "
                "transformers quantize the model, by from_pretrained(quantization_config=...), which takes them apart",
                names=[name],
            )


def _derivable(plan: TiePlan, pairs: list[tuple[str, str]]) -> set[str]:
    """The aliases that transformers makes of a stored name when it loads."""
    found: set[str] = set()
    for group in plan.groups:
        within = [pair for pair in pairs if set(pair) <= set(group.names)]
        reached = {group.canonical}
        for _ in within:  # each round reaches further, or all that can be is reached
            reached.update(*(pair for pair in within if not reached.isdisjoint(pair)))
        found |= reached & {alias.name for alias in plan.whole_aliases(group.canonical)}
    return found


def _renamed(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names and in the layout that the model's checkpoints have, as transformers writes them."""
    return revert_weight_conversion(model, state)  # type: ignore[no-any-return]  # not annotated there


def _apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous, and no tensor sharing memory with another: a file can hold one range under one name only."""
    shared = {name for names in tiepolicy.observe(state).sharing() for name in names[1:]}
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        if name in shared
        else tensor.detach().contiguous()
        for name, tensor in sorted(state.items())
    }


def _metadata(plan: TiePlan, stored: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The plan, and what `safetensors.torch.load_model` wants to know: which name stands for one that is not stored."""
    aliases = {
        alias.name: group.canonical
        for group in plan.groups
        for alias in group.aliases
        if alias.name not in stored and group.canonical in stored and alias.view is None
    }
    return {"format": "pt", **aliases, MANIFEST_KEY: json.dumps(plan.to_manifest())}


def _write_weights(
    folder: Path,
    stored: Mapping[str, torch.Tensor],
    max_shard_size: int | str,
    metadata: dict[str, str],
    notes: dict[str, str],
) -> None:
    split = split_torch_state_dict_into_shards(dict(stored), filename_pattern=_PATTERN, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: stored[name] for name in names}, folder / file, metadata=metadata | notes)
        metadata = {"format": "pt"}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
