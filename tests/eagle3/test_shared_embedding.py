"""The embedding is the target's: once in memory, in no checkpoint, and taken from the target again by its digest."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import eagle3.trainer
import tiepolicy
import tiepolicy_dcp
from eagle3.blueprint import read_draft_config
from eagle3.config import DraftConfig
from eagle3.draft import Draft
from eagle3.errors import CheckpointError, DraftError
from eagle3.export import export
from eagle3.finished import open_run
from eagle3.inputs import write_cache
from eagle3.trainer import train
from eagle3_runs import ALONE, config_of, make_run_world, metrics_of, weights_of
from eagle3_targets import make_target
from tiepolicy.errors import MissingTensorError
from tiepolicy.files import read_sharded_metadata


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_run_world(tmp_path_factory.mktemp("world"))


def on_target(config, **settings):
    return dataclasses.replace(config, target=dataclasses.replace(config.target, **settings))


def elements_of(folder):
    """How many elements a checkpoint's files hold of each tensor of the draft, by its name."""
    tensors = read_sharded_metadata(folder).tensors
    return {name.removeprefix("model."): math.prod(tensor.spec.shape) for name, tensor in tensors.items()}


def same(expected, actual):
    return [True] * len(expected) == [torch.equal(expected[name], actual[name]) for name in actual]


@pytest.mark.parametrize(
    ("step", "dtype", "cached"),
    [
        ("autograd", "float32", False),
        ("autograd", "bfloat16", True),
        ("fused", "bfloat16", False),
        ("fused", "float32", True),
    ],
)
def test_a_run_keeps_no_embedding_and_resumes_bit_by_bit(world, tmp_path, cached, dtype, step):
    """Of a tied target, whose embedding is its head as well; live, and of states from disk."""
    settings = {"dtype": dtype, "cache": str(tmp_path / "states") if cached else None}

    def config(name, **options):
        made = config_of(world, tmp_path / name, every_steps=3, save_consolidated=True, train={"step": step}, **options)
        return on_target(made, **settings)

    if cached:
        write_cache(config("whole"), ALONE)
    train(config("whole"), ALONE)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "epoch_1_step_3", tmp_path / "cut/checkpoints/epoch_1_step_3")
    shutil.copy(tmp_path / "whole" / "draft_config.json", tmp_path / "cut")
    train(config("cut", restore_from="epoch_1_step_3"), ALONE)
    expected, actual = (weights_of(tmp_path / name, "epoch_2_step_10") for name in ("whole", "cut"))
    assert same(expected, actual)
    assert metrics_of(tmp_path / "whole")[-4:] == metrics_of(tmp_path / "cut")[-4:]

    folder = tmp_path / "whole" / "checkpoints" / "epoch_2_step_10"
    assert 600 * 32 not in elements_of(folder).values()
    assert "embed_tokens.weight" not in load_file(folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    (tie,) = tiepolicy.TiePlan.from_manifest(manifest).external
    stored = AutoModelForCausalLM.from_pretrained(world[0], dtype=getattr(torch, dtype)).lm_head.weight
    assert ("target:embed_tokens.weight", tiepolicy.content_digest(stored.detach())) == (tie.source, tie.digest)


def test_training_holds_the_embedding_once(world, tmp_path, monkeypatch):
    """Draft and target have one tensor of its size between them, from the first step to the last."""
    runs = []
    go = eagle3.trainer._Run.go
    monkeypatch.setattr(eagle3.trainer._Run, "go", lambda run: (runs.append(run), go(run)))
    for options in ({"epochs": 1}, {"restore_from": "LATEST"}):
        train(config_of(world, tmp_path, **options), ALONE)
        run = runs[-1]
        assert run.state.draft.embed_tokens.weight is run.target.embedding_VE is run.target.head_VE
        assert torch.float32 == run.state.draft.lm_head.weight.dtype
        plan = tiepolicy.plan(run.state.draft, external=run.state.external)
        assert "external-owner" == plan.verdict("embed_tokens.weight", "target:embed_tokens.weight").reason


def test_a_finished_run_is_opened_beside_its_targets_embedding(world, tmp_path):
    train(config_of(world, tmp_path / "run", epochs=1), ALONE)
    trained = open_run(tmp_path / "run", checkpoint="LATEST")
    assert trained.draft.embed_tokens.weight is trained.target.embedding_VE
    assert same(weights_of(tmp_path / "run", "epoch_1_step_5"), trained.draft.state_dict())
    export(trained, tmp_path / "export", kind="speculators")
    exported = load_file(tmp_path / "export" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(trained.target.embedding_VE.bfloat16(), exported)


def test_a_draft_of_another_width_keeps_its_own_in_the_checkpoint(world, tmp_path):
    config = dataclasses.replace(config_of(world, tmp_path, epochs=1), draft=DraftConfig(vocab_size=96, hidden_size=16))
    train(config, ALONE)
    assert 600 * 16 == elements_of(tmp_path / "checkpoints" / "epoch_1_step_5")["embed_tokens.weight"]
    resumed = dataclasses.replace(config_of(world, tmp_path, restore_from="LATEST"), draft=config.draft)
    train(resumed, ALONE)
    assert (600, 16) == tuple(open_run(tmp_path, checkpoint="LATEST").draft.embed_tokens.weight.shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_target_with_one_other_row_is_refused(world, tmp_path, dtype):
    """A row that the short digest of a target does not look at."""
    train(on_target(config_of(world, tmp_path / "run", epochs=1), dtype=dtype), ALONE)
    other = tmp_path / "target"
    shutil.copytree(world[0], other)
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"][1] += 1.0
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    resumed = on_target(config_of((other, world[1]), tmp_path / "run", restore_from="LATEST"), dtype=dtype)
    with pytest.raises(CheckpointError, match=r"holds a draft of another target: the embedding or the"):
        train(resumed, ALONE)
    with pytest.raises(CheckpointError, match=r"another target: the embedding or the head differs\. Give the target"):
        open_run(tmp_path / "run", checkpoint="LATEST", target=str(other))


def test_a_target_with_another_vocabulary_is_refused(world, tmp_path):
    train(config_of(world, tmp_path / "run", epochs=1), ALONE)
    other = make_target(tmp_path / "target", world[0], vocab_size=640, tie_word_embeddings=True)
    with pytest.raises(DraftError, match=r"embedding has shape \(640, 32\), but .* describes \(600, 32\)"):
        train(config_of((other, world[1]), tmp_path / "run", restore_from="LATEST"), ALONE)


def test_a_checkpoint_without_its_target_says_whose_embedding_it_needs(world, tmp_path):
    train(config_of(world, tmp_path, epochs=1), ALONE)
    draft = Draft(read_draft_config(tmp_path))
    with pytest.raises(MissingTensorError, match="weight is not stored, as it belongs to the model 'target'"):
        tiepolicy_dcp.load(tmp_path / "checkpoints" / "epoch_1_step_5", model=draft)
