"""Saved by some ranks, loaded by more or fewer: the same bits, whatever the layout."""

from pathlib import Path

import pytest
import torch
from elastic_ranks import CASES, Uneven, assert_as_trained

import tiepolicy_dcp
from torchrun import torchrun

ELASTIC_RANKS = Path(__file__).with_name("elastic_ranks.py")


def run(*arguments, num_processes):
    result = torchrun(ELASTIC_RANKS, *arguments, num_processes=num_processes)
    assert 0 == result.returncode, result.stdout
    return result.stdout


@pytest.mark.slow
@pytest.mark.dist
def test_any_number_of_ranks_loads_what_any_other_saved_bit_for_bit(tmp_path):
    """2, 3 and 4 ranks save; 4 load what 2 and 3 saved, 2 what 4 saved, and one process all of it."""
    for num_ranks in (2, 3, 4):
        run("save", tmp_path / str(num_ranks), num_processes=num_ranks)
    assert "all equal" in run("load", tmp_path / "2", tmp_path / "3", num_processes=4)
    assert "all equal" in run("load", tmp_path / "4", num_processes=2)
    for num_ranks in (2, 3, 4):
        for tied, hybrid in CASES:
            folder = tmp_path / str(num_ranks) / f"{tied}_{hybrid}"
            model = Uneven(tied=tied)
            optimizer = torch.optim.AdamW(model.parameters(), lr=9.0)
            tiepolicy_dcp.load(folder, model=model, optimizer=optimizer)
            assert_as_trained(model, optimizer, tied=tied)
