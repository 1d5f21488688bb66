"""What a run will take, against runs that took it."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from eagle3.cli import main
from eagle3.commands import EstimateConfig
from eagle3.config import RunConfig
from eagle3.errors import ConfigError
from eagle3.estimate import estimate
from eagle3.options import read_settings, shipped_configs
from eagle3.speed import FP8
from eagle3_targets import make_target, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target and twelve conversations."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, conversations = make_world(folder, num_conversations=12)
    return make_target(folder / "target", tokenizer, vocab_size=600, tie_word_embeddings=True), conversations


def arguments(world, folder, *options):
    target, conversations = world
    required = ["--out", folder / "run", "--target.model", target, "--data.train", conversations]
    small = ["--data.max_length", 40, "--draft.vocab_size", 96, "--unroll.steps", 2, "--train.batch_size", 5]
    return [str(argument) for argument in [*required, *small, *options]]


def estimate_of(world, folder, *options, num_processes=1):
    return estimate(read_settings(RunConfig, arguments(world, folder, *options)), num_processes=num_processes)


def test_parameters_are_those_of_the_models(world, tmp_path):
    result = estimate_of(world, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(world[0])
    assert sum(parameter.numel() for parameter in model.parameters()) == result.target_parameters
    width, vocab = 32, 96
    layer = 2 * width * (32 + 16 + 16) + 32 * width + 3 * width * 64
    assert 3 * width * width + layer + 4 * width + vocab * width == result.trainable_parameters
    assert 600 * width == result.frozen_parameters
    assert (1, 2, 3) == result.target_layers


def test_nothing_but_the_config_is_needed(world, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(world[0] / "config.json", tmp_path / "bare")
    result = estimate_of((tmp_path / "bare", tmp_path / "no-such-file.jsonl"), tmp_path)
    assert estimate_of(world, tmp_path).memory == result.memory
    assert (None, None, None) == (result.data, result.num_steps, result.cache_bytes)


def test_steps_disk_and_coverage_are_those_of_the_run_once_tokens_were_counted(world, tmp_path, capfd):
    given = arguments(world, tmp_path, "--train.epochs", 3, "--train.accumulate", 2, "--target.cache", tmp_path / "c")
    guessed = estimate(read_settings(RunConfig, given), num_processes=1)
    assert 0 == main(["vocab", *given])
    result = estimate(read_settings(RunConfig, given), num_processes=1)
    assert (False, True) == (guessed.data.is_counted, result.data.is_counted)
    assert 0 == main(["cache", *given])
    assert 0 == main(["train", *given])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == result.num_steps == guessed.num_steps == 6
    shards = sum(path.stat().st_size for path in (tmp_path / "c").rglob("shard-*"))
    assert result.cache_bytes == pytest.approx(shards, rel=0.02)
    (folder,) = (tmp_path / "run" / "checkpoints").glob("epoch_3_step_6")
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    # Beside the tensors a checkpoint has a header of a few kilobytes for each.
    assert result.checkpoint_bytes <= written <= result.checkpoint_bytes + 45 * 4096
    assert f"{result.data.coverage:.2%} of what the assistant wrote" in capfd.readouterr().err


def test_sharding_divides_what_the_optimizer_holds(world, tmp_path):
    whole = estimate_of(world, tmp_path, num_processes=4).memory
    sharded = estimate_of(world, tmp_path, "--parallel.kind", "shard", num_processes=4).memory
    for name in ("master weights (float32)", "moments of AdamW (float32)"):
        assert whole[name] == 4 * sharded[name]
    assert whole["weights of the target"] == sharded["weights of the target"]


def test_a_cache_leaves_embedding_and_head_of_the_target(world, tmp_path):
    memory = estimate_of(world, tmp_path, "--target.cache", tmp_path / "states").memory
    assert 4 * 600 * 32 == memory["weights of the target"]


@pytest.mark.parametrize("options", [[], ["--processes", "8", "--data.packing", "--parallel.kind", "shard"]])
def test_the_table_fits_a_hundred_columns(world, tmp_path, capfd, options):
    assert 0 == main(["estimate", *arguments(world, tmp_path, *options)])
    output = capfd.readouterr().out
    assert 100 == max(len(line) for line in output.splitlines())
    for words in ("trainable", "memory", "optimizer steps", "disk per checkpoint", "disk for a cache"):
        assert words in output


def test_json_is_for_programs(world, tmp_path, capfd):
    assert 0 == main(["estimate", *arguments(world, tmp_path, "--json", "--processes", "2")])
    entry = json.loads(capfd.readouterr().out)
    assert (2, 12) == (entry["processes"], entry["data"]["num_conversations"])
    assert sum(entry["memory"].values()) == entry["memory_total"]


def test_fp8_takes_less_time_and_the_estimate_says_by_how_much(world, tmp_path, capfd):
    plain = estimate_of(world, tmp_path)
    assert 0 == main(["estimate", *arguments(world, tmp_path, "--json", "--train.fp8")])
    entry = json.loads(capfd.readouterr().out)
    assert plain.step_seconds > entry["step_seconds"]
    assert f"Products in FP8 {FP8:g} times as fast as in bfloat16 (as measured)." in entry["assumes"]


def test_a_draft_vocabulary_larger_than_the_targets_is_one_sentence(world, tmp_path, capfd):
    assert 2 == main(["estimate", *arguments(world, tmp_path, "--draft.vocab_size", "601")])
    expected = "eagle3: error: draft.vocab_size is 601, but the draft's vocabulary must be a part of the target's, "
    assert capfd.readouterr().err.startswith(expected)


def test_data_without_a_conversation_is_one_sentence(world, tmp_path, capfd):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert 2 == main(["estimate", *arguments(world, tmp_path, "--data.train", tmp_path / "empty.jsonl")])
    assert capfd.readouterr().err.startswith(f"eagle3: error: {tmp_path}/empty.jsonl holds no conversation. Each line")


def test_no_processes_are_refused():
    with pytest.raises(ConfigError, match=r"processes is 0, but must be at least 1\."):
        read_settings(EstimateConfig, ["--out", "x", "--target.model", "y", "--data.train", "z", "--processes", "0"])


#: Widths from the public config files of these models, and their parameters.
PUBLIC = {
    "llama-3.2-1b.yaml": (
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    "llama-3.1-8b.yaml": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
        8_030_261_248,
    ),
    "qwen3-8b.yaml": (
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False},
        8_190_735_360,
    ),
}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_config_that_comes_with_the_package_fits_its_target(tmp_path, name):
    """Of the target only the config is there: these are many gigabytes."""
    fields, num_parameters = PUBLIC[name]
    kind = "qwen3" if name.startswith("qwen") else "llama"
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = {"model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"], "rope_parameters": rope, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = read_settings(RunConfig, ["--config", name, "--target.model", str(tmp_path), "--out", str(tmp_path)])
    result = estimate(settings, num_processes=1)
    assert num_parameters == result.target_parameters
    assert 0.1e9 < result.trainable_parameters < 0.5e9
    # Each fits the GPU that its first line names.
    assert sum(result.memory.values()) < (24e9 if "1b" in name else 80e9)


def test_a_draft_of_llama_3_1_8b_has_the_parameters_that_its_shapes_give(tmp_path):
    """Fuse, q/k/v, o, MLP, four norms, and a head over 32000 tokens."""
    fields, _ = PUBLIC["llama-3.1-8b.yaml"]
    config = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = read_settings(
        RunConfig, ["--config", "llama-3.1-8b.yaml", "--target.model", str(tmp_path), "--out", str(tmp_path)]
    )
    width = 4096
    layer = 2 * width * (32 + 8 + 8) * 128 + 32 * 128 * width + 3 * width * 14336
    expected = 3 * width * width + layer + 4 * width + 32000 * width
    assert expected == estimate(settings, num_processes=1).trainable_parameters == 424_689_664


def test_every_public_target_has_a_config():
    assert sorted([*PUBLIC, "embedded.yaml"]) == shipped_configs()
