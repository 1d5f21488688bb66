"""python benchmarks/bench_trainer.py, or torchrun --nproc-per-node=2 benchmarks/bench_trainer.py: whole training steps.

Alone: the trainer's step with the target's states at hand, the target's forward pass, and the two together, as a run
without a cache does them. Under torchrun: one process against all of them, data parallel and sharded. The target has
random weights; everything else is what `eagle3 train` runs, from a prepared batch to updated weights.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_eagle3 import Bench
from environment import environment
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from works import MODELS, WORKS, Work

from eagle3.config import DataConfig, ParallelConfig, RunConfig, TargetConfig, TrainConfig, UnrollConfig
from eagle3.data import Batch
from eagle3.features import Features
from eagle3.parallel import Ranks, joined
from eagle3.step import take_step
from eagle3.target import FrozenTarget
from eagle3.trainer import scorer_and_optimizer

#: Layers of the targets whose drafts are measured.
NUM_LAYERS = {"W8B": 32, "W1B": 16, "tiny": 4}


class StatesAtHand:
    """A target whose states lie on the device, as if they had been read ahead from a cache."""

    def __init__(self, bench: Bench) -> None:
        self.head_VE = bench.head_VE
        self.features = Features(aux_BTA=bench.aux, hidden_BTE=bench.hidden)

    def features_of(self, batch: Batch) -> Features:  # noqa: ARG002
        """The same for every batch."""
        return self.features


def run_config(work: Work, *, step: str | None = None, kind: Any = "data") -> RunConfig:
    """The settings of a run, as far as its steps depend on them."""
    train: Any = {} if step is None else {"step": step}
    return RunConfig(
        out="unused",
        target=TargetConfig(model="unused"),
        data=DataConfig(train="unused"),
        unroll=UnrollConfig(steps=work.steps),
        train=TrainConfig(**train),
        parallel=ParallelConfig(kind=kind),
    )


def training_step(bench: Bench, target: Any, config: RunConfig, ranks: Ranks) -> Callable[[], object]:
    """One optimizer step of the trainer on a batch that a worker process has prepared."""
    scorer, optimizer = scorer_and_optimizer(bench.draft, target, config=config, ranks=ranks)
    batch = Batch(input_ids_BT=bench.ids.cpu(), loss_mask_BT=bench.mask, documents_BT=bench.documents)
    if scorer.prepare is not None:
        batch = scorer.prepare(batch)

    def run() -> object:
        return take_step([batch], scorer=scorer, optimizer=optimizer, ranks=ranks, stop=False, seen=(0.5, 0.5))

    return run


def random_target(work: Work, device: torch.device, dtype: torch.dtype) -> FrozenTarget:
    """A Llama of the target's sizes with random weights."""
    model = MODELS[work.model]
    config = LlamaConfig(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=NUM_LAYERS[work.model],
        num_attention_heads=model.heads[0],
        num_key_value_heads=model.heads[1],
        head_dim=model.head_dim,
        vocab_size=model.vocab,
        max_position_embeddings=131072,
    )
    with torch.device(device):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    return FrozenTarget(causal_lm, tokenizer=tokenizer)


def milliseconds(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of a step, synchronised after each."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    times: list[float] = []
    # A fixed number, so that processes that exchange gradients take as many.
    first = time.perf_counter()
    step()
    wait()
    num_steps = max(10, min(200, int(seconds / (time.perf_counter() - first))))
    if dist.is_initialized():
        agreed = [num_steps]
        dist.broadcast_object_list(agreed)
        num_steps = agreed[0]
    for _ in range(num_steps):
        before = time.perf_counter()
        step()
        wait()
        times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)


def online(work: Work, ranks: Ranks, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """A step beside a live target, against the target and the draft alone."""
    bench = Bench(work, ranks.device, dtype)
    target = random_target(work, ranks.device, dtype)
    at_hand = StatesAtHand(bench)
    at_hand.head_VE = target.head_VE
    batch = Batch(input_ids_BT=bench.ids.cpu(), loss_mask_BT=bench.mask, documents_BT=bench.documents)
    alone = milliseconds(lambda: target.features_of(batch), ranks.device, seconds)
    draft = milliseconds(training_step(bench, at_hand, run_config(work), ranks), ranks.device, seconds)
    bench = Bench(work, ranks.device, dtype)
    both = milliseconds(training_step(bench, target, run_config(work), ranks), ranks.device, seconds)
    return {"target": alone, "draft": draft, "both": both, "ratio": both / (alone + draft)}


def spread(work: Work, ranks: Ranks, dtype: torch.dtype, seconds: float, *, kind: str) -> dict[str, float]:
    """All processes, each with a batch of its own, against one of them alone."""
    step = None if kind == "data" else "autograd"
    alone = replace(ranks, world_size=1, rank=0)
    result = {}
    for name, group, mode in (("one", alone, "data"), ("all", ranks, kind)):
        bench = Bench(work, ranks.device, dtype)
        run = training_step(bench, StatesAtHand(bench), run_config(work, step=step, kind=mode), group)
        result[name] = milliseconds(run, ranks.device, seconds)
        del bench, run
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    return {**result, "efficiency": result["one"] / result["all"]}


def main() -> int:
    """Print what was measured and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", nargs="*", type=int, default=[0, 2], help="indices into works.WORKS")
    parser.add_argument("--kinds", nargs="*", choices=["online", "data", "shard"])
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each measurement lasts at least")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    results = []
    with joined() as ranks:
        dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        for kind in options.kinds or (["online"] if ranks.world_size == 1 else ["data", "shard"]):
            for work in (WORKS[index] for index in options.lines):
                if kind == "online":
                    found = online(work, ranks, dtype, options.seconds)
                else:
                    found = spread(work, ranks, dtype, options.seconds, kind=kind)
                results.append({"work": work.name, "kind": kind, "processes": ranks.world_size, **found})
                if ranks.is_first:
                    print(work.name, kind, {name: round(value, 3) for name, value in found.items()}, flush=True)
        if options.out and ranks.is_first:
            text = json.dumps({"environment": environment(), "results": results}, indent=1)
            options.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
