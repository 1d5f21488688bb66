"""Step 7, training: a callback under which every checkpoint of `transformers.Trainer` keeps the laws."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

import tiepolicy
from tiepolicy import TiePlan
from tiepolicy.errors import CheckpointError
from tiepolicy.files import DIGESTS, read_header, read_json
from tiepolicy_hf._flags import correct_flags_
from tiepolicy_hf._folder import find_weights, flush, writing
from tiepolicy_hf._save import save_pretrained, write_as_held

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: The last file that the trainer writes of a checkpoint.
_STATE = "trainer_state.json"
_ADAPTER = "adapter_model.safetensors"


class TiePolicyCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not annotated
    """Keeps ties and untied heads true from the start of a training to its last checkpoint.

    - Before training, the model's flags are set right, so that nothing in the trainer ties a trained head.
    - Ties that held when training began hold at every save, or it stops with `BrokenTieError`.
    - The trainer asks its model to save itself, by `model.save_pretrained(folder)`. From then on that model does it as
      `tiepolicy_hf.save_pretrained` does, in checkpoints and in `trainer.save_model()`: weights are written once, with
      the plan in their metadata. A call with options that ours has not is answered by transformers.
    - In checkpoints, weights have the names of the live model, by which the trainer resumes. Of a class whose
      checkpoints have other names the trainer alone writes those, finds none of them when it resumes, and goes on from
      random weights with a warning.
    - `last_checkpoint` passes over a checkpoint that the trainer did not finish.

    For a model that each process holds whole: one process, or DDP. A sharded one is saved with `tiepolicy_dcp`.
    Adapters of PEFT are written by PEFT.

    Example::

        trainer = Trainer(model, args, callbacks=[TiePolicyCallback()])
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    """

    def __init__(self) -> None:
        self._plan: TiePlan | None = None

    @override
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide what is tied, and set the flags of the model right."""
        self._take(kwargs["model"])

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that moving, wrapping and resuming kept the ties."""
        self._verify(kwargs["model"], "the trainer prepared the model")
        self._take(kwargs["model"])  # which `model_init` may have made anew

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See that the ties hold still, and that what all ranks wrote is on disk."""
        self._verify(kwargs["model"], f"step {state.global_step}")
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # each rank wrote the state of its random numbers
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():  # the trials of a search have folders of their own
            with writing(folder):
                flush(folder)

    def _take(self, model: Any) -> None:
        self._plan = tiepolicy.plan(model)
        correct_flags_(model, self._plan)
        if isinstance(model, PreTrainedModel) and not hasattr(model, "peft_config"):
            vars(model)["save_pretrained"] = functools.partial(_save_by_policy, model)  # of this one, not of its class

    def _verify(self, model: Any, after: str) -> None:
        if self._plan is not None:
            self._plan.verify(model, after=after)


def _save_by_policy(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    **options: Any,
) -> None:
    """What the trainer calls, in the place of the method of that name, under its signature."""
    folder = Path(save_directory)
    if options or (state_dict is not None and not state_dict):  # an empty one holds the place of what DeepSpeed writes
        (folder / DIGESTS).unlink(missing_ok=True)  # of an older save
        type(model).save_pretrained(
            model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **options
        )
    elif is_main_process and _CHECKPOINT.fullmatch(folder.name):
        # Other ranks write into the folder at the same time, so that it cannot be exchanged. Until its last file is
        # there, it is none that `last_checkpoint` takes.
        (folder / _STATE).unlink(missing_ok=True)
        write_as_held(model, folder, state_dict=state_dict)
    elif is_main_process:
        save_pretrained(model, folder, state_dict=state_dict)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a trainer with `TiePolicyCallback` that was finished; None if there is none.

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
    return next((str(path) for _, path in sorted(steps.items(), reverse=True) if _is_finished(path)), None)


def _is_finished(checkpoint: Path) -> bool:
    try:
        read_json(checkpoint / _STATE)
        if (checkpoint / _ADAPTER).exists():
            read_header(checkpoint / _ADAPTER)
            return True
        return find_weights(checkpoint, allow_pickle=False).manifest is not None
    except CheckpointError:  # the trainer was killed while it wrote this one
        return False
