"""Step 11: the target's states on disk: what a cache holds, and how a run reads it, mapped into memory.

A cache is a folder with `target-DIGEST-DTYPE.safetensors` (embedding and head) and one folder per data set,
`data-DIGEST`, with `manifest.json` and its shards. A shard is one safetensors file, which exists only when it is whole:

    aux      (tokens, 3E)   the three captured states of each token
    hidden   (tokens, E)    the state behind the final norm
    argmax   (tokens,)      int32, the target's greedy next token

in the target's dtype; the tokens are those of some conversations, one after the other in the order of the data.

Shape suffixes: B batch, T tokens, V target vocabulary, E target hidden, A = 3E.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from eagle3.data import Batch
from eagle3.description import TargetDescription, describe_target, load_tokenizer, require_tokens_fit
from eagle3.errors import CacheError
from eagle3.features import Features
from eagle3.files import reason
from eagle3.tokens import EncodedData

#: Of the layout that the module describes.
FORMAT = 1
#: Tells what a data set's states were made from, and which conversations each shard holds.
MANIFEST = "manifest.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKey:
    """What a cache was made from; a run that differs in any of it cannot read it.

    Attributes:
        target: `weights_digest` of the target.
        layers: The captured layers, an id k meaning the input of layer k.
        dtype: Of the states: `float32` or `bfloat16`.
        data: `token_digest` of the data, which the tokenizer, its template and `data.max_length` go into.
    """

    target: str
    layers: tuple[int, int, int]
    dtype: str
    data: str


def bytes_per_token(hidden_size: int, dtype: str) -> int:
    """Bytes that a cache takes for one token: four states and one id."""
    return 4 * hidden_size * _DTYPES[dtype].itemsize + 4


class FeatureReader:
    """Reads the states of examples from a cache, which stays mapped into memory; may be sent to other processes.

    Args:
        folder: Of the cache.
        key: Of target and data.
        data: The same examples as were written.

    Raises:
        CacheError: The cache is missing, unfinished or damaged, or belongs to another target or other data.
    """

    def __init__(self, folder: str | Path, *, key: CacheKey, data: EncodedData) -> None:
        self.place = place_of(folder, key)
        manifest = read_manifest(self.place, folder, key)
        self.shards: list[list[int]] = manifest["shards"]
        missing = [index for index in range(len(self.shards)) if not shard_path(self.place, index).exists()]
        if missing:
            raise CacheError(
                f"{self.place} is not finished: {len(missing)} of its {len(self.shards)} parts are missing. Run "
                "`eagle3 cache` with the same settings, which writes only those."
            )
        self.lengths = [example.input_ids.numel() for example in data.examples]
        self.first_examples = [shard[0] for shard in self.shards]
        self.offsets = _offsets(self.shards, self.lengths)
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __call__(self, rows: Sequence[Sequence[int]], num_tokens: int) -> Features:
        """The states of examples that stand side by side in rows.

        Args:
            rows: The examples of each row.
            num_tokens: T, at least the tokens of each row; what is left is zeros.

        Returns:
            New tensors on the CPU.
        """
        width = self._shard(0).get_slice("hidden").get_shape()[1]
        options: dict[str, Any] = {"dtype": self._dtype()}
        features = Features(
            aux_BTA=torch.zeros(len(rows), num_tokens, 3 * width, **options),
            hidden_BTE=torch.zeros(len(rows), num_tokens, width, **options),
            argmax_BT=torch.zeros(len(rows), num_tokens, dtype=torch.int64),
        )
        assert features.argmax_BT is not None
        for row, examples in enumerate(rows):
            start = 0
            for example in examples:
                end = start + self.lengths[example]
                for slot, name in (
                    (features.aux_BTA, "aux"),
                    (features.hidden_BTE, "hidden"),
                    (features.argmax_BT, "argmax"),
                ):
                    slot[row, start:end] = self._read(example, name)
                start = end
        return features

    def _read(self, example: int, name: str) -> torch.Tensor:
        index = bisect_right(self.first_examples, example) - 1
        offset = self.offsets[example]
        values: torch.Tensor = self._shard(index).get_slice(name)[offset : offset + self.lengths[example]]
        return values

    def _shard(self, index: int) -> Any:
        if index not in self._open:
            path = shard_path(self.place, index)
            num_tokens = sum(self.lengths[example] for example in self.shards[index])
            try:
                file: Any = safe_open(path, "pt")
                found = file.get_slice("hidden").get_shape()[0]
            except (SafetensorError, OSError) as error:
                raise CacheError(f"{path} is damaged ({error}). Delete it and run `eagle3 cache` again.") from error
            if found != num_tokens:
                raise CacheError(
                    f"{path} holds {found} tokens where {num_tokens} belong. Delete it and run `eagle3 cache` again."
                )
            self._open[index] = file
        return self._open[index]

    def _dtype(self) -> torch.dtype:
        values: torch.Tensor = self._shard(0).get_slice("hidden")[:0]
        return values.dtype


class CachedTarget:
    """A target whose states come from a cache: of its weights only embedding and head are in memory.

    Args:
        folder: Of the cache.
        name: Of the target; its config and tokenizer are read.
        device: Of embedding and head, and of the features.
        key: Of the target and any data.

    Its attributes are those of `FrozenTarget` that a run reads.

    Raises:
        TargetError: Config or tokenizer cannot be read.
        CacheError: The cache has no embedding and head of the target.
    """

    def __init__(self, folder: str | Path, name: str, *, device: torch.device, key: CacheKey) -> None:
        description: TargetDescription = describe_target(name)
        self.config = description.config
        self.end_ids = description.end_ids
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name)
        self.layer_ids = key.layers
        self.device = device
        path = target_path(folder, key)
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                self.embedding_VE = nn.Parameter(file.get_tensor("embedding"), requires_grad=False)
                tied = "head" not in file.keys()  # noqa: SIM118 - no mapping
                self.head_VE: torch.Tensor = self.embedding_VE if tied else file.get_tensor("head")
        except (SafetensorError, OSError) as error:
            raise CacheError(
                f"{path} cannot be read ({error}). target.cache must be a folder that `eagle3 cache` has filled."
            ) from error
        self.vocab_size: int = self.embedding_VE.shape[0]
        require_tokens_fit(self.tokenizer, self.vocab_size)

    def features_of(self, batch: Batch) -> Features:
        """The states that were read from disk with the batch, on the target's device."""
        assert batch.features is not None
        return batch.features.to(self.device)


def place_of(folder: str | Path, key: CacheKey) -> Path:
    """The folder of one data set."""
    return Path(folder) / f"data-{key.data[:16]}"


def target_path(folder: str | Path, key: CacheKey) -> Path:
    """The file of the target's embedding and head."""
    return Path(folder) / f"target-{key.target[:16]}-{key.dtype}.safetensors"


def shard_path(place: Path, index: int) -> Path:
    """The file of one shard."""
    return place / f"shard-{index:05d}.safetensors"


def _offsets(shards: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """Where each example starts in its shard, in tokens."""
    offsets = []
    for shard in shards:
        offset = 0
        for example in shard:
            offsets.append(offset)
            offset += lengths[example]
    return offsets


def read_manifest(place: Path, folder: str | Path, key: CacheKey) -> dict[str, Any]:
    """What a data set's states were made from.

    Raises:
        CacheError: There are none, or they were made from something else than `key` says.
    """
    try:
        manifest: dict[str, Any] = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CacheError(
            f"{folder} holds no states of this data as this target's tokenizer reads it (data.train, data.validation, "
            "data.max_length, tokenizer and chat template count). Run `eagle3 cache` with the same settings first."
        ) from error
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{place / MANIFEST} cannot be read ({reason(error)}). Delete the folder and cache again."
        ) from error
    wanted = {"format": FORMAT, "target": key.target, "layers": list(key.layers), "dtype": key.dtype, "data": key.data}
    for name, words in (
        ("format", "by another version of eagle3"),
        ("target", "from other weights than target.model has now"),
        ("layers", f"from the layers {manifest.get('layers')}, not {list(key.layers)}"),
        ("dtype", f"in {manifest.get('dtype')}, not in target.dtype {key.dtype}"),
        ("data", "from other data"),
    ):
        if manifest.get(name) != wanted[name]:
            raise CacheError(
                f"The states in {place} were made {words}. Choose another target.cache, or delete this one."
            )
    return manifest
