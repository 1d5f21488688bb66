"""Step 12, saving: plan, agree, write, flush, publish."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

import tiepolicy
from tiepolicy import Owners, TiePlan
from tiepolicy.errors import CheckpointError, LostRankError
from tiepolicy.files import DIGESTS, FileRecord, digests_text, measure
from tiepolicy_dcp._files import Written, write_safetensors, write_tensors
from tiepolicy_dcp._folder import RECORD, discard, prepare, publish, write_manifest, write_text
from tiepolicy_dcp._groups import encode, joined
from tiepolicy_dcp._ranks import agreed_plan, on_first_rank, through_first_rank
from tiepolicy_dcp._reader import StoredTensors, find_tensors
from tiepolicy_dcp._stages import store_once
from tiepolicy_dcp._state import Extra, ModelState, OptimizerState, observed, pack_extra, write_extra
from tiepolicy_dcp._writer import AliasWriter, Share, data_file, divide

#: File of a checkpoint with the whole model as other tools read it.
CONSOLIDATED = "model.safetensors"
#: How much of it is in memory, but for a larger tensor.
_BYTES_AT_ONCE = 1 << 25


def save(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    plan: TiePlan | None = None,
    external: Owners | None = None,
    consolidated: bool = False,
    digests: bool = True,
) -> Path:
    """Write a checkpoint. Called by all ranks of the default process group, or by a single process without one.

    The folder appears under its name only when it is whole and flushed; a save that fails or is killed leaves nothing
    there. Each tied tensor is written once and found under all its names; the plan lies beside DCP's metadata, as
    `manifest.json`.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(6, 2), "head": nn.Linear(2, 6, bias=False)})
        >>> model["head"].weight = model["embed"].weight
        >>> folder = save("checkpoint", model=model)
        >>> sorted(path.name for path in folder.iterdir())
        ['.metadata', '__0_0.distcp', 'digests.json', 'extra.json', 'manifest.json']

    Args:
        folder: A name that does not exist yet.
        model: What to save; sharded (DTensor) or replicated. The stages of a pipeline may each give their own, with
            the plan of the whole: what two of them own of one tensor must be equal, and is written once.
        optimizer: Its optimizer, saved under the canonical names of the parameters. Stages' groups of one position are
            one group of the whole model.
        extra: Nested JSON values and tensors; what rank 0 passes is kept.
        plan: The model's plan; made by the default policy if not given.
        external: Other models, by the names to know them under: `save(folder, model=draft, external={"target": model})`
            leaves out what is the target's, and records its digest.
        consolidated: Also write `model.safetensors`, the whole model without aliases.
        digests: Whether to hash what is written, so that damage is found on load; without, only the sizes of files are.

    Returns:
        The folder as an absolute path.

    Raises:
        UnsafeVerdictError: Before anything is written, if a plugin would lose a tensor.
        PlanMismatchError: On every rank, before anything is written, if ranks made different plans.
        TieConflictError: If names that are one tensor in the plan hold different values.
        CheckpointError: If the folder exists or cannot be written; what was written so far is removed. If the stages of
            a pipeline shard or optimize one tensor differently.
    """
    contents = collect(Given(model, optimizer, extra, plan, external, consolidated, digests))
    return complete(begin(Path(folder).absolute(), contents))


class Given(NamedTuple):
    """What `save` was called with."""

    model: nn.Module
    optimizer: Optimizer | None
    extra: Mapping[str, Any] | None
    plan: TiePlan | None
    external: Owners | None
    consolidated: bool
    digests: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """All that goes into a checkpoint; the tensors are the live ones."""

    plan: TiePlan
    #: By part (model, optimizer) and name; each tied tensor once.
    state: Mapping[str, Mapping[str, torch.Tensor]]
    #: On rank 0.
    extra: Extra
    #: Whether rank 0 also writes the whole model as one file.
    consolidated: bool
    #: Whether its files are hashed.
    digests: bool


def collect(given: Given) -> Contents:
    """Find out what a checkpoint will hold, and that it can be written. Called by all ranks."""
    model, optimizer, extra, plan, external, consolidated, digests = given
    plan = agreed_plan(lambda: plan or tiepolicy.plan(model, external=external, digests=external is not None))
    optimizer_state = None if optimizer is None else OptimizerState(model, optimizer, plan=plan)
    live, entries = observed(ModelState(model, plan=plan), optimizer_state)
    _check_tensors(live)
    groups = joined([entry.group for entry in entries.values() if entry.group is not None])
    state = {"model": store_once(live, entries.values(), plan)}
    if entries:
        state["optimizer"] = {name: entry.tensor for name, entry in entries.items()}
        state["optimizer"] |= {f"param_groups.{group.position}": encode(group) for group in groups}
    packed: list[Extra] = []
    on_first_rank(lambda: packed.append(pack_extra(extra or {})))
    extra_state = next(iter(packed), Extra())
    return Contents(plan=plan, state=state, extra=extra_state, consolidated=consolidated, digests=digests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checkpoint about to be written: all ranks know what each of them writes, and where."""

    folder: Path
    unfinished: Path
    contents: Contents
    share: Share
    #: What a store wants to know of it later, as JSON; rank 0's is kept.
    record: Mapping[str, Any] | None


def begin(folder: Path, contents: Contents, *, record: Mapping[str, Any] | None = None) -> Job:
    """Agree on who writes what, and make the folder. Called by all ranks with what `collect` returned on each."""
    share = divide(contents.plan, contents.state)
    unfinished = on_first_rank(lambda: prepare(folder))
    return Job(folder=folder, unfinished=unfinished, contents=contents, share=share, record=record)


def complete(
    job: Job,
    *,
    write: Callable[[Path], Written] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint and publish it. Called by all ranks, from any thread.

    Args:
        job: What `begin` returned on this rank.
        write: Writes the tensors of this rank's share, or copies of them, to a file; `write_tensors` if not given.
        group: The group of all ranks to communicate in; the default group if not given.
    """
    share = job.share

    def write_share() -> tuple[list[WriteResult], FileRecord]:
        path = job.unfinished / data_file(share.rank)
        written = write(path) if write else write_tensors(path, share.tensors(), digest=job.contents.digests)
        return share.results(written), written.record

    def finish(of_ranks: Sequence[tuple[list[WriteResult], FileRecord]]) -> list[Path]:
        _finish(job, of_ranks)
        return [job.folder] * len(of_ranks)

    try:
        return through_first_rank(write_share, finish, group=group)
    except (OSError, ValueError, RuntimeError) as error:
        if share.rank == 0:
            discard(job.unfinished)
        raise _as_checkpoint_error(job.folder, error) from error


def _check_tensors(live: Mapping[str, Any]) -> None:
    for name, value in live.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{name} is a {type(value).__name__}; only tensors are saved, since reading anything else back would "
                "run a pickle. Hand it over in `extra`, as JSON or tensors"
            )


def _finish(job: Job, of_ranks: Sequence[tuple[list[WriteResult], FileRecord]]) -> None:
    """Write what rank 0 writes alone, and publish."""
    unfinished, contents = job.unfinished, job.contents
    assert job.share.metadata is not None
    AliasWriter(unfinished, job.share.names).finish(job.share.metadata, [results for results, _ in of_ranks])
    write_manifest(unfinished, contents.plan)
    write_extra(unfinished, contents.extra)
    if job.record is not None:
        write_text(unfinished / RECORD, json.dumps(job.record, indent=1))
    records = {data_file(of_rank): record for of_rank, (_, record) in enumerate(of_ranks)}
    if contents.consolidated:
        records[CONSOLIDATED] = _consolidate(unfinished, contents)
    others = [path for path in unfinished.iterdir() if path.name not in records]
    own = measure(others, digests=contents.digests)
    write_text(unfinished / DIGESTS, digests_text({**records, **own}))
    publish(unfinished, job.folder)


def _consolidate(unfinished: Path, contents: Contents) -> FileRecord:
    """Write the whole model, a few tensors at a time, from what all ranks wrote: each may have had a part only."""
    stored = StoredTensors(unfinished)
    named = stored.specs("model.")
    specs = {name: named[name] for name in contents.plan.stored()}

    def read(names: Sequence[str]) -> Iterator[torch.Tensor]:
        ends = accumulate(specs[name].nbytes for name in names)
        for _, few in groupby(zip(names, ends, strict=True), lambda pair: pair[1] // _BYTES_AT_ONCE):
            tensors = {name: torch.empty(specs[name].shape, dtype=specs[name].dtype) for name, _ in few}
            find_tensors(stored, {name: (f"model.{name}", tensor) for name, tensor in tensors.items()})()
            yield from tensors.values()

    return write_safetensors(unfinished / CONSOLIDATED, specs, read, digest=contents.digests)


def _as_checkpoint_error(folder: Path, error: Exception) -> CheckpointError:
    if isinstance(error, LostRankError):
        return LostRankError(f"{folder} could not be finished: {error}")
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(f"{folder} could not be written: {type(error).__name__}: {error}. Nothing was kept")
