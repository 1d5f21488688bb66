"""Step 7: which rows each process sees in which step, as batches of tensors.

Shape suffixes: B batch, T tokens.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from eagle3.features import Features
from eagle3.tokens import EncodedData, Example


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows of tokens, padded on the right.

    Attributes:
        input_ids_BT: int64 `(B, T)`.
        loss_mask_BT: bool `(B, T)`, true where the assistant wrote; padding is False.
        documents_BT: int64 `(B, T)`, which conversation of its row a token belongs to, counted from 0, padding being
            one behind the last; None if every row is one conversation.
        examples: The indices of each row's conversations.
        features: The target's states, if they were read from disk.
        pairs: What `prepare` of `batches` made for the step.
    """

    input_ids_BT: torch.Tensor
    loss_mask_BT: torch.Tensor
    documents_BT: torch.Tensor | None = None
    examples: tuple[tuple[int, ...], ...] = ()
    features: Features | None = None
    pairs: Any = None


def collate(rows: Sequence[Sequence[Example]], *, pad_id: int, row_length: int | None = None) -> Batch:
    """Lays the examples of each row side by side and pads, where a causal model's real tokens never look.

    Args:
        rows: At least one, of at least one example each.
        pad_id: Any id of the vocabulary.
        row_length: Tokens of a packed row; None for rows of one example, padded to the longest.

    Returns:
        The batch, without the numbers of its examples.
    """
    ids = [torch.cat([example.input_ids for example in row]) for row in rows]
    masks = [torch.cat([example.loss_mask for example in row]) for row in rows]
    num_tokens = max(row.numel() for row in ids) if row_length is None else row_length
    input_ids_BT = torch.full((len(rows), num_tokens), pad_id)
    loss_mask_BT = torch.zeros(len(rows), num_tokens, dtype=torch.bool)
    documents_BT = None if row_length is None else torch.zeros(len(rows), num_tokens, dtype=torch.int64)
    for index, (row, row_ids, row_mask) in enumerate(zip(rows, ids, masks, strict=True)):
        input_ids_BT[index, : row_ids.numel()] = row_ids
        loss_mask_BT[index, : row_mask.numel()] = row_mask
        if documents_BT is not None:
            lengths = [example.input_ids.numel() for example in row]
            lengths.append(num_tokens - sum(lengths))
            documents_BT[index] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Batch(input_ids_BT=input_ids_BT, loss_mask_BT=loss_mask_BT, documents_BT=documents_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """A row's place in a batch; unsupervised when it only fills up an incomplete batch."""

    index: int
    supervised: bool


class BatchOrder:
    """Which rows each rank sees at each step; a function of its arguments alone, so a run resumes anywhere.

    The place in an epoch is therefore one number, the rows that all ranks together have seen, which a checkpoint holds
    in place of a loader's state: that would belong to one number of ranks and of workers.

    Args:
        num_rows: In the data set, at least 1.
        batch_size: Rows per rank and step.
        rank: Of this process.
        world_size: Number of ranks; they split each step's `batch_size * world_size` rows between them.
        seed: Of the run. The order of an epoch depends on it and the epoch's number, not on ranks.
    """

    def __init__(self, num_rows: int, *, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        assert num_rows > 0
        assert batch_size > 0
        assert 0 <= rank < world_size
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every row is seen once, the same on all ranks."""
        return self.steps_from(0)

    def steps_from(self, start_row: int) -> int:
        """Steps in which what is left of an epoch behind its first `start_row` rows is seen once."""
        return -(-(self.num_rows - start_row) // (self.batch_size * self.world_size))

    def epoch(self, epoch: int, *, start_row: int = 0) -> Iterator[list[Pick]]:
        """This rank's picks, `batch_size` at a time, behind the first `start_row` rows of the epoch.

        Where the last step has too few rows left, the epoch's first ones come again, unsupervised; they go to all
        ranks in turn, but a rank may still have a batch without any supervised token.
        """
        order = torch.randperm(self.num_rows, generator=self._generator(epoch)).tolist()
        global_size = self.batch_size * self.world_size
        for first in range(start_row, self.num_rows, global_size):
            places = range(first + self.rank, first + global_size, self.world_size)
            yield [Pick(index=order[place % self.num_rows], supervised=place < self.num_rows) for place in places]

    def _generator(self, epoch: int) -> torch.Generator:
        # A hash, because sums such as seed + epoch would give run 1 the second epoch of run 0.
        digest = hashlib.sha256(f"{self.seed}:{epoch}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def positions_of(documents_BT: torch.Tensor) -> torch.Tensor:
    """The position of each token within its document, int64 `(B, T)`; a document's tokens stand side by side."""
    time_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return time_T - torch.where(begins_BT, time_T, 0).cummax(dim=1).values


class _Batches(Dataset[Batch]):
    """Makes the batch of a list of picks, in a worker process if there are any."""

    def __init__(self, data: EncodedData, *, pad_id: int, prepare: Callable[[Batch], Batch] | None) -> None:
        self.data = data
        self.pad_id = pad_id
        self.prepare = prepare

    def __getitem__(self, picks: list[Pick]) -> Batch:
        data = self.data
        numbers = [(pick.index,) if data.packed_rows is None else data.packed_rows[pick.index] for pick in picks]
        rows = [[data.examples[number] for number in row] for row in numbers]
        batch = collate(rows, pad_id=self.pad_id, row_length=data.row_length)
        for place, pick in enumerate(picks):
            if not pick.supervised:
                batch.loss_mask_BT[place] = False
        source, num_tokens = data.feature_source, batch.input_ids_BT.shape[1]
        features = None if source is None else source(numbers, num_tokens)
        batch = replace(batch, examples=tuple(numbers), features=features)
        return batch if self.prepare is None else self.prepare(batch)


def batches(
    data: EncodedData,
    *,
    order: BatchOrder,
    epoch: int,
    start_row: int = 0,
    pad_id: int,
    num_workers: int = 0,
    prepare: Callable[[Batch], Batch] | None = None,
) -> Iterator[Batch]:
    """Yields this rank's batches of what is left of one epoch, on the CPU.

    Args:
        data: The same on all ranks.
        order: Made for as many rows as `data` has.
        epoch: Number of the epoch, from 0.
        start_row: Rows of this epoch that all ranks of a resumed run together have seen.
        pad_id: Any id of the vocabulary.
        num_workers: Processes that prepare batches ahead; 0 to prepare each when it is asked for.
        prepare: Adds to each batch what its step needs, in the process that makes it.
    """
    assert order.num_rows == data.num_rows
    yield from DataLoader(
        _Batches(data, pad_id=pad_id, prepare=prepare),
        batch_size=None,
        sampler=order.epoch(epoch, start_row=start_row),
        num_workers=num_workers,
        # The loader draws a seed for its workers; from the global generator that would change a resumed run's numbers.
        generator=torch.Generator(),
    )
