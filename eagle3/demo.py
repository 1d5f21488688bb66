"""Step 39: the whole path in minutes: make a target, train a draft on it, stop the run, resume it, look."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tiepolicy
from eagle3.checkpoint import RunCheckpoints, read_draft_config, write_draft_config
from eagle3.draft import Draft
from eagle3.embedded import write_embedded_conversations, write_embedded_target
from eagle3.errors import ConfigError, Eagle3Error
from eagle3.parallel import Ranks
from eagle3.trainer import METRICS

logger = logging.getLogger("eagle3")

NUM_PROCESSES = 2
NUM_CONVERSATIONS = 600
DRAFT_VOCAB_SIZE = 512
#: Steps; the run is stopped at its first checkpoint and resumes from there.
CHECKPOINT_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demonstration.

    Args:
        out: Folder for the target, the conversations and the run; must not exist yet.
        seed: Of everything random.
    """

    out: str = "eagle3-demo"
    seed: int = 0


def run_demo(config: DemoConfig) -> None:
    """Make a target with tied embeddings, train a draft on it in two processes, stop them, resume, print a table.

    Raises:
        ConfigError: If the folder exists.
        Eagle3Error: If a training process fails.
    """
    out = Path(config.out)
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another --out, or delete it.")
    out.mkdir(parents=True)
    console = Console()
    started = time.monotonic()
    conversations, target, run = out / "conversations.jsonl", out / "target", out / "run"
    write_embedded_conversations(conversations, num_conversations=NUM_CONVERSATIONS, seed=config.seed)
    console.print(f"Teaching a small target on {NUM_CONVERSATIONS} conversations (about a minute) ...")
    write_embedded_target(target, conversations, seed=config.seed)
    settings = [
        *("--out", run, "--target.model", target, "--data.train", conversations, "--data.max_length", 256),
        *("--draft.vocab_size", DRAFT_VOCAB_SIZE, "--unroll.steps", 6, "--train.epochs", 2),
        *("--train.batch_size", 6, "--train.lr", 2e-3, "--train.seed", config.seed),
        *("--checkpoint.every_steps", CHECKPOINT_EVERY),
    ]
    console.print(f"Training a draft on it in {NUM_PROCESSES} processes, stopped at their first checkpoint ...")
    _train(settings, stop_at="Saved checkpoint to")
    console.print("Resuming, with the target's tie_word_embeddings copied into the draft's config as a trap ...")
    _inherit_flag(run)
    _train([*settings, "--checkpoint.restore_from", "LATEST"])
    _show(console, run, target, seconds=time.monotonic() - started)


def _train(settings: list[Any], *, stop_at: str | None = None) -> None:
    """Run `eagle3 train` under torchrun and show its lines; stop it when a line contains `stop_at`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
    threads = max(1, (os.cpu_count() or 1) // NUM_PROCESSES)
    lines = []
    with subprocess.Popen(
        [*command, "-m", "eagle3", "train", *map(str, settings)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            sys.stderr.write(line)
            if stop_at is not None and stop_at in line:
                # torchrun hands the signal on to the processes it started; killed, it would leave them training.
                process.send_signal(signal.SIGTERM)
                process.communicate()
                return
    if process.returncode != 0:
        raise Eagle3Error(f"A training process of the demo failed:\n{''.join(lines[-20:])}")


def _inherit_flag(run: Path) -> None:
    """Claim in the draft's config, as a copied config does, that its small head is its embedding."""
    config = read_draft_config(run)
    config.tie_word_embeddings = True
    write_draft_config(run, config)


def _show(console: Console, run: Path, target: Path, *, seconds: float) -> None:
    metrics = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    draft = Draft(read_draft_config(run))
    checkpoints = RunCheckpoints(run, Ranks(rank=0, world_size=1, device=torch.device("cpu")))
    folder = checkpoints.store.resolve("LATEST")
    checkpoints.store.load(folder, model=draft)
    table = Table("", "", show_header=False, title=f"eagle3 demo, {seconds:.0f} s")
    table.columns[1].overflow = "fold"  # paths are there to be copied
    table.add_row("weights of the target", _summary(_plan_of_target(target)))
    table.add_row("weights of the draft", _summary(tiepolicy.plan(draft)))
    table.add_row("loss, first and last", f"{metrics[0]['loss']:.3f}, {metrics[-1]['loss']:.3f}")
    table.add_row("accuracy of each step", "  ".join(f"{share:.2f}" for share in metrics[-1]["accuracy"]))
    table.add_row(
        "simulated accept length",
        f"{metrics[-1]['accept_length']:.2f} of {len(metrics[-1]['accuracy'])} drafted tokens",
    )
    table.add_row("target", str(target))
    table.add_row("checkpoint", str(folder))
    table.add_row("metrics", str(run / METRICS))
    console.print(table)


def _summary(plan: tiepolicy.TiePlan) -> str:
    ties = [
        f"{alias.name} is {group.canonical} {plan.tensors[alias.name].shape}: {alias.reason}"
        for group in plan.groups
        for alias in group.aliases
    ]
    saved = f"{len(plan.tensors)} tensors, {tiepolicy.format_bytes(plan.bytes_saved)} saved by ties"
    return "\n".join([saved, *ties, *(f"refused: {refusal}" for refusal in plan.refused)])


def _plan_of_target(target: Path) -> tiepolicy.TiePlan:
    from transformers import AutoModelForCausalLM

    return tiepolicy.plan(AutoModelForCausalLM.from_pretrained(target, local_files_only=True))
