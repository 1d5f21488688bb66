"""Step 8: the draft vocabulary, which is the target's tokens that the assistant writes most.

Shape suffixes: V target vocabulary, D draft vocabulary.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from eagle3.errors import ConfigError, DataError
from eagle3.files import TensorCache
from eagle3.tokens import EncodedData, Example

logger = logging.getLogger("eagle3")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DraftVocab:
    """The target ids that the draft can propose.

    Attributes:
        ids_D: int64 `(D,)`, ascending: draft id `j` means target id `ids_D[j]`.
        target_size: V, rows of the target's embedding.
        coverage: Share of the supervised tokens that are in the draft vocabulary, 0 to 1.
    """

    ids_D: torch.Tensor
    target_size: int
    coverage: float

    def __str__(self) -> str:
        return f"{self.size} of {self.target_size} tokens, {self.coverage:.2%} of what the assistant wrote"

    @property
    def size(self) -> int:
        """D, rows of the draft's head."""
        return self.ids_D.numel()

    @property
    def d2t_D(self) -> torch.Tensor:
        """int64 `(D,)`, a new tensor, in the offset form that engines read: target id = `j + d2t[j]`."""
        return self.ids_D - torch.arange(self.size)

    @property
    def t2d_V(self) -> torch.Tensor:
        """Bool `(V,)`, a new tensor: whether the draft can propose a target id."""
        t2d_V = torch.zeros(self.target_size, dtype=torch.bool)
        t2d_V[self.ids_D] = True
        return t2d_V


def count_supervised(examples: Sequence[Example], vocab_size: int) -> torch.Tensor:
    """Counts how often the assistant wrote each token.

    Args:
        examples: At least one.
        vocab_size: V, rows of the target's embedding.

    Returns:
        int64 `(V,)`.

    Raises:
        DataError: An id lies outside the vocabulary.
    """
    ids = torch.cat([example.input_ids[example.loss_mask] for example in examples])
    counts_V = torch.bincount(ids, minlength=vocab_size)
    if counts_V.numel() > vocab_size:
        raise DataError(
            f"Token id {counts_V.numel() - 1} is in the data, but the target's embedding has {vocab_size} rows. "
            "Use the tokenizer that belongs to the target."
        )
    return counts_V


def forced_ids(
    tokenizer: PreTrainedTokenizerBase, counts_V: torch.Tensor, *, end_ids: Iterable[int] = ()
) -> tuple[int, ...]:
    """The ids that a draft must be able to propose however rare they are, ascending.

    Args:
        tokenizer: The target's own.
        counts_V: int64 `(V,)`, from `count_supervised`.
        end_ids: The target's end-of-sequence tokens, from its config.

    Returns:
        Those below V of the tokenizer's special tokens (begin, end, padding, unknown, extra), of `end_ids`, and of the
        added special tokens that the assistant writes: where templates end a turn with another token than a sequence,
        that is one of them.
    """
    vocab_size = counts_V.numel()
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special and index < vocab_size}
    written = {index for index in added if counts_V[index] > 0}
    forced = {*tokenizer.all_special_ids, *end_ids, *written}
    # Some configs write -1 for none.
    return tuple(sorted(index for index in forced if 0 <= index < vocab_size))


def draft_vocab(
    data: EncodedData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    target_vocab_size: int,
    end_ids: Iterable[int],
    size: int | None,
    cache: TensorCache,
) -> DraftVocab:
    """Chooses the draft vocabulary of a run, and keeps it under a digest of all that it depends on.

    Args:
        data: The conversations to train on.
        tokenizer: As for `forced_ids`.
        target_vocab_size: V, rows of the target's embedding.
        end_ids: As for `forced_ids`.
        size: D, or None for the whole vocabulary.
        cache: Gets `vocab-DIGEST.safetensors` with `d2t`, `t2d` and `counts`, and the coverage in its metadata.

    Returns:
        The vocabulary, made or read from the cache.

    Raises:
        ConfigError: `size` does not fit.
        DataError: An id of the data lies outside the target's vocabulary, or the cache cannot be written.
    """
    counts_V = count_supervised(data.examples, target_vocab_size)
    forced = forced_ids(tokenizer, counts_V, end_ids=end_ids)
    vocab = choose_draft_vocab(counts_V, size=size, forced_ids=forced)
    name = vocab_file(data, target_vocab_size=target_vocab_size, size=size, forced_ids=forced)
    with cache.locked(name):
        if not (cache.folder / name).exists():
            tensors = {"d2t": vocab.d2t_D, "t2d": vocab.t2d_V, "counts": counts_V}
            path = cache.write(name, tensors, {"coverage": str(vocab.coverage)})
            logger.info("Draft vocabulary written to %s", path)
    return vocab


def vocab_file(data: EncodedData, *, target_vocab_size: int, size: int | None, forced_ids: Sequence[int]) -> str:
    """The name of the file that keeps a draft vocabulary: a digest of all that it depends on."""
    content = f"{data.token_digest} {target_vocab_size} {size} {list(forced_ids)}"
    return f"vocab-{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"


def require_coverage(vocab: DraftVocab, min_coverage: float) -> None:
    """Logs a draft vocabulary, or refuses it for leaving out too much of what the assistant writes.

    Raises:
        ConfigError: It does.
    """
    logger.info("Draft vocabulary: %s", vocab)
    if vocab.coverage < min_coverage:
        raise ConfigError(
            f"The draft's {vocab.size} tokens are only {vocab.coverage:.2%} of what the assistant wrote, below "
            f"draft.min_coverage {min_coverage:.2%}; the draft could never propose the rest. Raise draft.vocab_size, "
            "or lower draft.min_coverage if that is meant."
        )


def choose_draft_vocab(counts_V: torch.Tensor, *, size: int | None, forced_ids: Iterable[int]) -> DraftVocab:
    """Keeps the most frequent tokens; among equally frequent ones the lowest ids.

    Args:
        counts_V: int64 `(V,)`, from `count_supervised`.
        size: D, or None for the whole vocabulary.
        forced_ids: Kept however rare they are; they count towards `size`.

    Returns:
        The draft vocabulary, which depends on the arguments alone. A list with fewer than `size` tokens that occur
        is filled up with the lowest unused ids.

    Raises:
        ConfigError: `size` exceeds V or has no room for `forced_ids`, or one of those lies outside the vocabulary.
    """
    vocab_size = counts_V.numel()
    forced = torch.tensor(sorted(set(forced_ids)), dtype=torch.int64)
    size = vocab_size if size is None else size
    if forced.numel() and not 0 <= int(forced[0]) <= int(forced[-1]) < vocab_size:
        raise ConfigError(f"Forced ids {forced.tolist()} must lie in the target's vocabulary of {vocab_size} tokens.")
    if not max(1, forced.numel()) <= size <= vocab_size:
        raise ConfigError(
            f"draft.vocab_size is {size}, but it must be at least {max(1, forced.numel())} to hold the "
            f"{forced.numel()} special tokens, and at most {vocab_size}, the target's vocabulary."
        )
    rank_V = counts_V.clone()
    rank_V[forced] = counts_V.max() + 1
    return vocab_of(rank_V.argsort(descending=True, stable=True)[:size].sort().values, counts_V)


def vocab_of(ids_D: torch.Tensor, counts_V: torch.Tensor) -> DraftVocab:
    """The draft vocabulary of these ids, measured on the counts from `count_supervised`."""
    total = int(counts_V.sum())
    # Without supervised tokens none is outside.
    coverage = int(counts_V[ids_D].sum()) / total if total else 1.0
    return DraftVocab(ids_D=ids_D, target_size=counts_V.numel(), coverage=coverage)
