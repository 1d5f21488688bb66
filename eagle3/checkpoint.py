"""Step 28: all that a run needs to go on, saved and restored through the tie policy."""

import hashlib
import itertools
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

import tiepolicy
from eagle3.config import CheckpointConfig, RunConfig
from eagle3.draft import Draft
from eagle3.errors import CheckpointError
from eagle3.inputs import Target
from eagle3.metrics import Measurement
from eagle3.optimizer import DraftOptimizer
from eagle3.parallel import Ranks
from tiepolicy import Owners, TiePlan
from tiepolicy.errors import ExternalOwnerError, ShapeMismatchError
from tiepolicy_dcp import CheckpointError as StoreError
from tiepolicy_dcp import CheckpointStore, LostRankError, PendingSave, Restored

logger = logging.getLogger("eagle3")

#: The draft's embedding and, under the same name, that of the target as its owner.
_EMBEDDING = "embed_tokens.weight"

#: Settings that may change when a run is resumed, which then are named: they change what is learnt or measured.
_TOLD = ("target.", "data.validation", "unroll.", "train.", "parallel.")


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run has come.

    Attributes:
        epoch: Epochs completed.
        step: Optimizer steps taken in all.
        num_seen: Rows seen in the epoch under way, over all processes; 0 at its start.
    """

    epoch: int = 0
    step: int = 0
    num_seen: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a checkpoint holds of a run."""

    draft: Draft
    optimizer: DraftOptimizer
    progress: Progress
    config: RunConfig
    #: Of the encoded conversations.
    data_digest: str
    #: Of the target.
    target_digest: str
    #: Whose tensors the draft uses without holding them, as `owners_of` gives them.
    external: Owners = field(default_factory=dict)


class RunCheckpoints:
    """The checkpoints of one run, under `checkpoints/` of its folder. All processes call the methods together.

    Args:
        out: Folder of the run.
        ranks: The processes that train together.
        config: Which checkpoints are kept; all if not given.
        policy: Decides which weights are one tensor; the default policy if not given.
    """

    def __init__(
        self,
        out: str | Path,
        ranks: Ranks,
        config: CheckpointConfig | None = None,
        *,
        policy: tiepolicy.Policy | None = None,
    ) -> None:
        self.make_plan = tiepolicy.plan if policy is None else policy.plan
        self.out = Path(out)
        self.ranks = ranks
        self.config = config = config or CheckpointConfig()
        self._pending: PendingSave | None = None
        self._planned: tuple[Draft, TiePlan] | None = None
        self.store = CheckpointStore(
            self.out / "checkpoints", keep_last=config.keep_last, keep_best=config.keep_best, metric="accept_length"
        )

    def close(self) -> None:
        """Let another process write here."""
        self.store.close()

    def require_fresh(self) -> None:
        """Refuse to start a run where one has left checkpoints.

        Raises:
            CheckpointError: If there are any.
        """
        names = self.store.names()
        if names:
            raise CheckpointError(
                f"{self.out} already holds a run, with the checkpoints {', '.join(names)}. Go on from it with "
                "--checkpoint.restore_from LATEST, or choose another --out."
            )

    def save(self, state: RunState, measurement: Measurement | None, *, is_last: bool = True) -> None:
        """Write `epoch_E_step_S`, E being the epoch under way or just completed.

        A run that went back to an earlier checkpoint comes by the same names again; those are then `epoch_E_step_S-2`
        and so on, and nothing is lost.

        Args:
            state: What to write.
            measurement: The draft's score on the validation data; without one, the checkpoint never becomes `BEST`.
            is_last: Whether the run ends with it, so that there is nothing to continue whatever the config says.

        Raises:
            TiePolicyError: If it could not be written, or the one before it in the background.
        """
        goes_on = self.config.on_error == "continue"
        with self._disk_errors(survived=goes_on):
            self._wait()
        with self._disk_errors(survived=goes_on and not is_last):
            self._save(state, measurement)

    def _save(self, state: RunState, measurement: Measurement | None) -> None:
        progress = state.progress
        epoch = progress.epoch + (1 if progress.num_seen else 0)
        extra = {
            "progress": asdict(progress),
            "config": asdict(state.config),
            "rng": list(self.ranks.gather(_rng_state(self.ranks.device))),
            "data_digest": state.data_digest,
            "target_digest": state.target_digest,
        }
        metrics = None
        if measurement is not None:
            metrics = {"accept_length": measurement.accept_length, "loss": measurement.loss}
        name = self._free_name(f"epoch_{epoch}_step_{progress.step}")
        save = self.store.async_save if self.config.async_save else self.store.save
        saved = save(
            name,
            model=state.draft,
            optimizer=state.optimizer.adamw,
            extra=extra,
            plan=self.plan_of(state),
            consolidated=self.config.save_consolidated,
            metrics=metrics,
        )
        if isinstance(saved, Path):
            logger.info("Saved checkpoint to %s", saved)
        else:
            logger.info("Writing checkpoint %s in the background", name)
            self._pending = saved

    def plan_of(self, state: RunState) -> TiePlan:
        """The plan that the draft is saved by, made once: a digest of the target's embedding takes a second per GB."""
        if self._planned is None or self._planned[0] is not state.draft:
            self._planned = (state.draft, self.make_plan(state.draft, external=state.external, digests=True))
        return self._planned[1]

    def finish(self) -> None:
        """Wait for the last checkpoint, if it is being written in the background.

        Raises:
            TiePolicyError: If it could not be written.
        """
        with self._disk_errors(survived=False):
            self._wait()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            logger.info("Saved checkpoint to %s", pending.result())

    @contextmanager
    def _disk_errors(self, *, survived: bool) -> Iterator[None]:
        """Within the block, a checkpoint that cannot be written is a warning if it is survived, else one sentence."""
        try:
            yield
        except (StoreError, OSError) as error:
            if survived and not isinstance(error, LostRankError):
                logger.warning("%s. Training goes on, as checkpoint.on_error is continue", error)
            elif isinstance(error, OSError):
                raise CheckpointError(f"A checkpoint could not be written to {self.store.root}: {error}.") from error
            else:
                raise

    def _free_name(self, name: str) -> str:
        # What the first process sees counts: another machine's view of a shared disk may lag behind.
        taken = set(self.ranks.gather(self.store.names())[0])
        further = (f"{name}-{number}" for number in itertools.count(2))
        return next(free for free in (name, *itertools.islice(further, len(taken))) if free not in taken)

    def restore_(self, reference: str, state: RunState) -> None:
        """Fill the state from a checkpoint.

        Args:
            reference: `LATEST`, `BEST`, a name, or a path.
            state: Weights, optimizer, progress and random states are replaced.

        Raises:
            CheckpointError: If the checkpoint was made by another trainer, for another target, on other data, or of a
                draft with other settings.
            TiePolicyError: If it is missing or damaged, or belongs to another draft.
        """
        folder = self.store.resolve(reference)
        logger.info("Resuming from checkpoint: %s", folder)
        optimizer = state.optimizer.adamw
        try:
            restored = load_draft_(self.store, folder, state.draft, state.external, state.target_digest, optimizer)
        except ShapeMismatchError as error:
            if _EMBEDDING not in error.names:
                raise
            raise CheckpointError(
                f"{folder} was trained beside a target of another target.dtype or shape than "
                f"{state.config.target.model} in {state.config.target.dtype}: {error}."
            ) from error
        try:
            names = ("progress", "rng", "config", "data_digest")
            progress, rng, saved_config, data_digest = (restored.extra[name] for name in names)
            state.progress.epoch, state.progress.step = progress["epoch"], progress["step"]
            state.progress.num_seen = progress["num_seen"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} was not written by this trainer: it has no {error}.") from error
        _check_settings(folder, saved=saved_config, now=asdict(state.config))
        if data_digest != state.data_digest:
            raise CheckpointError(
                f"{folder} was trained on other data than this run has (data.train, data.max_length, data.packing, "
                "or the target's tokenizer or chat template changed), so its place in the data means nothing here. "
                "Resume with the same data, or start a new run."
            )
        state.optimizer.obey_config()
        if len(rng) == self.ranks.world_size:
            _set_rng_state(rng[self.ranks.rank], self.ranks.device)
        else:
            logger.warning(
                "The checkpoint was written by %d processes and is resumed by %d: random states start anew",
                len(rng),
                self.ranks.world_size,
            )


def owners_of(target: Target) -> Owners:
    """What a plan needs to call the draft's embedding the target's; the same for a target whose states are cached."""
    return {"target": {_EMBEDDING: target.embedding_VE}}


def load_draft_(
    store: CheckpointStore,
    folder: Path,
    draft: Draft,
    external: Owners,
    digest: str,
    optimizer: Optimizer | None = None,
) -> Restored:
    """Fill a draft, and perhaps its optimizer, from a checkpoint that may leave the embedding to the target.

    Args:
        store: Of the run.
        folder: The checkpoint.
        draft: Already shares the target's embedding, if it is as wide as the target.
        external: What `owners_of` gives.
        digest: What `target_digest` gives.
        optimizer: Of the draft.

    Raises:
        CheckpointError: If the target has another embedding or head than the draft was trained with.
        TiePolicyError: If the checkpoint is missing or damaged, or belongs to another draft.
    """
    another = CheckpointError(
        f"{folder} holds a draft of another target: the embedding or the head differs. Give the target that it was "
        "trained for."
    )
    try:
        restored = store.load(folder, model=draft, optimizer=optimizer, external=external)
    except ExternalOwnerError as error:
        raise another from error
    if restored.extra.get("target_digest", digest) != digest:
        raise another
    return restored


def target_digest(target: Target) -> str:
    """SHA-256 in hex of some rows of a target's embedding and head, in bfloat16: the same in whatever dtype it runs."""
    sha = hashlib.sha256()
    for table in (target.embedding_VE, target.head_VE):
        rows = torch.linspace(0, len(table) - 1, 64, device=table.device).long()
        sha.update(repr(tuple(table.shape)).encode())
        sha.update(table.detach()[rows].bfloat16().cpu().view(torch.int16).numpy().tobytes())
    return sha.hexdigest()


def _check_settings(folder: Path, *, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse settings that shaped the saved draft and are others now; tell which of the rest have changed."""
    before, after = dict(_leaves(saved)), dict(_leaves(now))
    changed = {
        name: f"{name} {before[name]} -> {value}"
        for name, value in after.items()
        if name in before and before[name] != value
    }
    fixed = [change for name, change in changed.items() if name.startswith("draft.") and name != "draft.min_coverage"]
    if fixed:
        raise CheckpointError(
            f"{folder} was started with other settings, which shaped its weights: {', '.join(fixed)}. Resume with the "
            "first of each, or start a new run."
        )
    told = [change for name, change in changed.items() if name.startswith(_TOLD)]
    if told:
        logger.warning("Settings changed since the checkpoint: %s", ", ".join(told))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; a tuple compares as the list that JSON makes of it."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _rng_state(device: torch.device) -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(internal), gauss],
    }


def _set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
