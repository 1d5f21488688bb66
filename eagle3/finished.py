"""Step 35: opens what a run left: its settings, the draft of one checkpoint, and the target it was made for."""

from dataclasses import dataclass
from pathlib import Path

import torch

from eagle3.blueprint import read_draft_config
from eagle3.checkpoint import RunCheckpoints, load_draft_, owners_of, target_digest
from eagle3.config import RunConfig, read_run_config
from eagle3.draft import Draft
from eagle3.errors import TargetError
from eagle3.parallel import Ranks
from eagle3.target import FrozenTarget
from tiepolicy.errors import ExternalOwnerError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedDraft:
    """A draft as a checkpoint holds it, beside its target.

    Attributes:
        config: The settings of its run.
        checkpoint: Folder of the checkpoint.
        epochs_completed: When it was written.
        draft: In float32, in eval mode. Its embedding is the target's, if it is as wide as that.
        target: In the run's dtype, on the same device.
        target_folder: Where the target was loaded from.
    """

    config: RunConfig
    checkpoint: Path
    epochs_completed: int
    draft: Draft
    target: FrozenTarget
    target_folder: str


def open_run(run: str | Path, *, checkpoint: str, target: str | None = None) -> TrainedDraft:
    """Loads a draft and its target onto the GPU, or without one onto the CPU.

    Args:
        run: Folder of the run.
        checkpoint: `LATEST`, `BEST`, a name, or a path.
        target: Folder of the target, if it lies elsewhere than when the run was started.

    Raises:
        ConfigError: The folder holds no run.
        TargetError: The target is missing, or is not the one that the draft was trained for.
        TiePolicyError: There is no such checkpoint, or it is damaged.
    """
    config, shape = read_run_config(run), read_draft_config(Path(run))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = RunCheckpoints(run, Ranks(rank=0, world_size=1, device=device)).store
    folder = store.resolve(checkpoint)
    target_folder = target or config.target.model
    loaded = FrozenTarget.load(
        target_folder,
        dtype=getattr(torch, config.target.dtype),
        device=device,
        layers=shape.eagle_aux_hidden_state_layer_ids,
    )
    sizes = (shape.vocab_size, shape.target_hidden_size)
    if tuple(loaded.embedding_VE.shape) != sizes:
        raise TargetError(
            f"The draft of {run} was trained for a target with an embedding of shape {sizes}, but that of "
            f"{target_folder} has {tuple(loaded.embedding_VE.shape)}. Give the target that the run was started with."
        )
    draft = Draft(shape).eval()
    draft.share_embedding_(loaded.embedding_VE)
    draft.to(device)
    another_target = (
        f"The target {target_folder} is not the one that the draft of {run} was trained for, though its embedding has "
        "the same shape: its embedding or its head holds other numbers. Give the target that the run was started with."
    )
    try:
        extra = load_draft_(store, folder, draft, external=owners_of(loaded)).extra
    except ExternalOwnerError as error:
        raise TargetError(another_target) from error
    if extra["target_digest"] != target_digest(loaded):
        raise TargetError(another_target)
    return TrainedDraft(
        config=config,
        checkpoint=folder,
        epochs_completed=extra["progress"]["epoch"],
        draft=draft,
        target=loaded,
        target_folder=str(target_folder),
    )
