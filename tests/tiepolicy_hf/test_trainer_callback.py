"""Checkpoints of transformers.Trainer under the callback: exact to resume, and no head lost to a flag."""

import copy
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import tiepolicy
import tiepolicy_hf
from hf_training import llama, trainer
from tiepolicy.errors import BrokenTieError
from tiepolicy.files import read_header
from torchrun import torchrun


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


@pytest.mark.parametrize(
    "make",
    [lambda: llama(tied=True), pytest.param(lambda: llama(tied=False), marks=pytest.mark.slow), mixtral],
    ids=["tied", "untied", "mixtral"],
)
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


def manifest_in(folder):
    return read_header(folder / "model.safetensors").metadata.get("tiepolicy")


def test_weights_are_written_once_with_their_plan(tmp_path):
    """Before the optimizer, as the trainer has it, and by nobody after it."""
    model = llama(tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weights = tmp_path / "checkpoint-6" / "model.safetensors"
    found = []
    optimizer.register_state_dict_pre_hook(
        lambda _: found.append((weights.stat(), manifest_in(weights.parent))) if weights.exists() else None
    )
    trainer(model, tmp_path, max_steps=6, optimizers=(optimizer, None)).train()
    [(before, manifest)], after = found, weights.stat()
    assert tiepolicy.plan(model) == tiepolicy.TiePlan.from_manifest(manifest)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_the_model_that_the_trainer_saves_in_the_end_has_its_plan_and_the_names_of_its_class(tmp_path):
    model = mixtral()
    trained = trainer(model, tmp_path, max_steps=6)
    trained.train()
    trained.save_model(str(tmp_path / "final"))
    assert tiepolicy.plan(model) == tiepolicy.TiePlan.from_manifest(manifest_in(tmp_path / "final"))
    names = read_header(tmp_path / "final" / "model.safetensors").tensors
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names
    assert (tmp_path / "final" / "training_args.bin").exists()


def test_a_copy_of_a_trained_model_saves_its_own_weights(tmp_path):
    model = llama(tied=True)
    trainer(model, tmp_path / "runs", max_steps=6).train()
    averaged = copy.deepcopy(model)
    nn.init.constant_(averaged.lm_head.weight, 2.0)
    averaged.save_pretrained(tmp_path / "averaged")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "averaged")
    assert {2.0} == set(loaded.model.embed_tokens.weight.flatten().tolist())


def test_options_of_save_pretrained_that_ours_has_not_are_answered_by_transformers(tmp_path):
    model = llama(tied=True)
    trainer(model, tmp_path / "runs", max_steps=6)
    model.save_pretrained(tmp_path / "variant", variant="fp32")
    assert (tmp_path / "variant" / "model.fp32.safetensors").exists()


def test_the_newest_checkpoint_that_was_finished_is_taken(tmp_path):
    trainer(llama(tied=True), tmp_path).train()
    assert str(tmp_path / "checkpoint-12") == tiepolicy_hf.last_checkpoint(tmp_path)
    # One that a trainer without the callback wrote has no plan.
    shutil.copytree(tmp_path / "checkpoint-12", tmp_path / "checkpoint-18")
    llama(tied=True).save_pretrained(tmp_path / "checkpoint-18")
    assert str(tmp_path / "checkpoint-12") == tiepolicy_hf.last_checkpoint(tmp_path)
    Path(tmp_path / "checkpoint-12" / "model.safetensors").unlink()
    assert str(tmp_path / "checkpoint-6") == tiepolicy_hf.last_checkpoint(tmp_path)
    assert tiepolicy_hf.last_checkpoint(tmp_path / "nowhere") is None


KILLED_AT_STEP_12 = """
import os, pathlib, signal, sys, torch
from hf_training import llama, trainer
model = llama(tied=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
checkpoint = pathlib.Path(sys.argv[1], "checkpoint-12")

def kill(_):
    if (checkpoint / "model.safetensors").exists() and not (checkpoint / "trainer_state.json").exists():
        os.kill(os.getpid(), signal.SIGKILL)

optimizer.register_state_dict_pre_hook(kill)
trainer(model, sys.argv[1], optimizers=(optimizer, None)).train()
"""


@pytest.mark.slow
def test_a_trainer_that_is_killed_between_weights_and_optimizer_resumes_from_the_checkpoint_before(tmp_path):
    """Also where an earlier run had finished a checkpoint of that name."""
    trainer(llama(tied=False), tmp_path).train()
    assert str(tmp_path / "checkpoint-12") == tiepolicy_hf.last_checkpoint(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_STEP_12, str(tmp_path)], env=environment, check=False)
    assert -signal.SIGKILL == killed.returncode
    assert tiepolicy.TiePlan.from_manifest(manifest_in(tmp_path / "checkpoint-12")).groups
    assert str(tmp_path / "checkpoint-6") == tiepolicy_hf.last_checkpoint(tmp_path)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_under_ddp_resume_to_the_bit_with_the_random_state_of_each(tmp_path):
    result = torchrun(Path(__file__).with_name("trained_ranks.py"), tmp_path, num_processes=2)
    assert 0 == result.returncode, result.stdout
    assert 2 == result.stdout.count("the same bits")
    names = {path.name for path in (tmp_path / "cut" / "checkpoint-6").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "trainer_state.json"} <= names


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_adapters_are_written_by_peft_and_found_again(tmp_path):
    adapted = get_peft_model(llama(tied=True), LoraConfig(target_modules=["q_proj"]))
    trainer(adapted, tmp_path, max_steps=6).train()
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert (True, False) == ("adapter_model.safetensors" in names, "model.safetensors" in names)
    assert str(tmp_path / "checkpoint-6") == tiepolicy_hf.last_checkpoint(tmp_path)


def test_what_the_trainer_keeps_beside_the_weights_stays(tmp_path):
    trainer(llama(tied=True), tmp_path, max_steps=6).train()
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors"} <= names
