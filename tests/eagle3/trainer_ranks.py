"""Runs of two processes for `test_trainer_ranks.py`, in one start of torchrun: `torchrun trainer_ranks.py FOLDER`."""

import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from eagle3.parallel import joined
from eagle3.trainer import train
from eagle3_runs import config_of
from torchrun import leave

#: By the name of their folder.
RUNS = {
    "data": {"epochs": 1},
    "shard": {"epochs": 1, "kind": "shard"},
    "hybrid-1": {"epochs": 1, "kind": "hybrid", "shard_size": 1},
    "hybrid-2": {"epochs": 1, "kind": "hybrid", "shard_size": 2},
    "fused": {"epochs": 1, "train": {"step": "fused"}},
    "accumulated-fused": {"epochs": 1, "train": {"accumulate": 2, "step": "fused"}},
    "accumulated": {"epochs": 1, "train": {"accumulate": 2}},
    "accumulated-shard": {"epochs": 1, "kind": "shard", "train": {"accumulate": 2}},
    "whole": {"every_steps": 3},
    "whole-shard": {"every_steps": 3, "kind": "shard", "async_save": True},
}


class Killer(logging.Handler):
    """Sends its own process a signal at the first log line that contains some text."""

    def __init__(self, text: str, number: signal.Signals) -> None:
        super().__init__()
        self.text = text
        self.number = number

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.text = "never again"
            os.kill(os.getpid(), self.number)


def copy_run(source: Path, target: Path, name: str) -> None:
    """What a run left when it was cut after a checkpoint."""
    shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
    shutil.copy(source / "draft_config.json", target)


def operations(work, *names):
    """Those of these names that some work consists of, in their order."""
    with torch.profiler.profile() as profiler:
        work()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if event.name in names]


def main(folder: Path) -> None:
    world = (folder / "target", folder / "conversations.jsonl")
    with joined() as ranks:
        logging.getLogger("eagle3").setLevel(logging.INFO)

        def run(name, **options):
            train(config_of(world, folder / name, batch_size=1, **options), ranks)
            ranks.gather(None)

        def cut(source, name, checkpoint):
            if ranks.is_first:
                copy_run(folder / source, folder / name, checkpoint)
            ranks.gather(None)

        for name, options in RUNS.items():
            run(name, **options)
        found = operations(lambda: run("order", epochs=1, kind="shard"), "aten::mm", "c10d::_reduce_scatter_base_")
        if ranks.is_first:
            (folder / "operations.json").write_text(json.dumps(found))
        for kind in ("data", "shard"):
            run(f"from-export-{kind}", epochs=1, kind=kind, init_from=folder / "export")
        run("from-run", epochs=1, kind="shard", init_from=folder / "alone", lr=1e-30)
        for kind, source in (("data", "whole"), ("shard", "whole-shard")):
            cut(source, f"cut-{kind}", "epoch_1_step_3")
            run(f"cut-{kind}", every_steps=3, kind=kind, restore_from="epoch_1_step_3")
        cut("whole", "sharded-later", "epoch_1_step_3")
        run("sharded-later", every_steps=3, kind="shard", restore_from="epoch_1_step_3")
        cut("alone", "from-alone", "epoch_1_step_3")
        run("from-alone", every_steps=3, restore_from="epoch_1_step_3")
        if not ranks.is_first:
            logging.getLogger("eagle3").addHandler(Killer("step 2/10", signal.SIGTERM))
        run("stopped")
        run("stopped", restore_from="LATEST")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
