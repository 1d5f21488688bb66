"""Step 12: fills a cache: runs the target over the data once, in parts that survive a cut.

Shape suffixes: T tokens, V target vocabulary, E target hidden.
"""

import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from eagle3.cache import (
    FORMAT,
    MANIFEST,
    CacheKey,
    bytes_per_token,
    place_of,
    read_manifest,
    shard_path,
    target_path,
)
from eagle3.errors import CacheError, NumericsError
from eagle3.files import reason, sole_writer, write_whole
from eagle3.target import FrozenTarget
from eagle3.terminal import watched
from eagle3.tokens import EncodedData, Example
from tiepolicy import format_bytes

logger = logging.getLogger("eagle3")

#: Bytes of a shard at most, unless one conversation is longer; a shard is also what a cut run does again.
SHARD_BYTES = 1 << 30
# Tokens, padding included, that one forward of the target gets.
_FORWARD_TOKENS = 8192
# Rows of full-vocabulary logits that exist at a time.
_HEAD_ROWS = 1024


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
    place = place_of(folder, key)
    lengths = [example.input_ids.numel() for example in data.examples]
    per_token = bytes_per_token(target.head_VE.shape[1], key.dtype)
    shards = _plan_shards(lengths, max(1, shard_bytes // per_token))
    with _naming_disk_errors(place), _only_writer(place, part):
        _write_manifest(place, key, shards)
        if part == 0:
            _write_target(target_path(folder, key), target)
        missing = [index for index in range(len(shards)) if not shard_path(place, index).exists()]
        own = [index for index in missing if index % num_parts == part]
        _require_room(place, per_token * sum(lengths[i] for index in missing for i in shards[index]))
        for count, index in enumerate(own, start=1):
            _write_tensors(shard_path(place, index), _states(shards[index], data, target))
            logger.info("Wrote %s, %d of %d", shard_path(place, index), count, len(own))


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


def _write_manifest(place: Path, key: CacheKey, shards: list[list[int]]) -> None:
    content = {"format": FORMAT, **asdict(key), "layers": list(key.layers), "shards": shards}
    if (place / MANIFEST).exists():
        found = read_manifest(place, place.parent, key)
        if found["shards"] != shards:
            raise CacheError(
                f"{place} was begun with another size of shards. Delete it, or choose another target.cache."
            )
    else:
        write_whole(place / MANIFEST, json.dumps(content).encode())


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
    groups = list(_groups(lengths))
    for group in watched(groups, "States of the target", total=len(groups)):
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
    taken = CacheError(f"{place} is being written by another run. Wait for it, or choose another folder.")
    with sole_writer(place / "lock", patience=0, otherwise=taken):
        yield


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
        raise CacheError(
            f"The states cannot be written to {place}: {reason(error)}. What is there is whole; run the command again "
            "when there is room, and it goes on from there."
        ) from error
