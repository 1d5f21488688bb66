"""Saving in the background: what was copied is what is found, and a failure is heard of."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import tiepolicy_dcp
from models import TiedPair, train_steps
from tiepolicy_dcp import CheckpointError, CheckpointStore
from torchrun import torchrun

ASYNC_RANKS = Path(__file__).with_name("async_ranks.py")
#: Another process takes seconds to start.
WORKERS = ["thread", pytest.param("process", marks=pytest.mark.slow)]


class EveryKind(nn.Module):
    """Tensors that are easy to copy wrongly: parts, transposed, empty, without dimensions, of rare dtypes."""

    def __init__(self):
        super().__init__()
        base = torch.arange(24.0).reshape(4, 6)
        self.register_buffer("part", base[1:3, 2:5].clone()[:, 1:])
        self.register_buffer("transposed", torch.randn(3, 5).T)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("scalar", torch.tensor(7, dtype=torch.int64))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("small", torch.randn(5).to(torch.float8_e4m3fn))
        self.register_buffer("complex", torch.randn(3, dtype=torch.complex64))
        self.weight = nn.Parameter(torch.randn(7, 3, dtype=torch.bfloat16))


@contextmanager
def largest_file(num_bytes):
    """The system refuses to write more into one file, in this process and in those that it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def worker_of(store):
    """The process that writes for a store."""
    return store._savers["process"]._process._process


@pytest.mark.parametrize("worker", WORKERS)
def test_a_background_save_holds_what_a_foreground_save_holds(tmp_path, worker):
    model = TiedPair(vocab_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train_steps(model, optimizer, num_steps=2)
    arguments = {"model": model, "optimizer": optimizer, "extra": {"rng": torch.get_rng_state()}, "consolidated": True}
    expected = tiepolicy_dcp.save(tmp_path / "expected", **arguments)
    folder = tiepolicy_dcp.async_save(tmp_path / "c", **arguments, worker=worker).result()
    assert {path.name: path.read_bytes() for path in expected.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


@pytest.mark.parametrize("worker", WORKERS)
def test_tensors_of_every_kind_are_copied(tmp_path, worker):
    model, loaded = EveryKind(), EveryKind()
    tiepolicy_dcp.async_save(tmp_path / "c", model=model, worker=worker).result()
    tiepolicy_dcp.load(tmp_path / "c", model=loaded)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.flatten().view(torch.uint8), loaded.state_dict()[name].flatten().view(torch.uint8))


@pytest.mark.parametrize("worker", WORKERS)
def test_a_change_after_the_call_does_not_reach_the_file_and_the_memory_is_used_again(tmp_path, worker):
    with CheckpointStore(tmp_path) as store:
        model = TiedPair(vocab_size=1000)
        memory = set()
        for step in range(3):
            with torch.no_grad():
                model.lm_head.weight.fill_(step)
            store.async_save(f"step_{step}", model=model, worker=worker)
            with torch.no_grad():
                model.lm_head.weight.fill_(-1)
            staging = store._savers[worker]._staging
            memory.add(id(staging._memory))
    assert 1 == len(memory)
    assert ["step_0", "step_1", "step_2"] == store.names()
    for step in range(3):
        store.load(f"step_{step}", model=model)
        assert [step] == model.lm_head.weight.unique().tolist()


@pytest.mark.slow
def test_a_save_under_way_can_be_asked_about_and_the_next_one_waits_for_it(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.async_save("one", model=TiedPair(), worker="process").result()
        worker_of(store).send_signal(signal.SIGSTOP)
        pending = store.async_save("two", model=TiedPair(), worker="process")
        with pytest.raises(TimeoutError):
            pending.result(timeout=0.05)
        assert (False, ["one"], tmp_path / "one") == (pending.done(), store.names(), store.resolve("LATEST"))
        worker_of(store).send_signal(signal.SIGCONT)
        store.save("three", model=TiedPair())
        assert (True, tmp_path / "three") == (pending.done(), store.resolve("LATEST"))
    assert ["one", "three", "two"] == store.names()


def test_a_checkpoint_is_done_before_the_bytes_of_those_not_kept_are_removed_and_the_next_save_after(
    tmp_path, monkeypatch
):
    may_remove, remove = threading.Event(), shutil.rmtree

    def remove_then(folder, **options):
        assert folder.suffix != ".doomed" or may_remove.wait(timeout=60)
        remove(folder, **options)

    with CheckpointStore(tmp_path, keep_last=1) as store:
        store.save("one", model=TiedPair())
        monkeypatch.setattr(shutil, "rmtree", remove_then)
        store.async_save("two", model=TiedPair()).result(timeout=60)
        assert (["two"], 1) == (store.names(), len(list(tmp_path.glob(".one.*"))))
        may_remove.set()
        store.wait()
        assert [] == list(tmp_path.glob(".one.*"))


def test_a_killed_worker_is_an_error_that_says_so_and_the_next_save_starts_another(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.async_save("one", model=TiedPair(), worker="process").result()
        worker_of(store).send_signal(signal.SIGSTOP)
        pending = store.async_save("two", model=TiedPair(), worker="process")
        worker_of(store).kill()
        with pytest.raises(CheckpointError, match=r"__0_0.distcp is gone \(killed by SIGKILL\)"):
            pending.result()
        assert (["one"], []) == (store.names(), list(tmp_path.glob("*.unfinished")))
        store.async_save("two", model=TiedPair(), worker="process")
    assert (["one", "two"], tmp_path / "two") == (store.names(), store.resolve("LATEST"))


@pytest.mark.parametrize("heard", ["result", "async_save", "save", "close"])
def test_a_failure_is_raised_at_the_next_occasion_and_once(tmp_path, heard):
    store = CheckpointStore(tmp_path)
    store.save("one", model=TiedPair())
    with largest_file(64_100):  # enough for the copy, which lies in a file in memory, and not for what is around it
        pending = store.async_save("two", model=TiedPair(vocab_size=4000))
        occasions = {
            "result": pending.result,
            "async_save": lambda: store.async_save("three", model=TiedPair()),
            "save": lambda: store.save("three", model=TiedPair()),
            "close": store.close,
        }
        with pytest.raises(CheckpointError, match=r"two could not be written: OSError: \[Errno 27\] File too large"):
            occasions[heard]()
    assert (["one"], tmp_path / "one") == (store.names(), store.resolve("LATEST"))
    store.save("three", model=TiedPair())
    store.close()
    assert (["one", "three"], []) == (store.names(), list(tmp_path.glob(".*.unfinished")))


def test_no_memory_for_the_copy_is_an_error_at_the_call(tmp_path):
    with CheckpointStore(tmp_path) as store:
        with largest_file(20_000), pytest.raises(CheckpointError, match=r"no memory for a copy .* Nothing was kept"):
            store.async_save("one", model=TiedPair(vocab_size=4000))
        assert [] == list(tmp_path.glob(".*.unfinished"))
        store.async_save("one", model=TiedPair(vocab_size=4000))
    assert ["one"] == store.names()


@pytest.mark.slow
def test_what_another_process_cannot_write_is_an_error_here(tmp_path):
    with CheckpointStore(tmp_path) as store:
        with largest_file(20_000):  # which the process inherits
            store.async_save("one", model=TiedPair(), worker="process").result()
        pending = store.async_save("two", model=TiedPair(vocab_size=4000), worker="process")
        with pytest.raises(CheckpointError, match=r"could not be written: OSError: \[Errno 27\] File too large"):
            pending.result()
        assert ["one"] == store.names()


def test_an_unknown_worker_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="worker is 'fork', but must be 'thread' or 'process'"):
        tiepolicy_dcp.async_save(tmp_path / "c", model=TiedPair(), worker="fork")


@pytest.mark.parametrize("worker", WORKERS)
def test_a_process_that_ends_without_waiting_completes_its_save(tmp_path, worker):
    code = (
        "import os, sys, torch, tiepolicy_dcp\nfrom models import TiedPair\ntorch.manual_seed(5)\n"
        "os.sched_getaffinity = lambda _: range(64)\n"  # to do much at once, as an ending process cannot
        "store = tiepolicy_dcp.CheckpointStore(sys.argv[1])\n"
        "store.async_save('one', model=TiedPair(vocab_size=50_000), worker=sys.argv[2])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code, tmp_path, worker], env=environment, check=True)
    torch.manual_seed(5)
    expected, model = TiedPair(vocab_size=50_000), TiedPair(vocab_size=50_000)
    CheckpointStore(tmp_path).load("LATEST", model=model)
    assert torch.equal(expected.lm_head.weight, model.lm_head.weight)


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_save_in_the_background_and_all_hear_of_one_that_failed(tmp_path):
    result = torchrun(ASYNC_RANKS, tmp_path, num_processes=2)
    assert 0 == result.returncode, result.stdout
    lost = f"{tmp_path}/run/lost"
    for rank in (0, 1):
        assert f"rank {rank} heard: {lost} could not be written: OSError: [Errno 27] File too large" in result.stdout
        assert f"rank {rank} heard: the process that wrote {tmp_path}/run/.lost." in result.stdout
        for worker in ("thread", "process"):
            assert f"rank {rank} {worker}: bits equal True, latest again_{worker}" in result.stdout
