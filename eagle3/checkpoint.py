"""Step 11: all that a run needs to go on, saved and restored through the tie policy."""

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig

import tiepolicy
from eagle3.draft import Draft
from eagle3.errors import CheckpointError, DraftError
from eagle3.parallel import Ranks
from tiepolicy_dcp import CheckpointStore

logger = logging.getLogger("eagle3")

#: The draft's config in the folder of a run; a resumed run builds its draft from it.
DRAFT_CONFIG = "draft_config.json"


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run has come.

    Attributes:
        epoch: Epochs completed.
        step: Optimizer steps taken in all.
        num_seen: Examples seen in the epoch under way, over all processes; 0 at its start.
    """

    epoch: int = 0
    step: int = 0
    num_seen: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a checkpoint holds of a run."""

    draft: Draft
    optimizer: Optimizer
    scheduler: LambdaLR
    progress: Progress
    #: Of the encoded conversations.
    data_digest: str


class RunCheckpoints:
    """The checkpoints of one run, under `checkpoints/` of its folder. All processes call the methods together.

    Args:
        out: Folder of the run.
        ranks: The processes that train together.
    """

    def __init__(self, out: str | Path, ranks: Ranks) -> None:
        self.out = Path(out)
        self.ranks = ranks
        self.store = CheckpointStore(self.out / "checkpoints")

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

    def save(self, state: RunState, *, consolidated: bool) -> None:
        """Write `epoch_E_step_S`, E being the epoch under way or just completed."""
        progress = state.progress
        epoch = progress.epoch + (1 if progress.num_seen else 0)
        extra = {
            "progress": {"epoch": progress.epoch, "step": progress.step, "num_seen": progress.num_seen},
            "scheduler": state.scheduler.state_dict(),
            "rng": list(self.ranks.gather(_rng_state(self.ranks.device))),
            "data_digest": state.data_digest,
        }
        folder = self.store.save(
            f"epoch_{epoch}_step_{progress.step}",
            model=state.draft,
            optimizer=state.optimizer,
            extra=extra,
            plan=tiepolicy.plan(state.draft),
            consolidated=consolidated,
        )
        logger.info("Saved checkpoint to %s", folder)

    def restore_(self, reference: str, state: RunState) -> None:
        """Fill the state from a checkpoint.

        Args:
            reference: `LATEST`, a name, or a path.
            state: Weights, optimizer, schedule, progress and random states are replaced.

        Raises:
            CheckpointError: If the checkpoint was made by another trainer, or on other data.
            TiePolicyError: If it is missing or damaged, or belongs to another draft.
        """
        folder = self.store.resolve(reference)
        logger.info("Resuming from checkpoint: %s", folder)
        restored = self.store.load(folder, model=state.draft, optimizer=state.optimizer)
        try:
            progress, scheduler, rng = (restored.extra[key] for key in ("progress", "scheduler", "rng"))
            state.progress.epoch, state.progress.step = progress["epoch"], progress["step"]
            state.progress.num_seen = progress["num_seen"]
            digest = restored.extra["data_digest"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} was not written by this trainer: it has no {error}.") from error
        if digest != state.data_digest:
            raise CheckpointError(
                f"{folder} was trained on other data than this run has (data.train, data.max_length, or the target's "
                "tokenizer or chat template changed), so its place in the data means nothing here. Resume with the "
                "same data, or start a new run."
            )
        state.scheduler.load_state_dict(scheduler)
        if len(rng) == self.ranks.world_size:
            _set_rng_state(rng[self.ranks.rank], self.ranks.device)
        else:
            logger.warning(
                "The checkpoint was written by %d processes and is resumed by %d: random states start anew",
                len(rng),
                self.ranks.world_size,
            )


def write_draft_config(out: Path, config: LlamaConfig) -> None:
    """Keep the draft's config in the folder of its run."""
    out.mkdir(parents=True, exist_ok=True)
    (out / DRAFT_CONFIG).write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_draft_config(out: Path) -> LlamaConfig:
    """The draft's config from the folder of its run. Its `tie_word_embeddings` is a claim like any other.

    Raises:
        DraftError: If it is missing or cannot be read.
    """
    path = out / DRAFT_CONFIG
    try:
        config: LlamaConfig = LlamaConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DraftError(
            f"The draft's config {path} cannot be read ({error}). A run is resumed with the --out it was started with."
        ) from error
    return config


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
