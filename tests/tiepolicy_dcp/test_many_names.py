"""A model of 100,000 names is planned, compacted and written without a copy of it in memory."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import nn

import tiepolicy_dcp

NUM_NAMES, NUM_TIED, NUM_ELEMENTS = 100_000, 1_000, 2_000
#: What facts, plan and DCP's own plan and metadata may take, whatever the size of the tensors; less than these are.
BYTES_PER_NAME = 6_000


def many_names():
    """Parameters of 8 kB, one name in a hundred being a second name."""
    model = nn.Module()
    for index in range(NUM_NAMES - NUM_TIED):
        model.register_parameter(f"p{index}", nn.Parameter(torch.full((NUM_ELEMENTS,), float(index))))
    for index in range(NUM_TIED):
        model.register_parameter(f"tied{index}", getattr(model, f"p{index}"))
    return model


def in_use(field):
    """Bytes of this process: in use (VmRSS), or at most since the reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def save_and_measure(model, folder, connection):
    Path("/proc/self/clear_refs").write_text("5")
    before = in_use("VmRSS")
    tiepolicy_dcp.save(folder, model=model)
    connection.send(in_use("VmHWM") - before)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_hundred_thousand_names_are_saved_without_a_copy_of_the_model(tmp_path):
    model = many_names()
    unique = (NUM_NAMES - NUM_TIED) * NUM_ELEMENTS * 4
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=save_and_measure, args=(model, tmp_path / "c", send))
    process.start()
    extra = receive.recv()
    process.join()
    written = sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    print(f"{extra / 1e6:.0f} MB of extra memory for {unique / 1e6:.0f} MB of tensors, {written / 1e6:.0f} MB written")
    assert extra < NUM_NAMES * BYTES_PER_NAME < unique
    assert unique < written < 1.3 * unique
