"""Step 12: the target's states on disk: written once, in parts that survive a cut, and mapped into memory to train.

A cache is a folder with `target-DIGEST-DTYPE.safetensors` (embedding and head) and one folder per data set,
`data-DIGEST`, with `manifest.json` and its shards. A shard is one safetensors file, which exists only when it is whole:

    aux      (tokens, 3E)   the three captured states of each token
    hidden   (tokens, E)    the state behind the final norm
    argmax   (tokens,)      int32, the target's greedy next token

in the target's dtype; the tokens are those of some conversations, one after the other in the order of the data.

Shape suffixes: B batch, T tokens, V target vocabulary, E target hidden, A = 3E.
"""

import itertools
import json
import logging
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedTokenizerBase

from eagle3.data import Batch
from eagle3.description import TargetDescription, describe_target, load_tokenizer, require_tokens_fit
from eagle3.errors import CacheError, NumericsError
from eagle3.features import Features
from eagle3.files import write_whole
from eagle3.target import FrozenTarget
from eagle3.tokens import EncodedData, Example
from tiepolicy import format_bytes

logger = logging.getLogger("eagle3")

_FORMAT = 1
_MANIFEST = "manifest.json"
#: Bytes of a shard at most, unless one conversation is longer; a shard is also what a cut run does again.
SHARD_BYTES = 1 << 30
# Tokens, padding included, that one forward of the target gets.
_FORWARD_TOKENS = 8192
# Rows of full-vocabulary logits that exist at a time.
_HEAD_ROWS = 1024
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


def write_features(
    folder: str | Path,
    target: FrozenTarget,
    data: EncodedData,
    *,
    key: CacheKey,
    part: int = 0,
    num_parts: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the states of all examples, but for shards that an earlier run has written.

    Args:
        folder: Of the cache; made if it does not exist.
        target: Runs on its own device.
        data: The examples.
        key: Of target and data.
        part: Which of the processes that write together this is; each writes the shards of its own.
        num_parts: How many they are.
        shard_bytes: Bytes of a shard at most.

    Raises:
        CacheError: The folder holds states of the same data from another target, or the disk is too small or full;
            what is written by then is whole and is taken up by the next run.
        NumericsError: A state is not finite.
    """
    place = _place(folder, key)
    lengths = [example.input_ids.numel() for example in data.examples]
    per_token = bytes_per_token(target.head_VE.shape[1], key.dtype)
    shards = _plan_shards(lengths, max(1, shard_bytes // per_token))
    with _naming_disk_errors(place), _only_writer(place, part):
        _write_manifest(place, key, shards)
        if part == 0:
            _write_target(_target_path(folder, key), target)
        missing = [index for index in range(len(shards)) if not _shard_path(place, index).exists()]
        own = [index for index in missing if index % num_parts == part]
        _require_room(place, per_token * sum(lengths[i] for index in missing for i in shards[index]))
        for count, index in enumerate(own, start=1):
            _write_tensors(_shard_path(place, index), _states(shards[index], data, target))
            logger.info("Wrote %s, %d of %d", _shard_path(place, index), count, len(own))


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
        self.place = _place(folder, key)
        manifest = _read_manifest(self.place, folder, key)
        self.shards: list[list[int]] = manifest["shards"]
        missing = [index for index in range(len(self.shards)) if not _shard_path(self.place, index).exists()]
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
            path = _shard_path(self.place, index)
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

    Attributes:
        config: The text config of the model.
        tokenizer: The target's own.
        vocab_size: V, rows of the embedding.
        embedding_VE: The embedding's weight.
        head_VE: The output head's weight; the same tensor as `embedding_VE` when the target ties them.
        layer_ids: The three captured layers.
        end_ids: The tokens that end what the model generates, from its configs.

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
        path = _target_path(folder, key)
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


def _place(folder: str | Path, key: CacheKey) -> Path:
    return Path(folder) / f"data-{key.data[:16]}"


def _target_path(folder: str | Path, key: CacheKey) -> Path:
    return Path(folder) / f"target-{key.target[:16]}-{key.dtype}.safetensors"


def _shard_path(place: Path, index: int) -> Path:
    return place / f"shard-{index:05d}.safetensors"


def _plan_shards(lengths: Sequence[int], num_tokens: int) -> list[list[int]]:
    """Consecutive examples, up to `num_tokens` of them in a shard, or one that is longer."""
    shards: list[list[int]] = []
    filled = 0
    for example, length in enumerate(lengths):
        if not shards or filled + length > num_tokens:
            shards.append([])
            filled = 0
        shards[-1].append(example)
        filled += length
    return shards


def _offsets(shards: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """Where each example starts in its shard, in tokens."""
    offsets = []
    for shard in shards:
        offset = 0
        for example in shard:
            offsets.append(offset)
            offset += lengths[example]
    return offsets


def _write_manifest(place: Path, key: CacheKey, shards: list[list[int]]) -> None:
    content = {"format": _FORMAT, **asdict(key), "layers": list(key.layers), "shards": shards}
    if (place / _MANIFEST).exists():
        found = _read_manifest(place, place.parent, key)
        if found["shards"] != shards:
            raise CacheError(
                f"{place} was begun with another size of shards. Delete it, or choose another target.cache."
            )
    else:
        write_whole(place / _MANIFEST, json.dumps(content).encode())


def _read_manifest(place: Path, folder: str | Path, key: CacheKey) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CacheError(
            f"{folder} holds no states of this data as this target's tokenizer reads it (data.train, data.validation, "
            "data.max_length, tokenizer and chat template count). Run `eagle3 cache` with the same settings first."
        ) from error
    except (OSError, ValueError) as error:
        raise CacheError(f"{place / _MANIFEST} cannot be read ({error}). Delete the folder and cache again.") from error
    wanted = {"format": _FORMAT, "target": key.target, "layers": list(key.layers), "dtype": key.dtype, "data": key.data}
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


def _write_target(path: Path, target: FrozenTarget) -> None:
    if path.exists():
        return
    tensors = {"embedding": target.embedding_VE.detach()}
    if target.head_VE is not target.embedding_VE:
        tensors["head"] = target.head_VE.detach()
    _write_tensors(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def _states(numbers: Sequence[int], data: EncodedData, target: FrozenTarget) -> dict[str, torch.Tensor]:
    """The tensors of one shard, on the CPU."""
    lengths = [data.examples[number].input_ids.numel() for number in numbers]
    ends = list(itertools.accumulate(lengths))
    width, head_VE = target.head_VE.shape[1], target.head_VE
    tensors = {
        "aux": torch.empty(ends[-1], 3 * width, dtype=head_VE.dtype),
        "hidden": torch.empty(ends[-1], width, dtype=head_VE.dtype),
        "argmax": torch.empty(ends[-1], dtype=torch.int32),
    }
    for group in _groups(lengths):
        examples = [data.examples[numbers[index]] for index in group]
        features = target.features(_padded(examples).to(head_VE.device))
        for row, index in enumerate(group):
            place = slice(ends[index] - lengths[index], ends[index])
            aux_TA, hidden_TE = features.aux_BTA[row, : lengths[index]], features.hidden_BTE[row, : lengths[index]]
            if not bool(aux_TA.isfinite().all() & hidden_TE.isfinite().all()):
                raise NumericsError(
                    f"The target's states of conversation {numbers[index] + 1} of those that can be trained on hold "
                    "NaN or infinity. Give target.dtype another value, or leave that conversation out."
                )
            tensors["aux"][place], tensors["hidden"][place] = aux_TA.cpu(), hidden_TE.cpu()
            tensors["argmax"][place] = _greedy(hidden_TE, head_VE).cpu()
    return tensors


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of examples of similar length that the target reads at once, so that little of it is padding."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if group and (len(group) + 1) * lengths[index] > _FORWARD_TOKENS:
            yield group
            group = []
        group.append(index)
    yield group


def _padded(examples: Sequence[Example]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([example.input_ids for example in examples], batch_first=True)


@torch.no_grad()
def _greedy(hidden_TE: torch.Tensor, head_VE: torch.Tensor) -> torch.Tensor:
    """The target's greedy next token at each of some states, a few rows of logits at a time."""
    return torch.cat([(rows @ head_VE.T).argmax(dim=-1) for rows in hidden_TE.split(_HEAD_ROWS)])


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    # Left by a run that was killed; no other process writes this file.
    for partial in path.parent.glob(f"{path.name}.*.partial"):
        partial.unlink()
    write_whole(path, save(tensors))


@contextmanager
def _only_writer(place: Path, part: int) -> Iterator[None]:
    """Keeps a second run out of the folder while this one writes; its first process stands for all."""
    place.mkdir(parents=True, exist_ok=True)
    if part != 0:
        yield
        return
    try:
        with FileLock(place / "lock", timeout=0):
            yield
    except Timeout as error:
        raise CacheError(f"{place} is being written by another run. Wait for it, or choose another folder.") from error


def _require_room(place: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise CacheError(
            f"The states need {format_bytes(num_bytes)} more in {place}, but only {format_bytes(free)} are free. Free "
            "some space, choose another target.cache, or lower data.max_length."
        )


@contextmanager
def _naming_disk_errors(place: Path) -> Iterator[None]:
    """Turns what the disk says into a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CacheError(
            f"The states cannot be written to {place}: {reason}. What is there is whole; run the command again when "
            "there is room, and it goes on from there."
        ) from error
