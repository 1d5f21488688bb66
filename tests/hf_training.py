"""Short trainings by transformers.Trainer, the same each time, for the tests and for the ranks they start."""

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import tiepolicy_hf
from models import tiny_llama


class Texts(Dataset):
    """Random ids that are the same each time."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 96, (48, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(model, folder, *, max_steps=12, callbacks=None, **options):
    """Six steps to a checkpoint; under our callback unless others are given."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=max_steps,
        lr_scheduler_type="constant",
        save_steps=6,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    callbacks = [tiepolicy_hf.TiePolicyCallback()] if callbacks is None else callbacks
    return Trainer(model, arguments, train_dataset=Texts(), callbacks=callbacks, **options)


def llama(*, tied):
    torch.manual_seed(3)
    return tiny_llama(tie_word_embeddings=tied)
