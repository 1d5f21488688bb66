"""Checkpoints by torch.distributed.checkpoint alone, which warns that this process is the only one."""

import pytest
import torch.distributed.checkpoint as dcp


def plain_save(state, folder):
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(state, checkpoint_id=folder)


def plain_load(state, folder, **options):
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(state, checkpoint_id=folder, **options)


def num_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
