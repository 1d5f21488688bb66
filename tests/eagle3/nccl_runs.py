"""Runs of two processes under NCCL for `test_nccl_runs.py`: `torchrun nccl_runs.py FOLDER`."""

import sys
from pathlib import Path

from eagle3.parallel import joined
from eagle3.trainer import train
from eagle3_runs import config_of
from torchrun import leave, share_gpus

#: By the name of their folder. The fused step on a GPU is one for bfloat16.
RUNS = {
    "fused": {"dtype": "bfloat16"},
    "fused-accumulated": {"dtype": "bfloat16", "train": {"accumulate": 2}},
    "data": {"train": {"step": "autograd", "precision": "float32"}},
    "shard": {"kind": "shard", "train": {"precision": "float32"}},
    "hybrid": {"kind": "hybrid", "shard_size": 1, "train": {"precision": "float32"}},
    "fused-8-bit": {"dtype": "bfloat16", "train": {"fp8": True}},
}


def main(folder: Path) -> None:
    share_gpus()
    with joined() as ranks:
        for name, options in RUNS.items():
            world = (folder / "target", folder / "conversations.jsonl")
            train(config_of(world, folder / name, epochs=1, batch_size=1, **options), ranks)
            ranks.gather(None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
