"""Step 11: all that a run reads: the target, the conversations, and the draft vocabulary that follows from them."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from eagle3.config import RunConfig
from eagle3.files import TensorCache
from eagle3.target import FrozenTarget
from eagle3.tokens import EncodedData, load_tokens
from eagle3.vocab import DraftVocab, draft_vocab, require_coverage

logger = logging.getLogger("eagle3")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunInputs:
    """What a run learns from.

    Attributes:
        target: Gives the states of a batch.
        data: The conversations to train on.
        validation: Those that are only measured, or None.
    """

    target: FrozenTarget
    data: EncodedData
    validation: EncodedData | None


def open_inputs(config: RunConfig, *, device: torch.device) -> RunInputs:
    """Opens target and data, and logs what is in the data.

    Raises:
        TargetError: The target cannot be read, or cannot serve as one.
        DataError: The conversations cannot be read, or hold nothing to learn.
        ConfigError: `target.layers` does not fit the target.
    """
    target = FrozenTarget.load(
        config.target.model, dtype=getattr(torch, config.target.dtype), device=device, layers=layer_ids(config)
    )
    cache = tensor_cache(config)
    data, validation = (
        None if path is None else _load(path, config, target, cache)
        for path in (config.data.train, config.data.validation)
    )
    assert data is not None
    logger.info("Data: %s", data)
    if validation is not None:
        logger.info("Validation data: %s", validation)
    return RunInputs(target=target, data=data, validation=validation)


def choose_vocab(inputs: RunInputs, config: RunConfig) -> DraftVocab:
    """Chooses the draft vocabulary of a new run and logs it.

    Raises:
        ConfigError: `draft.vocab_size` does not fit the target, or holds too little of the data.
        DataError: The tokenizer does not belong to the target, or the vocabulary cannot be kept.
    """
    vocab = draft_vocab(
        inputs.data,
        inputs.target.tokenizer,
        target_vocab_size=inputs.target.vocab_size,
        end_ids=inputs.target.end_ids,
        size=config.draft.vocab_size,
        cache=tensor_cache(config),
    )
    logger.info("Draft vocabulary: %s", vocab)
    require_coverage(vocab, config.draft.min_coverage)
    return vocab


def layer_ids(config: RunConfig) -> tuple[int, ...] | None:
    """The captured layers, an id k meaning the input of layer k; None for the default ones."""
    if config.target.layers is None or config.target.layers_name == "inputs":
        return config.target.layers
    return tuple(layer + 1 for layer in config.target.layers)


def tensor_cache(config: RunConfig) -> TensorCache:
    """Where tokens and draft vocabularies are kept for other runs."""
    return TensorCache(config.data.cache or Path(config.out) / "cache")


def _load(path: str, config: RunConfig, target: FrozenTarget, cache: TensorCache) -> EncodedData:
    data = load_tokens(path, target.tokenizer, max_length=config.data.max_length, cache=cache)
    return data.packed(config.data.max_length) if config.data.packing else data
