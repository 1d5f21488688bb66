"""Checkpoints of transformers.Trainer under the callback: exact to resume, and no head lost to a flag."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

import tiepolicy
import tiepolicy_hf
from models import tiny_llama
from tiepolicy.errors import BrokenTieError

pytestmark = pytest.mark.filterwarnings("ignore")


class Texts(Dataset):
    """Random ids that are the same each time."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 96, (48, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(model, folder, *, max_steps=12, callbacks=None):
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
    return Trainer(model, arguments, train_dataset=Texts(), callbacks=callbacks)


def mixtral():
    torch.manual_seed(3)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=96,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            tie_word_embeddings=True,
        )
    )


def llama(*, tied):
    torch.manual_seed(3)
    return tiny_llama(tie_word_embeddings=tied)


@pytest.mark.parametrize("make", [lambda: llama(tied=True), lambda: llama(tied=False), mixtral])
def test_a_training_that_was_cut_and_resumed_ends_with_the_bits_of_one_that_was_not(make, tmp_path):
    whole = make()
    trainer(whole, tmp_path / "whole").train()
    first = make()
    trainer(first, tmp_path / "cut", max_steps=6).train()
    resumed = make()
    checkpoint = tiepolicy_hf.last_checkpoint(tmp_path / "cut")
    assert str(tmp_path / "cut" / "checkpoint-6") == checkpoint
    trainer(resumed, tmp_path / "cut").train(resume_from_checkpoint=checkpoint)
    expected = whole.state_dict()
    assert [] == [name for name, value in resumed.state_dict().items() if not torch.equal(expected[name], value)]
    assert tiepolicy.plan(whole) == tiepolicy.plan(resumed)


def test_today_resuming_a_model_whose_names_change_on_disk_loads_none_of_its_experts(tmp_path):
    first = mixtral()
    trainer(first, tmp_path, max_steps=6, callbacks=[]).train()
    torch.manual_seed(4)
    resumed = mixtral()
    nn.init.constant_(resumed.model.layers[0].mlp.experts.gate_up_proj, 7.0)
    trainer(resumed, tmp_path, max_steps=6, callbacks=[]).train(str(tmp_path / "checkpoint-6"))
    # One more step was trained, from what the model held before.
    assert 6.9 < resumed.model.layers[0].mlp.experts.gate_up_proj.min()


def test_a_head_apart_under_a_tie_flag_is_in_every_checkpoint_with_a_flag_that_says_so(tmp_path):
    model = llama(tied=True)
    model.lm_head = nn.Linear(16, 96, bias=False)
    trainer(model, tmp_path, max_steps=6).train()
    for loaded in (
        LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6"),
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path / "checkpoint-6"),
    ):
        assert torch.equal(model.lm_head.weight, loaded.lm_head.weight)
        assert not loaded.config.tie_word_embeddings


def test_a_tie_that_broke_before_training_stops_it(tmp_path):
    model = llama(tied=True)
    prepared = trainer(model, tmp_path, max_steps=6)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(BrokenTieError, match="were one tensor before the trainer prepared the model"):
        prepared.train()


def test_the_newest_checkpoint_that_was_finished_is_taken(tmp_path):
    trainer(llama(tied=True), tmp_path).train()
    assert str(tmp_path / "checkpoint-12") == tiepolicy_hf.last_checkpoint(tmp_path)
    # What the trainer leaves if it is killed after the weights of a later step: no plan in them yet.
    shutil.copytree(tmp_path / "checkpoint-12", tmp_path / "checkpoint-18")
    llama(tied=True).save_pretrained(tmp_path / "checkpoint-18")
    assert str(tmp_path / "checkpoint-12") == tiepolicy_hf.last_checkpoint(tmp_path)
    Path(tmp_path / "checkpoint-12" / "model.safetensors").unlink()
    assert str(tmp_path / "checkpoint-6") == tiepolicy_hf.last_checkpoint(tmp_path)
    assert tiepolicy_hf.last_checkpoint(tmp_path / "nowhere") is None


def test_what_the_trainer_keeps_beside_the_weights_stays(tmp_path):
    trainer(llama(tied=True), tmp_path, max_steps=6).train()
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors"} <= names
