"""Checkpoints of what lies on a GPU: the bits at the call, whatever happens to the tensors next; needs a GPU."""

import threading

import pytest
import torch
from torch import nn

import tiepolicy_dcp
from models import TiedPair, train_steps
from tiepolicy_dcp import CheckpointStore, _staging
from tiepolicy_dcp._devices import PIECE_BYTES

pytestmark = pytest.mark.gpu
WORKERS = ["thread", "process"]


class EveryLayout(nn.Module):
    """Tensors on a GPU that are easy to copy wrongly, one on the CPU, and one longer than several pieces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("long", torch.randint(0, 256, (11 * PIECE_BYTES + 17,), dtype=torch.uint8, device="cuda"))
        self.register_buffer("transposed", torch.randn(1000, 1500, device="cuda").T)
        self.register_buffer("part", torch.randn(40, 60, device="cuda")[3:9, 5:50])
        self.register_buffer("empty", torch.empty(0, 3, device="cuda"))
        self.register_buffer("scalar", torch.tensor(7, device="cuda"))
        self.register_buffer("small", torch.randn(5, device="cuda").to(torch.float8_e4m3fn))
        self.register_buffer("host", torch.randn(100))
        self.weight = nn.Parameter(torch.randn(7, 3, device="cuda", dtype=torch.bfloat16))


def values(model):
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def scramble_(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.zeros_like(tensor))


def check(model, expected):
    for name, tensor in model.state_dict().items():
        own = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(expected[name].contiguous().reshape(-1).view(torch.uint8), own), name


def busy():
    """Keep the current stream busy for longer than it takes to enqueue a save, about a second."""
    torch.cuda._sleep(2_000_000_000)


def test_a_save_of_what_is_still_being_computed_has_the_result(tmp_path):
    model = EveryLayout()
    busy()
    with torch.no_grad():
        model.long.add_(1)
    tiepolicy_dcp.save(tmp_path / "c", model=model)
    expected = values(model)
    scramble_(model)
    tiepolicy_dcp.load(tmp_path / "c", model=model)
    check(model, expected)


def test_what_a_gpu_holds_is_the_file_that_the_cpu_would_have_written(tmp_path):
    model = TiedPair(vocab_size=4000).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train_steps(model, optimizer, num_steps=1)
    tiepolicy_dcp.save(tmp_path / "gpu", model=model)
    tiepolicy_dcp.save(tmp_path / "cpu", model=model.cpu())
    assert (tmp_path / "cpu/__0_0.distcp").read_bytes() == (tmp_path / "gpu/__0_0.distcp").read_bytes()


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("room", [True, False], ids=["copied on the GPU", "copied to the CPU"])
def test_values_are_those_of_the_call_though_they_change_right_after(tmp_path, monkeypatch, worker, room):
    if not room:
        monkeypatch.setattr(_staging, "_SPARE_BYTES", 1 << 60)
    model = EveryLayout()
    with CheckpointStore(tmp_path) as store:
        for step in range(3):
            with torch.no_grad():
                model.long.random_(0, 256)
            expected = values(model)
            busy()
            store.async_save(f"step_{step}", model=model, worker=worker)
            scramble_(model)
            del model  # its memory may be given to somebody else meanwhile
            taken = [torch.ones(PIECE_BYTES, dtype=torch.uint8, device="cuda") for _ in range(16)]
            model = EveryLayout()
            store.wait()
            store.load(f"step_{step}", model=model)
            check(model, expected)
            del taken


@pytest.mark.parametrize("worker", WORKERS)
def test_an_optimizer_that_steps_right_after_the_call_is_not_saved(tmp_path, worker):
    model = TiedPair(vocab_size=50_000).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    train_steps(model, optimizer, num_steps=1)
    moments = [state["exp_avg"].cpu().clone() for state in optimizer.state.values()]
    expected = values(model)
    side = torch.cuda.Stream()
    with CheckpointStore(tmp_path) as store, torch.cuda.stream(side):  # trainers use streams of their own
        side.wait_stream(torch.cuda.default_stream())
        store.async_save("one", model=model, optimizer=optimizer, worker=worker)
        train_steps(model, optimizer, num_steps=2)
        store.wait()
        store.load("one", model=model, optimizer=optimizer)
    torch.cuda.synchronize()
    check(model, expected)
    for moment, state in zip(moments, optimizer.state.values(), strict=True):
        assert torch.equal(moment, state["exp_avg"].cpu())


def test_the_caller_does_not_wait_for_the_gpu(tmp_path):
    model = TiedPair(vocab_size=4000).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train_steps(model, optimizer, num_steps=1)
    with CheckpointStore(tmp_path) as store:
        store.async_save("one", model=model, optimizer=optimizer)
        store.wait()
        busy()
        computed = torch.cuda.Event()
        computed.record()
        store.async_save("two", model=model, optimizer=optimizer)
        assert not computed.query()


def test_the_memory_of_the_gpu_is_given_back(tmp_path):
    model = EveryLayout()
    before = torch.cuda.memory_allocated()
    pending = tiepolicy_dcp.async_save(tmp_path / "c", model=model)
    pending.result()
    for thread in threading.enumerate():
        if thread.name == "save c":
            thread.join()
    assert before + PIECE_BYTES > torch.cuda.memory_allocated()


def test_a_load_reaches_tensors_of_the_gpu_that_are_no_plain_block(tmp_path):
    model, loaded = TiedPair(tied=False, vocab_size=3000), TiedPair(tied=False, vocab_size=3000).cuda()
    tiepolicy_dcp.save(tmp_path / "c", model=model)
    weight = loaded.lm_head.weight
    weight.data = torch.zeros(weight.shape[1], weight.shape[0], device="cuda").T
    tiepolicy_dcp.load(tmp_path / "c", model=loaded)
    check(loaded, values(model))
