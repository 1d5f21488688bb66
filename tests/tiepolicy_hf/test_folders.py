"""Folders as other tools write them, folders as an attacker would, and a folder that is saved over."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_torch_model
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import tiepolicy
import tiepolicy_hf
from models import tiny_llama
from tiepolicy import TiePlan
from tiepolicy.errors import CheckpointError, MissingTensorError, ObservationError, UntrustedCheckpointError
from tiepolicy.files import read_header

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"


def tied():
    return tiny_llama(tie_word_embeddings=True)


def same(a, b):
    b = b.state_dict()
    return [] == [name for name, value in a.state_dict().items() if not torch.equal(value, b[name])]


def is_tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight


def rewritten(folder, change):
    """Change what the one weights file of a folder holds."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def point_to(folder, path):
    """Make the index of a sharded folder name another file for one tensor."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][EMBED] = str(path)
    (folder / INDEX).write_text(json.dumps(index))


# What is written


def test_saving_changes_neither_the_model_nor_its_config(tmp_path):
    model = tied()
    model.config.tie_word_embeddings = False
    before = model.config.to_dict(), dict(model.state_dict(keep_vars=True))
    tiepolicy_hf.save_pretrained(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"]
    assert before[0] == model.config.to_dict()
    assert {name: id(tensor) for name, tensor in before[1].items()} == {
        name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()
    }


def test_the_tied_tensor_is_stored_once_under_the_name_that_tools_look_for(tmp_path):
    tiepolicy_hf.save_pretrained(tied(), tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert (True, False) == (EMBED in stored, HEAD in stored)


@pytest.mark.parametrize("max_shard_size", ["50GB", 4096])
def test_the_plan_lies_in_the_metadata_of_the_first_file(max_shard_size, tmp_path):
    model = tied()
    folder = tiepolicy_hf.save_pretrained(model, tmp_path / "model", max_shard_size=max_shard_size)
    first = min(folder.glob("*.safetensors"))
    assert tiepolicy.plan(model) == TiePlan.from_manifest(read_header(first).metadata["tiepolicy"])


def test_other_libraries_read_the_folder(tmp_path):
    model = tied()
    folder = tiepolicy_hf.save_pretrained(model, tmp_path / "model")
    by_safetensors, by_hub = tied(), tied()
    load_model(by_safetensors, folder / "model.safetensors")
    load_torch_model(by_hub, folder)
    assert same(model, by_safetensors)
    assert same(model, by_hub)
    assert same(model, AutoModelForCausalLM.from_pretrained(folder))


def test_a_gathered_state_of_clones_is_still_stored_once(tmp_path):
    model = tied()
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = tiepolicy_hf.save_pretrained(model, tmp_path / "model", state_dict=gathered)
    assert HEAD not in load_file(folder / "model.safetensors")


def test_a_state_without_one_of_the_tensors_is_not_saved(tmp_path):
    state = tied().state_dict()
    del state["model.norm.weight"]
    with pytest.raises(MissingTensorError, match="model.norm.weight .* is in the model but not in the state_dict"):
        tiepolicy_hf.save_pretrained(tied(), tmp_path / "model", state_dict=state)
    assert not (tmp_path / "model").exists()


def test_what_is_no_transformers_model_is_refused(tmp_path):
    with pytest.raises(ObservationError, match="Linear is no transformers model"):
        tiepolicy_hf.save_pretrained(nn.Linear(2, 2), tmp_path / "model")


def test_a_model_without_data_is_refused(tmp_path):
    with torch.device("meta"):
        model = tied()
    with pytest.raises(CheckpointError, match="is on the meta device and has no data to save"):
        tiepolicy_hf.save_pretrained(model, tmp_path / "model")


# Saving over a folder


def test_a_save_over_a_folder_leaves_no_file_of_the_old_model_and_all_others(tmp_path):
    folder = tmp_path / "model"
    tied().save_pretrained(folder, max_shard_size=4096)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("1")
    model = tied()
    tiepolicy_hf.save_pretrained(model, folder)
    written = {"config.json", "digests.json", "generation_config.json", "model.safetensors"}
    expected = {*written, "tokenizer.json", "runs"}
    assert expected == {path.name for path in folder.iterdir()}
    assert "1" == (folder / "runs" / "log").read_text()
    assert [folder] == list(tmp_path.iterdir())
    assert same(model, LlamaForCausalLM.from_pretrained(folder))


def test_a_save_that_fails_leaves_the_old_folder_as_it_was(tmp_path):
    model = tied()
    folder = tiepolicy_hf.save_pretrained(model, tmp_path / "model")
    other = tied()
    other.generation_config.temperature = 0.5  # refused without sampling, after config.json was written
    with pytest.raises(ValueError, match="temperature"):
        tiepolicy_hf.save_pretrained(other, folder)
    assert [folder] == list(tmp_path.iterdir())
    assert same(model, tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder))


@contextmanager
def files_of_at_most(num_bytes):
    """As on a disk that is full."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_is_named_with_the_folder_and_leaves_the_old_one(tmp_path):
    model = tied()
    folder = tiepolicy_hf.save_pretrained(model, tmp_path / "model")
    with files_of_at_most(4096), pytest.raises(CheckpointError, match=f"^{folder} could not be written: .*too large"):
        tiepolicy_hf.save_pretrained(tied(), folder)
    assert [folder] == list(tmp_path.iterdir())
    assert same(model, tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder))


SAVES_FOR_EVER = """
import sys, torch, tiepolicy_hf
from models import tiny_llama
model = tiny_llama(tie_word_embeddings=True)
value = 0
while True:
    value += 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    tiepolicy_hf.save_pretrained(model, sys.argv[1], max_shard_size=4096)
    print(value, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.004, 0.017])
def test_a_killed_save_leaves_one_whole_checkpoint(delay, tmp_path):
    """Under its name, or for the next save to find, if it was killed between its two renames."""
    folder = tmp_path / "model"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES_FOR_EVER, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    for _ in range(3):
        process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = folder if folder.exists() else tmp_path / ".model.replaced"
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, found)
    assert 1 == len({value for tensor in loaded.state_dict().values() for value in tensor.flatten().tolist()})
    tiepolicy_hf.save_pretrained(loaded, folder)
    assert [folder] == list(tmp_path.iterdir())


# Folders of transformers


@pytest.mark.parametrize("max_shard_size", ["50GB", 4096])
@pytest.mark.parametrize("tie", [True, False])
def test_a_folder_of_transformers_is_read(max_shard_size, tie, tmp_path):
    model = tiny_llama(tie_word_embeddings=tie)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = tiepolicy_hf.from_pretrained(AutoModelForCausalLM, tmp_path)
    assert same(model, loaded)
    assert tie is is_tied(loaded)


def test_both_names_with_equal_values_are_one_tensor(tmp_path):
    """As older versions and gathered states leave them."""
    tied().save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))
    assert is_tied(tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path))


def test_the_head_alone_is_enough(tmp_path):
    model = tied()
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: tensors.update({HEAD: tensors.pop(EMBED)}))
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path)
    assert same(model, loaded)
    assert is_tied(loaded)


@pytest.mark.parametrize("name", [HEAD, "model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_missing_tensor_is_an_error_and_never_random(name, tmp_path):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(MissingTensorError, match=f"^{name} .* is not in {tmp_path}, under its own name or an alias"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path)


def test_a_dtype_of_choice_is_handed_on(tmp_path):
    tied().save_pretrained(tmp_path)
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path, dtype=torch.bfloat16)
    assert torch.bfloat16 is loaded.dtype
    assert is_tied(loaded)


@pytest.mark.parametrize("option", ["ignore_mismatched_sizes", "weights_only", "use_safetensors"])
def test_what_would_let_something_be_lost_cannot_be_asked_for(option, tmp_path):
    with pytest.raises(TypeError, match=f"{option} cannot be given"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path, **{option: False})


# Pickles


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(folder, state_dict):
    tied().config.save_pretrained(folder)
    torch.save(state_dict, folder / "pytorch_model.bin")


def test_pickles_are_refused_unless_asked_for(tmp_path):
    model = tied()
    pickled(tmp_path, model.state_dict())
    with pytest.raises(
        CheckpointError, match=r"holds its weights as pytorch_model.bin, a pickle, .* allow_pickle=True"
    ):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path)
    loaded = tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path, allow_pickle=True)
    assert same(model, loaded)
    assert is_tied(loaded)


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    pickled(tmp_path, tied().state_dict() | {"extra": Payload(tmp_path / "ran")})
    with pytest.raises(
        UntrustedCheckpointError, match="pytorch_model.bin is damaged, or asks for more than reading tensors"
    ):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


# Paths and mixtures


@pytest.fixture
def outside(tmp_path):
    """A folder that is sharded, and a file beside it that it must not reach."""
    tied().save_pretrained(tmp_path / "model", max_shard_size=4096)
    save_file({EMBED: torch.zeros(96, 16)}, tmp_path / "secret.safetensors", metadata={"format": "pt"})
    return tmp_path / "model"


def test_today_transformers_follows_an_index_out_of_the_folder(outside):
    point_to(outside, "../secret.safetensors")
    assert 0 == LlamaForCausalLM.from_pretrained(outside).lm_head.weight.abs().sum()


@pytest.mark.parametrize("kind", ["parent", "root", "link", "windows"])
def test_no_index_leads_out_of_the_folder(kind, outside):
    secret = outside.parent / "secret.safetensors"
    (outside / "inside.safetensors").symlink_to(secret)
    path = {"parent": "../secret.safetensors", "root": secret, "link": "inside.safetensors", "windows": "C:\\secret"}
    point_to(outside, path[kind])
    with pytest.raises(UntrustedCheckpointError, match="a file outside the checkpoint. Nothing was loaded"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, outside)


def test_the_only_file_is_no_link_out_of_the_folder_either(tmp_path):
    tied().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UntrustedCheckpointError):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path / "model")


def test_a_shard_of_another_save_is_found(tmp_path):
    tied().save_pretrained(tmp_path, max_shard_size=4096)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[-1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match="which does not hold it: files of two saves lie in one folder"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path)


def test_a_file_that_was_changed_is_named_as_far_as_one_asks_and_free_to_change_without_digests(tmp_path):
    folder = tiepolicy_hf.save_pretrained(tied(), tmp_path / "model")

    def first_value(**options):
        return tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder, **options).model.norm.weight[0].item()

    before = read_header(folder / "model.safetensors")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(before.tensors["model.norm.weight"].start)
        file.write(struct.pack("<f", 3.5))
    with pytest.raises(CheckpointError, match="model.safetensors does not hold what was written"):
        first_value()
    assert [3.5, 3.5] == [first_value(verify="size"), first_value(verify="off")]
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match="config.json has .* bytes, but .* were written"):
        first_value(verify="size")
    assert 3.5 == first_value(verify="off")
    (folder / "digests.json").unlink()
    assert 3.5 == first_value()


def test_an_index_beside_a_single_file_is_two_checkpoints(tmp_path):
    tied().save_pretrained(tmp_path, max_shard_size=4096)
    tied().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="two checkpoints, of which loaders read one or the other"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path)


def test_a_cut_file_is_found(tmp_path):
    tied().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="the file was cut"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [((), "holds no weights: neither model.safetensors nor model.safetensors.index.json"), (None, "is no folder")],
)
def test_what_is_no_checkpoint_is_said_to_be_none(files, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, tmp_path if files is not None else tmp_path / "absent")
