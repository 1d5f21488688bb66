"""Runs that start from a draft that exists: with its weights and its vocabulary, or with a sentence why not."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eagle3.cli import main
from eagle3.config import DraftConfig
from eagle3.data import BatchOrder, batches
from eagle3.errors import CheckpointError, ConfigError, DraftError
from eagle3.export import export
from eagle3.finished import open_run
from eagle3.inputs import open_inputs
from eagle3.trainer import train
from eagle3_reference import Shape, reference
from eagle3_runs import ALONE, config_of, make_run_world, metrics_of, weights_of
from eagle3_targets import make_target

DRAFTS = {
    "shrunk": DraftConfig(vocab_size=96),
    "whole": DraftConfig(vocab_size=None),
    "narrow": DraftConfig(vocab_size=96, hidden_size=16, intermediate_size=24),
    "newer": DraftConfig(vocab_size=96, norm_before_residual=True, fc_norm=True, norm_output=True),
}
#: A learning rate at which no weight moves, as float32 rounds.
STANDSTILL = 1e-30
LAYERS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tied target, ten conversations, and a finished run with its exports in both formats."""
    folder = tmp_path_factory.mktemp("world")
    make_run_world(folder)
    make_draft(folder, "shrunk")
    return folder


@pytest.fixture(scope="module")
def drafts(world):
    """The same folder with all of `DRAFTS`."""
    for name in set(DRAFTS) - {"shrunk"}:
        make_draft(world, name)
    return world


def make_draft(world, name):
    conversations = world / "conversations.jsonl"
    config = config_of(
        (world / "target", conversations), world / name, epochs=1, batch_size=10, validation=conversations
    )
    train(dataclasses.replace(config, draft=DRAFTS[name]), ALONE)
    trained = open_run(world / name, checkpoint="LATEST")
    for kind in ("plain",) if name == "narrow" else ("plain", "speculators"):
        export(trained, world / f"{name}-{kind}", kind=kind)


def from_draft(world, out, source, *, target=None, draft=None, **options):
    """Settings of a run that starts from a draft; `draft` has what else is said of it."""
    paths = (target or world / "target", world / "conversations.jsonl")
    config = config_of(paths, out, **({"epochs": 1, "batch_size": 10} | options))
    return dataclasses.replace(config, draft=DraftConfig(init_from=str(source), **(draft or {})))


def changed(source, out, *, config=None, tensors=None, lacks=()):
    """A copy of an exported folder with other fields and tensors."""
    shutil.copytree(source, out)
    content = json.loads((out / "config.json").read_text())
    weights = load_file(out / "model.safetensors")
    for name in lacks:
        content.pop(name, None)
        weights.pop(name, None)
    (out / "config.json").write_text(json.dumps(content | (config or {})))
    save_file(weights | (tensors or {}), out / "model.safetensors")
    return out


def same(expected, actual):
    return dict.fromkeys(expected, True) == {
        name: name in expected and torch.equal(expected[name], actual[name]) for name in actual
    }


@pytest.mark.slow
@pytest.mark.parametrize("source", ["shrunk", "shrunk/checkpoints/epoch_1_step_1", "newer", "narrow/checkpoints/BEST"])
def test_the_first_loss_is_the_last_one_of_the_run_it_starts_from(drafts, tmp_path, source):
    train(from_draft(drafts, tmp_path, drafts / source), ALONE)
    expected = metrics_of(drafts / source.split("/")[0], "validation.jsonl")[-1]
    (first,) = metrics_of(tmp_path)
    assert pytest.approx(expected["loss"], rel=1e-6) == first["loss"]
    assert expected["accuracy"] == first["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["shrunk-plain", "whole-speculators", "newer-speculators"])
def test_the_first_loss_is_what_the_exported_file_gives_in_float64(drafts, tmp_path, source):
    """By the slow reference, which reads the file's tensors, over the features that transformers gives."""
    config = from_draft(drafts, tmp_path, drafts / source)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=20))
    train(config, ALONE)
    tensors = {
        n.replace("layers.0.", "midlayer."): t for n, t in load_file(drafts / source / "model.safetensors").items()
    }
    model = AutoModelForCausalLM.from_pretrained(drafts / "target", dtype=torch.float64)
    head = model.lm_head.weight.detach()
    tensors = {"embed_tokens.weight": head, "d2t": torch.zeros(600, dtype=torch.int64)} | tensors
    weights = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    flags = json.loads((drafts / source / "config.json").read_text())
    norms = {name: flags[name] for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")}
    inputs = open_inputs(config, device=torch.device("cpu"))
    order = BatchOrder(inputs.data.num_rows, batch_size=10, rank=0, world_size=1, seed=0)
    (batch,) = batches(inputs.data, order=order, epoch=0, pad_id=0)
    with torch.no_grad():
        states = model.model(batch.input_ids_BT, output_hidden_states=True)
    # Of four layers the inputs of 1, 2 and 3 are read.
    result = reference(
        weights,
        Shape(4, 2, 8, 1e-6, 10000.0, **norms),
        input_ids=batch.input_ids_BT,
        loss_mask=batch.loss_mask_BT,
        aux=torch.cat(states.hidden_states[1:4], dim=-1),
        hidden=states.last_hidden_state,
        head=head,
        num_steps=3,
        decay=0.8,
    )
    (first,) = metrics_of(tmp_path)
    assert pytest.approx(float(result.loss_sum) / result.weight_sum, rel=1e-5) == first["loss"]
    hits = [hit / supervised for hit, supervised in zip(result.hits, result.supervised, strict=True)]
    assert hits == pytest.approx(first["accuracy"])


def test_a_run_that_learns_nothing_exports_the_file_it_started_from(world, tmp_path):
    """From either format into either, and from the run: every byte of every tensor, every field of the config."""
    learn_nothing(world, tmp_path, "shrunk")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "narrow", "newer"])
def test_so_does_a_draft_of_any_kind(drafts, tmp_path, name):
    learn_nothing(drafts, tmp_path, name)


def learn_nothing(world, tmp_path, name):
    for source in (f"{name}-plain", f"{name}-speculators", name):
        if not (world / source).exists():
            continue
        out = tmp_path / source
        train(from_draft(world, out, world / source, lr=STANDSTILL), ALONE)
        for kind in ("plain", "speculators"):
            expected = world / f"{name}-{kind}"
            if expected.exists():
                export(open_run(out, checkpoint="LATEST"), out / kind, kind=kind)
                files = [load_file(folder / "model.safetensors") for folder in (expected, out / kind)]
                assert same(*files)
                before, after = (json.loads((folder / "config.json").read_text()) for folder in (expected, out / kind))
                assert before == after
    assert same(weights_of(world / name, "epoch_1_step_1"), weights_of(tmp_path / name, "epoch_1_step_1"))


@pytest.mark.slow
def test_a_resumed_run_no_longer_needs_the_draft_it_started_from(world, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(world / "shrunk-plain", source)

    def config(name, **options):
        return from_draft(world, tmp_path / name, source, epochs=2, batch_size=2, every_steps=3, **options)

    train(config("whole"), ALONE)
    assert str(source) == json.loads((tmp_path / "whole" / "run_config.json").read_text())["draft"]["init_from"]
    shutil.copytree(tmp_path / "whole/checkpoints/epoch_1_step_3", tmp_path / "cut/checkpoints/epoch_1_step_3")
    shutil.copy(tmp_path / "whole" / "draft_config.json", tmp_path / "cut")
    shutil.rmtree(source)
    train(config("cut", restore_from="epoch_1_step_3"), ALONE)
    assert metrics_of(tmp_path / "whole")[3:] == metrics_of(tmp_path / "cut")
    assert same(*(weights_of(tmp_path / name, "epoch_2_step_10") for name in ("whole", "cut")))
    other = dataclasses.replace(config("cut", restore_from="LATEST"), draft=DraftConfig(vocab_size=96))
    with pytest.raises(
        CheckpointError, match=r"shaped its weights: draft.init_from .*/source -> None, draft.vocab_size"
    ):
        train(other, ALONE)


@pytest.mark.slow
def test_a_file_as_other_trainers_write_it_is_read_as_engines_read_it(world, tmp_path, caplog):
    """No flags, no t2d, one key with SGLang's layers, tokens by frequency, and a rope and heads of its own."""
    tensors = load_file(world / "shrunk-plain" / "model.safetensors")
    ids = (torch.arange(96) + tensors["d2t"]).flip(0)
    own = {
        "d2t": ids - torch.arange(96),
        "lm_head.weight": tensors["lm_head.weight"].flip(0),
        "midlayer.self_attn.k_proj.weight": torch.randn(32, 64),
        "midlayer.self_attn.v_proj.weight": torch.randn(32, 64),
    }
    fields = {
        "num_key_value_heads": 4,
        "rope_theta": 77.0,
        "eagle_config": {LAYERS: [-1, 0, 2]},
        "target_hidden_size": None,
    }
    lacks = ("t2d", LAYERS, "rope_parameters", "norm_output", "fc_norm", "norm_before_fc", "norm_before_residual")
    source = changed(world / "shrunk-plain", tmp_path / "source", config=fields, tensors=own, lacks=lacks)
    train(from_draft(world, tmp_path / "run", source, lr=STANDSTILL), ALONE)
    assert f"Draft taken over from {source}, with its rope {{'rope_theta': 77.0" in caplog.text
    kept = weights_of(tmp_path / "run", "epoch_1_step_1")
    assert same(own, {name: kept[name].to(own[name].dtype) for name in own})
    assert sorted(ids.tolist()) == kept["t2d"].nonzero().flatten().tolist()
    export(open_run(tmp_path / "run", checkpoint="LATEST"), tmp_path / "export", kind="plain")
    again = json.loads((tmp_path / "export" / "config.json").read_text())
    assert ([0, 1, 3], 77.0, 4) == (again[LAYERS], again["rope_theta"], again["num_key_value_heads"])


@pytest.mark.slow
def test_beside_another_target_the_draft_gets_the_embedding_of_that(world, tmp_path, caplog):
    """The log says so where there is something to tell it by."""
    target = tmp_path / "target"
    shutil.copytree(world / "target", target)
    weights = load_file(target / "model.safetensors")
    weights["model.embed_tokens.weight"] += 1.0
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    for source in ("shrunk-plain", "shrunk-speculators", "shrunk"):
        caplog.clear()
        train(from_draft(world, tmp_path / source, world / source, target=target, lr=STANDSTILL), ALONE)
        sentence = f"The draft in {world / source} was trained beside another target; it gets the embedding of this"
        assert (source != "shrunk-plain") == (sentence in caplog.messages)
        kept = weights_of(tmp_path / source, "epoch_1_step_1")
        assert torch.equal(weights["model.embed_tokens.weight"], kept["embed_tokens.weight"])
        assert torch.equal(
            kept["fc.weight"].bfloat16(), load_file(world / "shrunk-plain/model.safetensors")["fc.weight"]
        )


@pytest.mark.slow
def test_the_draft_of_a_run_goes_on_beside_its_target_in_another_dtype(world, tmp_path, caplog):
    config = from_draft(world, tmp_path, world / "shrunk", dtype="bfloat16", lr=STANDSTILL)
    train(config, ALONE)
    assert "beside another target" not in caplog.text
    kept, begun = weights_of(tmp_path, "epoch_1_step_1"), weights_of(world / "shrunk", "epoch_1_step_1")
    assert torch.bfloat16 == kept.pop("embed_tokens.weight").dtype
    assert same({name: begun[name] for name in kept}, kept)


@pytest.mark.parametrize(
    ("draft", "found"),
    [
        ({"vocab_size": 64}, "draft_vocab_size 96, not 64"),
        ({"vocab_size": None}, "draft_vocab_size 96, not 600"),
        ({"hidden_size": 16}, "hidden_size 32, not 16"),
        ({"intermediate_size": 16}, "intermediate_size 64, not 16"),
        ({"fc_norm": True, "norm_output": True}, "fc_norm False, not True; norm_output False, not True"),
        ({"norm_before_residual": True}, "norm_before_residual False, not True"),
    ],
)
def test_settings_that_the_draft_does_not_have_are_refused(world, tmp_path, draft, found):
    with pytest.raises(DraftError) as caught:
        train(from_draft(world, tmp_path, world / "shrunk-plain", draft=draft), ALONE)
    assert (
        f"The draft in {world / 'shrunk-plain'} has {found}, as the settings or this trainer need it. Leave out what "
        "is set, to follow the draft, or choose another."
    ) == str(caught.value)
    assert not (tmp_path / "draft_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shrunk", "whole", "narrow", "newer"])
def test_settings_that_the_draft_has_may_be_said_again(drafts, tmp_path, name):
    said = dataclasses.asdict(DRAFTS[name])
    del said["init_from"]
    train(from_draft(drafts, tmp_path, drafts / name, draft=said), ALONE)
    assert 1 == len(metrics_of(tmp_path))


def test_other_layers_than_the_draft_reads_are_refused(world, tmp_path):
    config = from_draft(world, tmp_path, world / "shrunk-plain")
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, layers=(0, 1, 2)))
    with pytest.raises(DraftError, match=rf"has {LAYERS} \[1, 2, 3\], not \[0, 1, 2\], as the settings"):
        train(config, ALONE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "shape"), [({"vocab_size": 640}, (640, 32)), ({"vocab_size": 600, "hidden_size": 48}, (600, 48))]
)
def test_a_draft_of_a_target_of_another_shape_is_refused(drafts, tmp_path, target, shape):
    made = make_target(tmp_path / "target", drafts / "tokenizer", tie_word_embeddings=True, **target)
    for source in ("narrow-plain", "narrow"):
        with pytest.raises(DraftError) as caught:
            train(from_draft(drafts, tmp_path / "run", drafts / source, target=made), ALONE)
        assert (
            f"The target's embedding has shape {shape}, but the draft's config describes (600, 32) (vocab_size, "
            "target_hidden_size). Give the target that the draft was made for."
        ) == str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"config": {"num_hidden_layers": 2}},
            "source has num_hidden_layers 2, not 1, as the settings or this trainer",
        ),
        ({"config": {"hidden_act": "gelu"}}, "source has hidden_act gelu, not silu, as the settings or this trainer"),
        (
            {"config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}},
            "source/config.json rotate only a part of each head (partial_rotary_factor 0.5), which a",
        ),
        (
            {"lacks": ["fc.weight"]},
            'Missing key(s) in state_dict: "fc.weight".). Get it whole, in one model.safe',
        ),
        ({"lacks": ["lm_head.weight"]}, 'Missing key(s) in state_dict: "lm_head.weight".'),
        ({"lacks": ["d2t"]}, 'Missing key(s) in state_dict: "d2t".'),
        (
            {"tensors": {"midlayer.self_attn.q_proj.bias": torch.ones(32)}},
            'Unexpected key(s) in state_dict: "midlayer.se',
        ),
        ({"tensors": {"norm.weight": torch.ones(8)}}, "size mismatch for norm.weight: copying a param with shape"),
        ({"config": {"num_attention_heads": 8}}, "size mismatch for midlayer.self_attn.q_proj.weight: copying a param"),
        ({"config": {"fc_norm": True}}, 'Missing key(s) in state_dict: "fc_norm.0.weight", "fc_norm.1.weight"'),
        ({"tensors": {"d2t": torch.full((96,), 600)}}, "source does not name 96 tokens of the target. Choose another"),
        (
            {"tensors": {"d2t": -torch.arange(96)}},
            "source does not name 96 tokens of the target. Choose another draft.",
        ),
        ({"config": {"hidden_size": "wide"}}, "source/config.json cannot be read (Validation error for field"),
    ],
)
def test_a_file_that_is_no_such_draft_is_refused(world, tmp_path, change, sentence):
    source = changed(world / "shrunk-plain", tmp_path / "source", **change)
    with pytest.raises(DraftError) as caught:
        train(from_draft(world, tmp_path / "run", source), ALONE)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "draft_config.json").exists()


def test_a_folder_without_a_draft_is_refused(world, tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(DraftError) as caught:
        train(from_draft(world, tmp_path / "run", nowhere), ALONE)
    assert (
        f"The draft's config {nowhere}/config.json cannot be read (No such file or directory). Give the --out of a "
        "run, a checkpoint of one, or a folder that engines load."
    ) == str(caught.value)
    source = tmp_path / "source"
    shutil.copytree(world / "shrunk-plain", source)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(DraftError, match=r"does not hold the draft .* \(No such file.*\)\. Get it whole, in one mo"):
        train(from_draft(world, tmp_path / "run", source), ALONE)


def test_a_vocabulary_that_holds_too_little_of_the_new_data_is_refused(world, tmp_path):
    with pytest.raises(ConfigError, match="The draft's 96 tokens are only .* below draft.min_coverage"):
        train(from_draft(world, tmp_path, world / "shrunk-plain", draft={"min_coverage": 1.0}), ALONE)


def test_commands_before_a_run_know_the_draft_it_will_start_from(world, tmp_path, capsys):
    given = ["--target.model", str(world / "target"), "--data.train", str(world / "conversations.jsonl")]
    given += ["--out", str(tmp_path / "run"), "--draft.init_from", str(world / "shrunk")]
    assert 0 == main(["estimate", *given, "--json"])
    estimated = json.loads(capsys.readouterr().out)
    weights = open_run(world / "shrunk", checkpoint="LATEST").draft.parameters()
    assert sum(weight.numel() for weight in weights if weight.requires_grad) == estimated["trainable_parameters"]
    assert 2 == main(["vocab", *given])
    sentence = "The vocabulary is that of draft.init_from. Train, and the log says how much it holds."
    assert f"eagle3: error: {sentence}\n" == capsys.readouterr().err
