"""Step 15: all that a run reads: the target, the conversations, and the draft vocabulary that follows from them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from eagle3.blueprint import read_draft_config
from eagle3.cache import CachedTarget, CacheKey, FeatureReader
from eagle3.capture import write_features
from eagle3.config import RunConfig
from eagle3.conversations import count_conversations
from eagle3.description import (
    TargetDescription,
    choose_layers,
    describe_target,
    load_tokenizer,
    require_tokens_fit,
    weights_digest,
)
from eagle3.errors import ConfigError
from eagle3.files import TensorCache
from eagle3.parallel import Ranks
from eagle3.target import FrozenTarget
from eagle3.tokens import EncodedData, kept_tokens, load_tokens
from eagle3.vocab import DraftVocab, draft_vocab, require_coverage

logger = logging.getLogger("eagle3")

#: Gives config, tokenizer, embedding, head, and the states of a batch.
Target = FrozenTarget | CachedTarget


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunInputs:
    """What a run learns from.

    Attributes:
        target: Gives the states of a batch.
        data: The conversations to train on.
        validation: Those that are only measured, or None.
    """

    target: Target
    data: EncodedData
    validation: EncodedData | None


def open_inputs(config: RunConfig, *, device: torch.device) -> RunInputs:
    """Opens target and data, and logs what is in the data. With `target.cache`, the target is not loaded.

    Raises:
        TargetError: The target cannot be read, or cannot serve as one.
        DataError: The conversations cannot be read, or hold nothing to learn.
        CacheError: `target.cache` cannot be read, or does not fit.
        ConfigError: `target.layers` does not fit the target.
    """
    if config.target.cache is None:
        target = load_target(config, device=device)
        data, validation = _load_both(config, target.tokenizer)
        return RunInputs(target=target, data=data, validation=validation)
    data, validation = _load_both(config, load_tokenizer(config.target.model))
    # Before the target, because they can tell why the states of this one are missing.
    data = _with_features(config, data)
    validation = None if validation is None else _with_features(config, validation)
    key = cache_key(config, data)
    cached = CachedTarget(config.target.cache, config.target.model, device=device, key=key)
    logger.info("The target's states are read from %s", config.target.cache)
    return RunInputs(target=cached, data=data, validation=validation)


def write_cache(config: RunConfig, ranks: Ranks) -> None:
    """Fills `target.cache` with the states of the training data, and of the validation data if there is any.

    Called by all processes, which share the work.

    Raises:
        ConfigError: `target.cache` is not set.
        Eagle3Error: As for `open_inputs` and `write_features`.
    """
    folder = config.target.cache
    if folder is None:
        raise ConfigError("--target.cache is required; give the folder that the states are to be written to.")
    target = load_target(config, device=ranks.device)
    for data in _load_both(config, target.tokenizer):
        if data is not None:
            key = cache_key(config, data)
            write_features(folder, target, data, key=key, part=ranks.rank, num_parts=ranks.world_size)


def load_target(config: RunConfig, *, device: torch.device) -> FrozenTarget:
    """Loads the target with all its weights.

    Raises:
        TargetError: It cannot be read, or cannot serve as one.
        ConfigError: `target.layers` does not fit it.
    """
    dtype: torch.dtype = getattr(torch, config.target.dtype)
    return FrozenTarget.load(config.target.model, dtype=dtype, device=device, layers=asked_layers(config))


def load_data(path: str, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> EncodedData:
    """Loads a file of conversations, in the rows that the run trains on.

    Raises:
        DataError: It cannot be read, or holds nothing to learn.
    """
    data = load_tokens(path, tokenizer, max_length=config.data.max_length, cache=tensor_cache(config))
    return _laid_out(data, config)


def known_data(config: RunConfig) -> tuple[EncodedData, PreTrainedTokenizerBase] | None:
    """The training data and its tokenizer, if an earlier command has kept the tokens; else None.

    Raises:
        TargetError: The target's tokenizer cannot be read.
        DataError: The file cannot be read, or the tokenizer has no chat template.
    """
    cache = tensor_cache(config)
    if not cache.folder.exists():
        return None
    tokenizer = load_tokenizer(config.target.model)
    data = kept_tokens(config.data.train, tokenizer, max_length=config.data.max_length, cache=cache)
    return None if data is None else (_laid_out(data, config), tokenizer)


def cache_key(config: RunConfig, data: EncodedData) -> CacheKey:
    """What a cache of this run's target and data must have been made from.

    Raises:
        TargetError: The target has no config or weights.
        ConfigError: `target.layers` does not fit it.
    """
    description = describe_target(config.target.model)
    return CacheKey(
        target=weights_digest(config.target.model),
        layers=choose_layers(description.config.num_hidden_layers, asked_layers(config)),
        dtype=config.target.dtype,
        data=data.token_digest,
    )


def write_vocab(config: RunConfig) -> DraftVocab:
    """Chooses and keeps the draft vocabulary of a run to come, without the target's weights.

    Raises:
        TargetError: The target's config or tokenizer cannot be read.
        ConfigError: As for `choose_vocab`.
        DataError: As for `choose_vocab`, or the conversations cannot be read.
    """
    if config.draft.init_from is not None:
        raise ConfigError("The vocabulary is that of draft.init_from. Train, and the log says how much it holds.")
    description = describe_target(config.target.model)
    tokenizer = load_tokenizer(config.target.model)
    require_tokens_fit(tokenizer, description.vocab_size)
    data = load_data(config.data.train, config, tokenizer)
    logger.info("Data: %s", data)
    return choose_vocab(config, data, tokenizer, description)


def choose_vocab(
    config: RunConfig, data: EncodedData, tokenizer: PreTrainedTokenizerBase, target: Target | TargetDescription
) -> DraftVocab:
    """Chooses the draft vocabulary of a run and logs it; `tokenizer` is that of the `target`.

    Raises:
        ConfigError: `draft.vocab_size` does not fit the target, or holds too little of the data.
        DataError: The tokenizer does not belong to the target, or the vocabulary cannot be kept.
    """
    vocab = draft_vocab(
        data,
        tokenizer,
        target_vocab_size=target.vocab_size,
        end_ids=target.end_ids,
        size=config.draft.vocab_size,
        cache=tensor_cache(config),
    )
    require_coverage(vocab, config.draft.min_coverage)
    return vocab


def asked_layers(config: RunConfig) -> Sequence[int] | None:
    """The captured layers, an id k meaning the input of layer k; None for the default ones."""
    layers: Sequence[int] | None = config.target.layers
    # A run that has begun no longer needs the draft that it began with.
    folder = config.draft.init_from if config.checkpoint.restore_from is None else config.out
    if layers is None and folder is not None:
        layers = read_draft_config(Path(folder)).eagle_aux_hidden_state_layer_ids
    elif layers is not None and config.target.layers_name == "outputs":
        layers = tuple(layer + 1 for layer in layers)
    return layers


def tensor_cache(config: RunConfig) -> TensorCache:
    """Where tokens and draft vocabularies are kept for other runs."""
    return TensorCache(config.data.cache or Path(config.out) / "cache")


def _laid_out(data: EncodedData, config: RunConfig) -> EncodedData:
    return data.packed(config.data.max_length) if config.data.packing else data


def _load_both(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[EncodedData, EncodedData | None]:
    if config.data.validation is not None:
        count_conversations(config.data.validation)  # so that a wrong path is met before the training data is read
    data = load_data(config.data.train, config, tokenizer)
    logger.info("Data: %s", data)
    validation = None
    if config.data.validation is not None:
        validation = load_data(config.data.validation, config, tokenizer)
        logger.info("Validation data: %s", validation)
    return data, validation


def _with_features(config: RunConfig, data: EncodedData) -> EncodedData:
    assert config.target.cache is not None
    reader = FeatureReader(config.target.cache, key=cache_key(config, data), data=data)
    return replace(data, feature_source=reader)
