"""A model of 100,000 names, or one file of a large model, is written without a copy of it in memory."""

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


def save_and_measure(model, folder, connection, **options):
    Path("/proc/self/clear_refs").write_text("5")
    before = in_use("VmRSS")
    tiepolicy_dcp.save(folder, model=model, **options)
    connection.send(in_use("VmHWM") - before)


def extra_memory(model, folder, **options):
    """Bytes that a process takes at most while it saves, beside those that it has."""
    receive, send = multiprocessing.Pipe(duplex=False)
    forked = multiprocessing.get_context("fork")
    process = forked.Process(target=save_and_measure, args=(model, folder, send), kwargs=options)
    process.start()
    extra = receive.recv()
    process.join()
    return extra


measured = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


@pytest.mark.slow
@measured
def test_one_file_is_written_without_a_copy_of_the_model(tmp_path):
    model = nn.ParameterList([torch.full((1 << 22,), float(index)) for index in range(32)])
    num_bytes = len(model) * (1 << 24)
    assert num_bytes > 1.5 * extra_memory(model, tmp_path / "c", consolidated=True)
    assert 2 * num_bytes < sum(path.stat().st_size for path in (tmp_path / "c").iterdir())


@pytest.mark.slow
@measured
def test_a_hundred_thousand_names_are_saved_without_a_copy_of_the_model(tmp_path):
    model = many_names()
    unique = (NUM_NAMES - NUM_TIED) * NUM_ELEMENTS * 4
    extra = extra_memory(model, tmp_path / "c")
    written = sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    print(f"{extra / 1e6:.0f} MB of extra memory for {unique / 1e6:.0f} MB of tensors, {written / 1e6:.0f} MB written")
    assert extra < NUM_NAMES * BYTES_PER_NAME < unique
    assert unique < written < 1.3 * unique
