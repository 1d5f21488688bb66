"""What the ranks of a training under DDP do in `test_trainer_callback.py`: `torchrun trained_ranks.py FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import tiepolicy_hf
from hf_training import llama, trainer
from torchrun import leave


def main(folder: Path) -> None:
    """Train without a stop, and with one, after which other weights are resumed from the checkpoint."""
    whole, first, resumed = (llama(tied=True) for _ in range(3))
    trainer(whole, folder / "whole").train()
    trainer(first, folder / "cut", max_steps=6).train()
    torch.nn.init.zeros_(resumed.lm_head.weight)
    checkpoint = tiepolicy_hf.last_checkpoint(folder / "cut")
    assert checkpoint is not None
    trainer(resumed, folder / "cut").train(resume_from_checkpoint=checkpoint)
    expected = whole.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in resumed.state_dict().items())
    assert resumed.lm_head.weight is resumed.model.embed_tokens.weight
    print("the same bits\n", end="")
    dist.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
