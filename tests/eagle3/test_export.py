"""Exported folders: their names and fields, that they read back as the draft, and what is refused."""

import importlib.util
import json
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import eagle3.export
from eagle3.cli import main
from eagle3.config import CheckpointConfig, DraftConfig, TrainConfig
from eagle3.errors import ConfigError, DraftError, ExportError
from eagle3.export import ExportedDraft, export, plain_config, speculators_config
from eagle3.finished import open_run
from eagle3.unroll import TrainingTimeTest, plan_rows
from eagle3_targets import make_run, make_target, make_world
from tiepolicy.errors import CheckpointError

LAYER = {
    "input_layernorm.weight": (32,),
    "hidden_norm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
    "self_attn.q_proj.weight": (32, 64),
    "self_attn.k_proj.weight": (16, 64),
    "self_attn.v_proj.weight": (16, 64),
    "self_attn.o_proj.weight": (32, 32),
    "mlp.gate_proj.weight": (64, 32),
    "mlp.up_proj.weight": (64, 32),
    "mlp.down_proj.weight": (32, 64),
}
OUTER = {"fc.weight": (32, 96), "norm.weight": (32,)}
SHRUNK = {"lm_head.weight": (96, 32), "d2t": (96,), "t2d": (600,)}
NORMS = {"fc_norm.0.weight": (32,), "fc_norm.1.weight": (32,), "fc_norm.2.weight": (32,)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tied target, conversations, and runs that were trained on them, by name."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, conversations = make_world(folder, num_conversations=4)
    target = make_target(folder / "target", tokenizer, vocab_size=600, tie_word_embeddings=True)
    drafts = {
        "shrunk": DraftConfig(vocab_size=96),
        "whole": DraftConfig(vocab_size=None),
        "narrow": DraftConfig(vocab_size=96, hidden_size=16),
        "newer": DraftConfig(vocab_size=96, norm_before_residual=True, fc_norm=True, norm_output=True),
        "joint": DraftConfig(vocab_size=96, norm_before_fc=True),
    }
    for name, draft in drafts.items():
        make_run(folder / name, target, conversations, draft=draft)
    return folder


def exported(world, run, out, *, kind="plain"):
    """The folder's config, and its tensors."""
    export(open_run(world / run, checkpoint="LATEST"), out, kind=kind)
    assert {"config.json", "model.safetensors"} == {path.name for path in out.iterdir()}
    return json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("run", "kind", "layer", "others"),
    [
        ("shrunk", "plain", "midlayer.", SHRUNK),
        ("whole", "plain", "midlayer.", {"lm_head.weight": (600, 32)}),
        ("newer", "plain", "midlayer.", SHRUNK | NORMS),
        ("joint", "plain", "midlayer.", SHRUNK | {"input_norm.weight": (96,)}),
        ("shrunk", "speculators", "layers.0.", SHRUNK | {"embed_tokens.weight": (600, 32)}),
        ("whole", "speculators", "layers.0.", {"lm_head.weight": (600, 32), "embed_tokens.weight": (600, 32)}),
        ("newer", "speculators", "layers.0.", SHRUNK | NORMS | {"embed_tokens.weight": (600, 32)}),
    ],
)
def test_a_file_holds_what_engines_need_and_cannot_take_from_the_target(world, tmp_path, run, kind, layer, others):
    _, tensors = exported(world, run, tmp_path / "export", kind=kind)
    assert OUTER | {layer + name: shape for name, shape in LAYER.items()} | others == shapes(tensors)
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    expected = {"d2t": torch.int64, "t2d": torch.bool}
    assert {name: expected.get(name, torch.bfloat16) for name in kinds} == kinds


def test_a_draft_of_another_width_brings_its_embedding(world, tmp_path):
    config, tensors = exported(world, "narrow", tmp_path / "export")
    assert ((600, 16), (16, 96), (96, 16)) == tuple(
        tuple(tensors[name].shape) for name in ("embed_tokens.weight", "fc.weight", "lm_head.weight")
    )
    assert (16, 32) == (config["hidden_size"], config["target_hidden_size"])
    with pytest.raises(ConfigError, match=r"16 wide and its target 32.*Export it with --format plain"):
        exported(world, "narrow", tmp_path / "other", kind="speculators")
    assert ["export"] == [path.name for path in tmp_path.iterdir()]


def test_the_vocabulary_is_stored_as_offsets(world, tmp_path):
    _, tensors = exported(world, "shrunk", tmp_path / "export")
    target_ids = torch.arange(96) + tensors["d2t"]
    assert torch.equal(tensors["t2d"].nonzero().flatten(), target_ids)
    assert torch.equal(open_run(world / "shrunk", checkpoint="LATEST").draft.target_ids(), target_ids)


def test_a_plain_config_says_what_both_engines_read(world, tmp_path):
    """As vLLM 0.32.0 reads it, which was run on such a folder, and SGLang 0.5.23, whose source was read."""
    config, _ = exported(world, "newer", tmp_path / "export")
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "vocab_size": 600,
        "draft_vocab_size": 96,
        "target_hidden_size": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": True,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        # Of four layers the inputs of 1, 2 and 3 are read: in vLLM's words those ids, in SGLang's one less.
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
    }
    assert expected == {key: config.get(key) for key in expected}


def test_a_stretched_rope_is_what_older_and_newer_readers_find(world):
    """By two fields or by one, as transformers reads both."""
    trained = open_run(world / "shrunk", checkpoint="LATEST")
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
    trained.draft.config.rope_parameters = rope
    config = plain_config(trained)
    older = LlamaConfig(rope_theta=config["rope_theta"], rope_scaling=config["rope_scaling"])
    assert rope == config["rope_parameters"]
    assert rope.items() <= older.rope_parameters.items()


def test_a_draft_that_sglang_would_misread_is_exported_with_a_word_on_it(world, tmp_path, capsys, monkeypatch):
    """Its layer (SGLang 0.5.23, `srt/models/llama_eagle3.py`) takes the residual before the norm, whatever is said."""
    monkeypatch.setenv("COLUMNS", "1000")
    for run, kind, said in [("newer", "plain", True), ("newer", "speculators", False), ("shrunk", "plain", False)]:
        assert 0 == main(["export", str(world / run), "--out", str(tmp_path / f"{run}-{kind}"), "--format", kind])
        assert said == ("For vLLM alone: SGLang (0.5.23) passes over norm_before_res" in capsys.readouterr().out)


@pytest.mark.parametrize(("given", "is_folder"), [("target", True), ("hub/name", False)])
def test_a_target_that_is_a_folder_is_found_from_any_other(world, tmp_path, monkeypatch, given, is_folder):
    monkeypatch.chdir(world)
    trained = replace(open_run("shrunk", checkpoint="LATEST"), target_folder=given)
    own = speculators_config(trained)["speculators_config"]["verifier"]
    assert (str(world / "target") if is_folder else given) == own["name_or_path"]


def test_a_speculators_config_says_what_the_library_reads(world, tmp_path):
    """And vLLM 0.32.0, `transformers_utils/configs/speculators/`, which was run on such a folder."""
    config, _ = exported(world, "shrunk", tmp_path / "export", kind="speculators")
    assert ["Eagle3Speculator"] == config["architectures"]
    assert ("eagle3", 96, 32, False) == tuple(
        config[key] for key in ("speculators_model_type", "draft_vocab_size", "target_hidden_size", "norm_output")
    )
    assert [1, 2, 3] == config["eagle_aux_hidden_state_layer_ids"]
    assert ("llama", 600, 1) == tuple(
        config["transformer_layer_config"][key] for key in ("model_type", "vocab_size", "num_hidden_layers")
    )
    own = config["speculators_config"]
    assert ("eagle3", "greedy", 3) == (
        own["algorithm"],
        own["default_proposal_method"],
        own["proposal_methods"][0]["speculative_tokens"],
    )
    assert 0.0 == own["proposal_methods"][0]["accept_tolerance"]
    assert {"name_or_path": str(world / "target"), "architectures": ["LlamaForCausalLM"]} == own["verifier"]


@pytest.mark.parametrize("kind", ["plain", "speculators"])
@pytest.mark.parametrize("run", ["shrunk", "newer", "joint", "whole"])
def test_each_weight_of_the_file_counts_in_what_is_read_back(world, tmp_path, run, kind):
    """The comparison that guards an export sees every tensor: change one, and the logits are others."""
    _, tensors = exported(world, run, tmp_path / "export", kind=kind)
    trained = open_run(world / run, checkpoint="LATEST")
    ids, aux = [5, 6, 7, 8], torch.randn(4, 96, generator=torch.Generator().manual_seed(0))

    def logits():
        read = ExportedDraft(tmp_path / "export", target_embedding_VH=trained.target.embedding_VE.detach())
        return read.chain_logits(ids, aux, num_steps=3)

    expected = logits()
    for name in sorted(set(tensors) - {"t2d"}):
        # The offsets decide which embedding the next step reads; the others are scaled.
        changed = tensors[name] + 1 if name == "d2t" else tensors[name] * 1.5
        save_file(tensors | {name: changed}, tmp_path / "export" / "model.safetensors")
        assert not torch.allclose(expected, logits()), name


def test_an_export_that_does_not_read_back_is_not_published(world, tmp_path, monkeypatch):
    tensors_of = eagle3.export._tensors

    def forget_a_norm(draft, *, kind):
        return tensors_of(draft, kind=kind) | {"norm.weight": torch.ones(32, dtype=torch.bfloat16) * 2}

    monkeypatch.setattr(eagle3.export, "_tensors", forget_a_norm)
    with pytest.raises(ExportError, match="does not read back as the draft: logits differ by"):
        exported(world, "shrunk", tmp_path / "export")
    assert [] == list(tmp_path.iterdir())


def test_a_draft_with_nan_is_not_published(world, tmp_path):
    trained = open_run(world / "shrunk", checkpoint="LATEST")
    with torch.no_grad():
        trained.draft.fc.weight[0, 0] = torch.nan
    with pytest.raises(ExportError, match="NaN"):
        export(trained, tmp_path / "export", kind="plain")
    assert [] == list(tmp_path.iterdir())


def test_the_command_exports_a_finished_run(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    out = tmp_path / "new" / "export"
    assert 0 == main(["export", str(world / "shrunk"), "--out", str(out), "--format", "speculators"])
    assert f"to {out} (speculators); read back with equal logits." in capsys.readouterr().out
    assert 2 == main(["export", str(world / "shrunk"), "--out", str(out)])
    assert f"{out} exists already; choose another --out, or delete it." in capsys.readouterr().err


@pytest.mark.parametrize(("place", "num_bytes"), [("draft", 4096), ("file/draft", None)])
def test_an_export_that_finds_no_room_or_folder_is_a_sentence_and_leaves_nothing(
    world, tmp_path, capsys, place, num_bytes
):
    (tmp_path / "file").touch()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes or hard, hard))
    try:
        assert 2 == main(["export", str(world / "shrunk"), "--out", str(tmp_path / place)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert capsys.readouterr().err.startswith(f"eagle3: error: {tmp_path / place} cannot be written: ")
    assert ["file"] == [path.name for path in tmp_path.iterdir()]


def test_an_unfinished_run_is_exported_only_by_the_name_of_a_checkpoint(world, tmp_path, capsys):
    run = tmp_path / "run"
    train = TrainConfig(epochs=1, batch_size=1, lr=1e-3)
    checkpoint = CheckpointConfig(every_steps=2)
    chats = world / "conversations.jsonl"
    make_run(run, world / "target", chats, draft=DraftConfig(vocab_size=96), train=train, checkpoint=checkpoint)
    shutil.rmtree(run / "checkpoints" / "epoch_1_step_4")
    (run / "checkpoints" / "LATEST").write_text("epoch_1_step_2\n")
    assert 2 == main(["export", str(run), "--out", str(tmp_path / "export")])
    assert (
        f"eagle3: error: The run {run} is not finished: its last checkpoint, epoch_1_step_2, was written when 0 of 1 "
        "epochs were completed. Finish it with --checkpoint.restore_from LATEST, or export it as it is with "
        "--checkpoint epoch_1_step_2."
    ) == capsys.readouterr().err.splitlines()[-1]
    assert 0 == main(["export", str(run), "--out", str(tmp_path / "export"), "--checkpoint", "epoch_1_step_2"])


def test_a_folder_without_a_run_or_a_checkpoint_is_refused(world, tmp_path):
    with pytest.raises(ConfigError, match=r"run_config\.json, cannot be read .*started with as its --out"):
        open_run(tmp_path, checkpoint="LATEST")
    run = tmp_path / "run"
    shutil.copytree(world / "shrunk", run, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_run(run, checkpoint="LATEST")


def test_a_target_that_does_not_fit_is_refused(world, tmp_path):
    sizes = {"vocab_size": 640, "tie_word_embeddings": True}
    other = make_target(tmp_path / "larger", world / "tokenizer", **sizes)
    with pytest.raises(DraftError, match=r"embedding has shape \(640, 32\), but .* \(600, 32\) .*Give the target"):
        open_run(world / "shrunk", checkpoint="LATEST", target=str(other))
    weights = load_file(world / "target" / "model.safetensors")
    shutil.copytree(world / "target", tmp_path / "changed")
    weights["model.embed_tokens.weight"] += 1
    save_file(weights, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(eagle3.errors.CheckpointError, match="holds a draft of another target: the embedding or"):
        open_run(world / "shrunk", checkpoint="LATEST", target=str(tmp_path / "changed"))


@pytest.mark.skipif(importlib.util.find_spec("speculators") is None, reason="the speculators library is not installed")
# It is slow without a compiler, says torch of the library's attention.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("run", ["shrunk", "newer", "joint", "whole"])
def test_the_speculators_library_loads_its_format_and_drafts_the_same(world, tmp_path, run):
    from speculators import SpeculatorModel  # type: ignore[import-not-found]

    exported(world, run, tmp_path / "export", kind="speculators")
    model = SpeculatorModel.from_pretrained(tmp_path / "export").float()
    stored, loaded = load_file(tmp_path / "export" / "model.safetensors"), model.state_dict()
    assert [] == [name for name, tensor in stored.items() if not torch.equal(tensor, loaded[name].to(tensor.dtype))]

    trained = open_run(world / run, checkpoint="LATEST")
    draft, num_steps = trained.draft.bfloat16().float(), 3
    ids_BT = torch.randint(600, (1, 129), generator=torch.Generator().manual_seed(0))
    aux_BTA = trained.target.features(ids_BT).aux_BTA
    states_SNH = TrainingTimeTest(draft, num_steps=num_steps)._unroll(
        ids_BT, aux_BTA, plan_rows(torch.ones_like(ids_BT), num_steps)
    )
    expected_SN = draft.lm_head(states_SNH).argmax(dim=-1)
    with torch.no_grad():
        # In its row stands the token behind that of the state; it goes on with the true tokens, as training does.
        actual = model(aux_BTA[:, :-1], ids_BT[:, 1:], torch.zeros(1, 128, dtype=torch.long), ttt_steps=num_steps)
    for step in range(num_steps):
        rows = 128 - step
        assert expected_SN[step, :rows].tolist() == actual[step][0, :rows].tolist()
