"""Step 9: what can be known of a target without its weights: config, tokenizer, layers, and a digest of its files."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from eagle3.errors import ConfigError, TargetError

#: What transformers raises for a folder that it cannot read: each has been met, none is a programming error of ours.
LOAD_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError),
    SafetensorError,
)

#: Downloads belong to the user's hand: a misspelt path must not become a question to a server. Nor is code run.
LOAD_OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

# Of each weight file this many blocks of 4 KiB, evenly spaced, go into the digest, beside its size.
_NUM_SAMPLES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetDescription:
    """A target without its weights.

    Attributes:
        name: As it was given: a folder, or a name in the local Hugging Face cache.
        whole_config: As in `config.json`.
        end_ids: The tokens that end what it generates, ascending.
    """

    name: str
    whole_config: Any
    end_ids: tuple[int, ...]

    @property
    def config(self) -> Any:
        """The text config: of a model that also sees or hears, its decoder's."""
        return self.whole_config.get_text_config(decoder=True)

    @property
    def vocab_size(self) -> int:
        """V, rows of the embedding."""
        size: int = self.config.vocab_size
        return size

    @property
    def hidden_size(self) -> int:
        """E, the width of its layers."""
        size: int = self.config.hidden_size
        return size


def describe_target(folder_or_name: str | Path) -> TargetDescription:
    """Reads a target's `config.json`, and its `generation_config.json` where there is one.

    Raises:
        TargetError: They are missing or cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(folder_or_name, **LOAD_OPTIONS)
    except LOAD_ERRORS as error:
        raise unreadable(folder_or_name, part="config", error=error) from error
    try:
        generation = GenerationConfig.from_pretrained(folder_or_name, local_files_only=True)
    except LOAD_ERRORS:
        # Not every model has one; the model's own config then says how a sequence ends.
        generation = None
    text = config.get_text_config(decoder=True)
    return TargetDescription(name=str(folder_or_name), whole_config=config, end_ids=end_ids(generation, text))


def model_class(whole_config: Any) -> Any:
    """The class of transformers that builds a model of this config: causal, or one that reads images too."""
    return AutoModelForCausalLM if type(whole_config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def load_tokenizer(folder_or_name: str | Path) -> PreTrainedTokenizerBase:
    """Loads a target's tokenizer.

    Raises:
        TargetError: It is missing or cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder_or_name, **LOAD_OPTIONS)
    except LOAD_ERRORS as error:
        raise unreadable(folder_or_name, part="tokenizer", error=error) from error
    return tokenizer


def require_tokens_fit(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuses a tokenizer that has more tokens than the embedding has rows.

    Raises:
        TargetError: It has.
    """
    if len(tokenizer) > vocab_size:
        raise TargetError(
            f"The tokenizer has {len(tokenizer)} tokens, but the target's embedding has {vocab_size} rows. "
            "Use the tokenizer that belongs to the target."
        )


def end_ids(*configs: Any) -> tuple[int, ...]:
    """The tokens that end a sequence according to any of these configs, ascending."""
    found: set[int] = set()
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or ())
    return tuple(sorted(found))


def choose_layers(num_layers: int, layers: Sequence[int] | None) -> tuple[int, int, int]:
    """The three captured layers of a target; id k means the input of layer k.

    Args:
        num_layers: Of the target.
        layers: Asked for, or None for a low, a middle and a high one.

    Raises:
        TargetError: The target is too shallow.
        ConfigError: `layers` are not three ascending layers of it.
    """
    if num_layers < 4:
        raise TargetError(
            f"The target has {num_layers} layers; a draft reads from three of them, so it needs 4 or more."
        )
    if layers is None:
        # The engines' default (vLLM, SGLang); in fewer than 7 layers its three ids coincide.
        return (2, num_layers // 2, num_layers - 3) if num_layers >= 7 else (1, num_layers // 2, num_layers - 1)
    if len(layers) != 3 or not 0 <= layers[0] < layers[1] < layers[2] < num_layers:
        raise ConfigError(
            f"target.layers is {list(layers)}, but it must be three ascending ids from 0 to {num_layers - 1}: "
            "id k is the input of the target's layer k."
        )
    low, middle, high = layers
    return low, middle, high


def weights_digest(folder_or_name: str | Path) -> str:
    """SHA-256 in hex over a target's config and samples of its weight files.

    Reads a megabyte of each file, so that even a large target is told from another one in a moment. Two targets that
    differ in few places only may have the same digest; a trained and an untrained one never have.

    Raises:
        TargetError: There are no weight files.
    """
    folder = _folder_of(folder_or_name)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TargetError(f"{folder} holds no *.safetensors. Get the complete model.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in files:
        size = path.stat().st_size
        sha.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(_NUM_SAMPLES):
                file.seek(max(0, size - 4096) * sample // (_NUM_SAMPLES - 1))
                sha.update(file.read(4096))
    return sha.hexdigest()


def unreadable(folder_or_name: str | Path, *, part: str, error: Exception) -> TargetError:
    """The error for a part of a target that cannot be loaded."""
    if not Path(folder_or_name).exists() and not _is_cached(folder_or_name):
        return TargetError(
            f"There is no target {folder_or_name}: no folder {Path(folder_or_name).absolute()}, and no model of that "
            "name in the local Hugging Face cache. Give the folder of a model, or download the model first."
        )
    reason = " ".join(str(error).split())
    return TargetError(
        f"The {part} of the target {folder_or_name} cannot be loaded. It must be a folder with config.json, "
        f"*.safetensors and tokenizer.json of a causal language model. ({reason})"
    )


def _is_cached(name: str | Path) -> bool:
    try:
        snapshot_download(str(name), local_files_only=True)
    except LOAD_ERRORS:
        return False
    return True


def _folder_of(folder_or_name: str | Path) -> Path:
    if Path(folder_or_name).is_dir():
        return Path(folder_or_name)
    try:
        return Path(snapshot_download(str(folder_or_name), local_files_only=True))
    except LOAD_ERRORS as error:
        raise unreadable(folder_or_name, part="folder", error=error) from error
