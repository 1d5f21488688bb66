"""Memory and time that are predicted, beside those that were measured on a GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eagle3.blueprint import draft_config
from eagle3.config import DataConfig, DraftConfig, RunConfig, TargetConfig, TrainConfig, UnrollConfig
from eagle3.draft import Draft
from eagle3.forecast import Forecast
from eagle3.speed import ASSUMED, DEVICES, Supervision, TargetSizes, sizes_of, step_seconds
from eagle3.tokens import EncodedData, Example
from eagle3.unroll import plan_rows

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MEASURED, MEASURED_FP8 = (json.loads((RESULTS / name).read_text()) for name in ("eagle3.json", "eagle3_fp8.json"))
#: The models of benchmarks/works.py: config of the target, draft vocabulary.
MODELS = {
    "W8B": ({"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128}, 32000),
    "W1B": ({"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}, 8192),
}
#: What was measured there of our own step; the rest are other programs.
KINDS = ("ours", "known argmax", "deterministic", "fp8", "autograd")
MEASURED_LINES = [*MEASURED["results"], *(line for line in MEASURED_FP8["results"] if line["kind"] == "fp8")]
LINES = [line for line in MEASURED_LINES if line["kind"] in KINDS and line["work"]["model"] in MODELS]
TOLERANCE = 0.15


def name_of(line):
    work = line["work"]
    size = f"{work['model']}-{work['sequences']}x{work['tokens']}-{work['steps']}-{work['supervised']}"
    return f"{size}-{line['kind'].replace(' ', '-')}"


def setting_of(line):
    """The run that a line of the benchmark is a step of: config, models on the meta device, supervision."""
    work, (widths, draft_vocab) = line["work"], MODELS[line["work"]["model"]]
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 4, "vocab_size": 128256}
    target_config = LlamaConfig(**widths, **heads, tie_word_embeddings=False)
    config = RunConfig(
        out="unused",
        # Without its layers: the benchmark has the target's states.
        target=TargetConfig(model="unused", dtype="bfloat16", cache="unused"),
        data=DataConfig(train="unused", max_length=work["tokens"], packing=work.get("mean_document") is not None),
        draft=DraftConfig(vocab_size=draft_vocab),
        unroll=UnrollConfig(steps=work["steps"]),
        train=TrainConfig(
            batch_size=work["sequences"],
            step="autograd" if line["kind"] == "autograd" else None,
            fp8=line["kind"] == "fp8",
        ),
    )
    with torch.device("meta"):
        draft = Draft(draft_config(target_config, draft_vocab_size=draft_vocab, options=config.draft))
        target = LlamaForCausalLM(target_config)
    supervision = Supervision(
        share=work["supervised"],
        mean_span=work["mean_span"],
        mean_conversation=work.get("mean_document"),
        is_counted=True,
    )
    return config, draft, target, supervision


def seconds_of(line):
    config, draft, target, supervision = setting_of(line)
    forecast = Forecast(config, draft, target, num_processes=1)
    if line["kind"] == "known argmax":
        return forecast.seconds(DEVICES["h200"], supervision, row_length=config.data.max_length)
    # The whole head runs, but no layer before it.
    none = TargetSizes(num_weights=0, num_layers=0, queries=0, is_float32=False)
    sizes = sizes_of(config, draft.config, supervision, row_length=config.data.max_length)
    return step_seconds(sizes, DEVICES["h200"], target=none, is_fused=forecast.is_fused, is_fp8=config.train.fp8)


def is_graphed(line):
    """Of a step that replays a CUDA graph, torch does not count what lives within it."""
    config, draft, _, supervision = setting_of(line)
    sizes = sizes_of(config, draft.config, supervision, row_length=config.data.max_length)
    return line["kind"] != "autograd" and 6 * sizes.num_weights * sizes.num_pairs < 1.1e13


def test_the_benchmark_was_run_on_the_device_whose_shares_are_stated():
    assert DEVICES["h200"].name == MEASURED["environment"]["gpu"]
    assert DEVICES["h200"].is_measured
    assert {"ours", "known argmax"} <= {line["kind"] for line in LINES}


@pytest.mark.parametrize("line", LINES, ids=name_of)
def test_the_time_of_a_step_is_what_was_measured(line):
    predicted, measured = 1e3 * seconds_of(line), line["ms"]
    print(f"{name_of(line)}: predicted {predicted:.1f} ms, measured {measured:.1f} ms, {predicted / measured - 1:+.1%}")
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("line", [line for line in LINES if not is_graphed(line)], ids=name_of)
def test_the_memory_of_a_step_is_what_was_measured(line):
    config, draft, target, supervision = setting_of(line)
    forecast = Forecast(config, draft, target, num_processes=1)
    predicted, measured = sum(forecast.memory(supervision).values()) / 2**30, line["peak_gib"]
    print(f"{name_of(line)}: predicted {predicted:.2f} GiB, measured {measured:.2f}, {predicted / measured - 1:+.1%}")
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


def test_supervision_is_counted_in_the_tokens():
    """Two spans in a conversation of 8 tokens, and one that is a whole conversation."""
    masks = [[0, 1, 1, 1, 0, 0, 1, 0], [1, 1]]
    examples = tuple(
        Example(input_ids=torch.arange(len(mask)), loss_mask=torch.tensor(mask, dtype=torch.bool)) for mask in masks
    )
    counted = Supervision.of(EncodedData(examples=examples, num_dropped=0, num_truncated=0))
    assert Supervision(share=0.6, mean_span=2.0, mean_conversation=5.0, is_counted=True) == counted


@pytest.mark.parametrize("line", LINES[:1], ids=name_of)
def test_rows_and_pairs_are_about_those_of_a_real_mask(line):
    """Of spans as long as assumed, with gaps that give the share."""
    config, draft, _, _ = setting_of(line)
    config = replace(config, data=replace(config.data, max_length=20_000))
    sizes = sizes_of(config, draft.config, ASSUMED, row_length=20_000)
    places = torch.arange(20_000) % round(ASSUMED.mean_span / ASSUMED.share)
    mask = (places >= round(ASSUMED.mean_span * (1 / ASSUMED.share - 1)))[None]
    plan = plan_rows(mask, config.unroll.steps)
    assert sizes.num_rows == pytest.approx(plan.rows_N.numel(), rel=0.02)
    assert sizes.num_pairs == pytest.approx(int(plan.supervised_SN.sum()), rel=0.02)
