"""Step 39: the whole path in minutes: a target, a draft trained on it, killed and resumed, measured and exported."""

import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

import tiepolicy
from eagle3.blueprint import read_draft_config, write_draft_config
from eagle3.checkpoint import owners_of
from eagle3.commands import DemoConfig, EvaluateConfig, Format
from eagle3.embedded import write_embedded_conversations, write_embedded_target
from eagle3.errors import ConfigError, Eagle3Error
from eagle3.evaluate import Evaluation, evaluate, write_evaluation
from eagle3.export import export
from eagle3.files import naming_disk_errors
from eagle3.finished import TrainedDraft, open_run
from eagle3.report import read_runs, write_report
from eagle3.terminal import say, show, waiting

logger = logging.getLogger("eagle3")

NUM_PROCESSES = 2
NUM_CONVERSATIONS = 600
DRAFT_VOCAB_SIZE = 512
#: Tokens that the draft proposes in a row.
DEPTH = 6
#: Steps; with so many conversations half of the run, in its second epoch: it is killed there and resumed.
CHECKPOINT_EVERY = 75
#: Other conversations than the draft was trained on; their questions are the prompts.
NUM_PROMPTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paths:
    conversations: Path
    prompts: Path
    target: Path
    run: Path
    exports: dict[Format, Path]


def run_demo(config: DemoConfig) -> None:
    """Make a target with tied embeddings, train a draft on it in two processes, kill them, resume, measure, export.

    Raises:
        ConfigError: If the folder exists.
        Eagle3Error: If the folder cannot be written, or a training process fails.
    """
    out = Path(config.out)
    if out.exists():
        raise ConfigError(f"{out} exists already, perhaps of a demo that was cut; delete it, or choose another --out.")
    paths = _Paths(
        conversations=out / "conversations.jsonl",
        prompts=out / "prompts.jsonl",
        target=out / "target",
        run=out / "run",
        exports={"plain": out / "export", "speculators": out / "export-speculators"},
    )
    started = time.monotonic()
    say(f"Teaching a small target on {NUM_CONVERSATIONS} conversations (about a minute) ...\n")
    with naming_disk_errors(out), waiting("Teaching"):
        out.mkdir(parents=True)
        _make_world(paths, seed=config.seed)
    settings = _settings(paths, seed=config.seed)
    say(f"Training a draft on it in {NUM_PROCESSES} processes, killed half-way ...\n")
    _train(settings, kill_at=f"epoch_2_step_{CHECKPOINT_EVERY}")
    say("Resuming, with the target's tie_word_embeddings copied into the draft's config as a trap ...\n")
    _inherit_flag(paths.run)
    _train([*settings, "--checkpoint.restore_from", "LATEST"])
    say("Writing answers with the target alone and with the draft, and exporting ...\n")
    table = _measure_and_export(paths)
    table.title = f"eagle3 demo, {time.monotonic() - started:.0f} s"
    show(table)


def _measure_and_export(paths: _Paths) -> Table:
    trained = open_run(paths.run, checkpoint="LATEST")
    target_plan = tiepolicy.plan(trained.target.model)
    draft_plan = tiepolicy.plan(trained.draft, external=owners_of(trained.target), digests=True)
    for kind, folder in paths.exports.items():
        export(trained, folder, kind=kind)
    evaluation = _evaluate(trained, paths)
    picture, page = write_report(read_runs([str(paths.run)]), paths.run.parent)
    table = _table(evaluation)
    table.add_section()
    table.add_row("weights of the target", _summary(target_plan))
    table.add_row("weights of the draft", _summary(draft_plan))
    table.add_section()
    table.add_row("checkpoint", str(trained.checkpoint))
    table.add_row("plot", f"{picture}\n{page}")
    table.add_row("export", "\n".join(f"{folder} ({kind})" for kind, folder in paths.exports.items()))
    return table


def _make_world(paths: _Paths, *, seed: int) -> None:
    write_embedded_conversations(paths.conversations, num_conversations=NUM_CONVERSATIONS, seed=seed)
    write_embedded_conversations(paths.prompts, num_conversations=2 * NUM_PROMPTS, seed=seed + 1)
    write_embedded_target(paths.target, paths.conversations, seed=seed)


def _settings(paths: _Paths, *, seed: int) -> list[str]:
    settings = {
        "out": paths.run,
        "target.model": paths.target,
        "data.train": paths.conversations,
        "data.max_length": 256,
        "draft.vocab_size": DRAFT_VOCAB_SIZE,
        "unroll.steps": DEPTH,
        "train.epochs": 3,
        "train.batch_size": 6,
        # Far above what a real run takes: there are few steps, and the draft is narrow.
        "train.lr": 4e-3,
        "train.seed": seed,
        "checkpoint.every_steps": CHECKPOINT_EVERY,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def _train(settings: list[str], *, kill_at: str | None = None) -> None:
    """Run `eagle3 train` under torchrun and show its lines; kill it when a line contains `kill_at`.

    The kill leaves it no time for anything. Its processes end soon after it, and only then is its output closed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
    threads = max(1, (os.cpu_count() or 1) // NUM_PROCESSES)
    killed = False
    with subprocess.Popen(  # noqa: S603 - this interpreter, with the demo's own settings
        [*command, "-m", "eagle3", "train", *settings],
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                sys.stderr.write(line)
                if kill_at is not None and kill_at in line and not killed:
                    process.kill()
                    killed = True
        except KeyboardInterrupt:
            process.kill()  # or it trains on, unseen
            raise
    if killed != (kill_at is not None) or (process.returncode != 0 and not killed):
        raise Eagle3Error("A training process of the demo failed; its lines above say why.")


def _inherit_flag(run: Path) -> None:
    """Claim in the draft's config, as a copied config does, that its small head is its embedding."""
    config = read_draft_config(run)
    config.tie_word_embeddings = True
    write_draft_config(run, config)


def _evaluate(trained: TrainedDraft, paths: _Paths) -> Evaluation:
    settings = EvaluateConfig(run=str(paths.run), data=str(paths.prompts), num_prompts=NUM_PROMPTS, max_new_tokens=96)
    evaluation = evaluate(trained, settings)
    write_evaluation(paths.run, evaluation)
    return evaluation


def _table(found: Evaluation) -> Table:
    table = Table("", "", show_header=False)
    table.columns[1].overflow = "fold"  # paths are there to be copied
    of = f"of {found.num_drafted} drafted tokens"
    greedy, sampled = found.greedy, found.sampled
    table.add_row("accept length, simulated", f"{found.simulated:.2f} {of}")
    table.add_row("accept length, real", f"{greedy.accept_length:.2f} {of}; {sampled.accept_length:.2f} sampled")
    table.add_row("tokens per target pass", f"{greedy.tokens_per_pass:.2f}; {sampled.tokens_per_pass:.2f} sampled")
    table.add_row("speed-up over generate", f"{greedy.speed_up:.2f} times; {sampled.speed_up:.2f} sampled")
    identical = f"{found.num_identical} of {found.num_prompts} answers token by token"
    table.add_row("identical greedy output", identical + (f". {found.difference}" if found.difference else ""))
    return table


def _summary(plan: tiepolicy.TiePlan) -> str:
    ties = [
        f"{alias.name} is {group.canonical} {plan.tensors[alias.name].shape}: {alias.reason}"
        for group in plan.groups
        for alias in group.aliases
    ]
    ties += [f"{tie.name} is {tie.source} {tie.shape}: {tiepolicy.Reason.EXTERNAL_OWNER}" for tie in plan.external]
    saved = f"{len(plan.tensors)} names; a checkpoint leaves out {tiepolicy.format_bytes(plan.bytes_saved)}"
    return "\n".join([saved, *ties, *(f"refused: {refusal}" for refusal in plan.refused)])
