"""Step 7, training: a callback under which every checkpoint of `transformers.Trainer` keeps the laws."""

import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

import tiepolicy
from tiepolicy import TiePlan
from tiepolicy.errors import CheckpointError
from tiepolicy_hf._flags import correct_flags_
from tiepolicy_hf._folder import find_weights
from tiepolicy_hf._save import save_as_held

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class TiePolicyCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not annotated
    """Keeps ties and untied heads true from the start of a training to its last checkpoint.

    - Before training, the model's flags are set right, so that nothing in the trainer ties a trained head.
    - Ties that held when training began hold at every save, or it stops with `BrokenTieError`.
    - When the trainer has written a checkpoint, its weights are written once more as `tiepolicy_hf.save_pretrained`
      does: the plan lies in their metadata, and the folder is exchanged as a whole. A checkpoint without a plan is one
      that was not finished, and `last_checkpoint` passes over it.
    - They have the names of the live model, by which the trainer resumes. Of a class whose checkpoints have other names
      the trainer writes those, finds none of them when it resumes, and goes on from random weights with a warning.

    For a model that each process holds whole (one process, or DDP). One that is sharded is saved with `tiepolicy_dcp`.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[TiePolicyCallback()])  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._plan: TiePlan | None = None

    @override
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide what is tied, and set the flags of the model right."""
        self._plan = tiepolicy.plan(kwargs["model"])
        correct_flags_(kwargs["model"], self._plan)

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that moving, wrapping and resuming kept the ties."""
        self._verify(kwargs["model"], "the trainer prepared the model")

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the weights of the checkpoint that the trainer has just written by the policy; on the first rank."""
        self._verify(kwargs["model"], f"step {state.global_step}")
        if state.is_world_process_zero:
            save_as_held(kwargs["model"], Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def _verify(self, model: Any, after: str) -> None:
        if self._plan is not None:
            self._plan.verify(model, after=after)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a trainer that `TiePolicyCallback` finished; None if there is none.

    Args:
        output_dir: The trainer's `output_dir`.

    Returns:
        Its path, for `Trainer.train(resume_from_checkpoint=...)`, which takes None for a start.
    """
    folder = Path(output_dir)
    steps = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _CHECKPOINT.fullmatch(path.name))
    }
    for _, path in sorted(steps.items(), reverse=True):
        try:
            if find_weights(path, allow_pickle=False).manifest is not None:
                return str(path)
        except CheckpointError:  # the trainer was killed while it wrote this one
            continue
    return None
