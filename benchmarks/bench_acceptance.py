"""python benchmarks/bench_acceptance.py [--seeds 0 1] [--out results.json]: what `train.fp8` costs in accepted tokens.

Teaches the demo's target, trains a draft on it for each seed in bfloat16 and in FP8, on the same data in the same
order, and measures both on conversations that neither saw. On a CPU, FP8 is float32 with its rounding imitated.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from environment import environment

from eagle3.config import DataConfig, DraftConfig, LogConfig, RunConfig, TargetConfig, TrainConfig, UnrollConfig
from eagle3.embedded import write_embedded_conversations, write_embedded_target
from eagle3.parallel import Ranks
from eagle3.trainer import train


def accept_length(world: Path, *, device: torch.device, epochs: int, seed: int, fp8: bool) -> float:
    """The simulated accept length of a draft on the validation data, of 6 tokens."""
    out = world / f"run-{seed}-{'fp8' if fp8 else 'plain'}"
    config = RunConfig(
        out=str(out),
        target=TargetConfig(model=str(world / "target")),
        data=DataConfig(
            train=str(world / "train.jsonl"), validation=str(world / "validation.jsonl"), max_length=256, packing=True
        ),
        draft=DraftConfig(vocab_size=512),
        unroll=UnrollConfig(steps=6),
        train=TrainConfig(epochs=epochs, batch_size=12, lr=4e-3, step="fused", fp8=fp8, seed=seed, log_every=1000),
        log=LogConfig(tensorboard=False),
    )
    train(config, Ranks(rank=0, world_size=1, device=device))
    return float(json.loads((out / "validation.jsonl").read_text().splitlines()[-1])["accept_length"])


def main() -> int:
    """Print both for each seed, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=600)
    parser.add_argument("--target-steps", type=int, help="that teach the target; the demo's number if not given")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        for name, seed, number in (("train", 0, options.conversations), ("validation", 1, 64)):
            write_embedded_conversations(world / f"{name}.jsonl", num_conversations=number, seed=seed)
        steps = {} if options.target_steps is None else {"num_steps": options.target_steps}
        write_embedded_target(world / "target", world / "train.jsonl", seed=0, **steps)
        for seed in options.seeds:
            plain, fp8 = (
                accept_length(world, device=device, epochs=options.epochs, seed=seed, fp8=fp8) for fp8 in (False, True)
            )
            results.append({"seed": seed, "plain": plain, "fp8": fp8})
            print(f"seed {seed}: {plain:.3f} of 6 without FP8, {fp8:.3f} with it ({fp8 / plain - 1:+.2%})", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
