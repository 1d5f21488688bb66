"""Step 29: opens drafts that exist: what a run left, beside its target, and what another run starts from."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from eagle3.blueprint import LAYERS, read_draft_config, require_draft, run_of
from eagle3.checkpoint import RunCheckpoints, load_draft_, owners_of, target_digest
from eagle3.config import DraftConfig, RunConfig, read_run_config
from eagle3.draft import Draft
from eagle3.errors import DraftError
from eagle3.files import reason
from eagle3.inputs import Target
from eagle3.parallel import Ranks
from eagle3.target import FrozenTarget
from tiepolicy_dcp import CheckpointStore

logger = logging.getLogger("eagle3")


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
        TargetError: The target is missing.
        DraftError: The target has another shape than the one that the draft was trained for.
        CheckpointError: It is not that one.
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
    draft = Draft(shape).eval()
    draft.share_embedding_(loaded.embedding_VE)
    draft.to(device)
    extra = load_draft_(store, folder, draft, owners_of(loaded), target_digest(loaded)).extra
    return TrainedDraft(
        config=config,
        checkpoint=folder,
        epochs_completed=extra["progress"]["epoch"],
        draft=draft,
        target=loaded,
        target_folder=str(target_folder),
    )


@torch.no_grad()
def init_from_existing_(draft: Draft, folder: Path, *, target: Target, options: DraftConfig) -> None:
    """Gives a `draft` the weights and tokens of that in a `folder`, if it fits `target` and `options`.

    Raises:
        DraftError: It does not, or not its own config.
        TiePolicyError: The checkpoint is missing or damaged.
    """
    config, layers = draft.config, list(target.layer_ids)
    config.eagle_aux_hidden_state_layer_ids = config.eagle_aux_hidden_state_layer_ids or layers
    needed: dict[str, Any] = {LAYERS: layers, "num_hidden_layers": 1, "hidden_act": "silu"}
    for name, value in asdict(options).items():
        if value != getattr(DraftConfig, name) and name not in ("init_from", "min_coverage"):
            needed["draft_vocab_size" if name == "vocab_size" else name] = value or target.vocab_size
    require_draft(config, folder, **needed)
    logger.info("Draft taken over from %s, with its rope %s", folder, config.rope_parameters)
    run, embedding, t2d_V = run_of(folder), draft.embed_tokens.weight, draft.t2d
    tensors, is_same = {"t2d": t2d_V}, True
    if run is not None:
        room = Draft(config)
        if not embedding.requires_grad:
            del room.embed_tokens
        store = CheckpointStore(run / "checkpoints")
        stored = store.load(store.resolve("LATEST" if run == folder else folder.name), model=room)
        tensors, is_same = room.state_dict(), stored.extra.get("target_digest") == target_digest(target)
    try:
        if run is None:
            tensors = exported_tensors(folder) | tensors
        if not embedding.requires_grad:
            given = tensors.get("embed_tokens.weight", embedding)
            if not is_same or not torch.equal(embedding.to(given), given):
                logger.warning(
                    "The draft in %s was trained beside another target; it gets the embedding of this", folder
                )
            tensors["embed_tokens.weight"] = embedding
        if len(draft.d2t) == len(t2d_V):
            tensors.setdefault("d2t", draft.d2t)
        draft.load_state_dict(tensors)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DraftError(
            f"{folder} does not hold the draft that its config describes ({reason(error)}). Get it whole, in one "
            "model.safetensors."
        ) from error
    ids_D = draft.target_ids()
    if len(set(ids_D.tolist()).intersection(range(len(t2d_V)))) < len(ids_D):
        raise DraftError(f"The d2t in {folder} does not name {len(ids_D)} tokens of the target. Choose another draft.")
    t2d_V.zero_()[ids_D] = True


def exported_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that engines load, by the names of a `Draft`."""
    stored = load_file(folder / "model.safetensors")
    return {name.replace("layers.0.", "midlayer."): tensor for name, tensor in stored.items()}
