"""python benchmarks/bench_checkpoint.py --device cuda [--out checkpoint_cuda.json].

How long does a checkpoint of a draft on a GPU keep its trainer, how long does it take in all, and how long to load?

`W8B` has the trainable weights of a draft of Llama-3.1-8B's sizes in bfloat16 and both moments of AdamW in float32:
4.25 GB, which every tool saves as the same mapping of tensors. `W8B, optimizer` has the weights in float32 with
`torch.optim.AdamW`, 5.1 GB, and is saved as a trainer does it, by name in a store. Saves end when the disk has
everything; files are in memory ("warm") or not ("cold") before a load. The tools take turns.
"""

import argparse
import functools
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from environment import environment
from safetensors.torch import load_file, save_file
from torch import nn

import tiepolicy_dcp

Row = dict[str, Any]
State = Mapping[str, torch.Tensor]
#: Of the draft: hidden, intermediate, keys and values, draft vocabulary.
HIDDEN, INTERMEDIATE, KEYS, VOCAB = 4096, 14336, 1024, 32000
_RAW_BYTES = 1 << 24


def draft_shapes(scale: int) -> dict[str, tuple[int, ...]]:
    """What is trained, by name; every dimension divided by `scale`."""
    hidden, intermediate, keys, vocab = (size // scale for size in (HIDDEN, INTERMEDIATE, KEYS, VOCAB))
    return {
        "fc": (hidden, 3 * hidden),
        "q": (hidden, 2 * hidden),
        "k": (keys, 2 * hidden),
        "v": (keys, 2 * hidden),
        "o": (hidden, hidden),
        "gate": (intermediate, hidden),
        "up": (intermediate, hidden),
        "down": (hidden, intermediate),
        "lm_head": (vocab, hidden),
        **{f"norm{index}": (hidden,) for index in range(4)},
    }


def with_moments(device: torch.device, scale: int) -> nn.Module:
    """Weights in bfloat16 and moments in float32, as parameters and buffers of one module."""
    model = nn.Module()
    for name, shape in draft_shapes(scale).items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape, device=device, dtype=torch.bfloat16)))
        model.register_buffer(f"{name}_exp_avg", torch.randn(shape, device=device))
        model.register_buffer(f"{name}_exp_avg_sq", torch.rand(shape, device=device))
    return model


def with_optimizer(device: torch.device, scale: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Weights in float32, and AdamW after one step."""
    model = nn.Module()
    for name, shape in draft_shapes(scale).items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape, device=device)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def num_bytes(state: State) -> int:
    """What is to be written."""
    return sum(tensor.nbytes for tensor in state.values())


def wait_for_gpu() -> None:
    """Until it has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(step: Callable[[], object]) -> float:
    """How long a step and what it told the GPU to do take."""
    wait_for_gpu()
    start = time.perf_counter()
    step()
    wait_for_gpu()
    return time.perf_counter() - start


def gpu_bytes() -> int:
    """Most memory that was in use on the GPU since the last time this was asked."""
    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak - torch.cuda.memory_allocated()


def flushed(folder: Path) -> None:
    """Wait for the disk, for tools that do not."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Have the next read come from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    """Have the next read come from memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(_RAW_BYTES):
                    pass


def saved_with_torch(state: State, folder: Path) -> None:
    """One file."""
    folder.mkdir()
    torch.save(dict(state), folder / "state.pt")
    flushed(folder)


def saved_with_safetensors(state: State, folder: Path) -> None:
    """One file."""
    folder.mkdir()
    save_file(dict(state), folder / "state.safetensors")
    flushed(folder)


def written_raw(total: int, folder: Path) -> None:
    """As many bytes from pinned memory past the page cache, by one thread: what the disk can do."""
    folder.mkdir()
    piece = torch.empty(_RAW_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy().data
    flags = os.O_WRONLY | os.O_CREAT
    try:
        descriptor = os.open(folder / "raw", flags | os.O_DIRECT)
        os.pwrite(descriptor, piece, 0)
    except OSError:
        descriptor = os.open(folder / "raw", flags)
    for start in range(0, total, _RAW_BYTES):
        os.pwrite(descriptor, piece, start)
    os.fsync(descriptor)
    os.close(descriptor)


def one_row(tool: str, operation: str, step: Callable[[], object], total: int, **known: object) -> Row:
    """Time, rate and memory of an operation, printed as it is done."""
    gpu_bytes()
    taken = seconds(step)
    row = {"tool": tool, "operation": operation, "seconds": taken, "gb_per_s": total / taken / 1e9, **known}
    row["extra_gpu_gb"] = gpu_bytes() / 1e9
    print(f"  {tool:24} {operation:18} {taken:7.3f} s {row['gb_per_s']:6.2f} GB/s", flush=True)
    return row


def plain_rows(state: State, folder: Path) -> Iterator[Row]:
    """The other tools, and the disk alone."""
    total = num_bytes(state)
    target = folder / "c"
    room = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    device = str(next(iter(state.values())).device)

    yield one_row("raw, O_DIRECT", "save", lambda: written_raw(total, target), total)
    shutil.rmtree(target)
    yield one_row("dcp", "save", lambda: dcp.save(dict(state), checkpoint_id=target), total)
    remember(target)
    yield one_row("dcp", "load warm", lambda: dcp.load(room, checkpoint_id=target), total)
    shutil.rmtree(target)
    yield from async_rows("dcp", lambda: dcp.async_save(dict(state), checkpoint_id=target), total)
    shutil.rmtree(target)
    yield one_row("torch", "save", lambda: saved_with_torch(state, target), total)
    remember(target)
    yield one_row("torch", "load warm", lambda: torch.load(target / "state.pt", map_location=device), total)
    shutil.rmtree(target)
    yield one_row("safetensors", "save", lambda: saved_with_safetensors(state, target), total)
    remember(target)
    read = functools.partial(load_file, target / "state.safetensors", device=device)
    yield one_row("safetensors", "load warm", read, total)
    forget(target)
    yield one_row("safetensors", "load cold", read, total)
    shutil.rmtree(target)


def async_rows(
    tool: str,
    start: Callable[[], Any],
    total: int,
    *,
    kind: str = "",
    then: Callable[[], None] = lambda: None,
) -> list[Row]:
    """How long the caller is kept, how long its GPU is, and how long all of it takes; `then` is done at once."""
    wait_for_gpu()
    gpu_bytes()
    began = time.perf_counter()
    pending = start()
    blocked = time.perf_counter() - began
    then()
    wait_for_gpu()
    kept = time.perf_counter() - began
    pending.result()
    taken = time.perf_counter() - began
    row = {"tool": tool, "operation": f"async_save{kind}", "seconds": taken, "gb_per_s": total / taken / 1e9}
    row |= {"blocked": blocked, "gpu_free_after": kept, "extra_gpu_gb": gpu_bytes() / 1e9}
    print(f"  {tool:24} {row['operation']:18} {taken:7.3f} s, blocked {blocked:.4f}, GPU {kept:.4f}", flush=True)
    return [row]


def our_rows(model: nn.Module, folder: Path) -> Iterator[Row]:
    """`tiepolicy_dcp` on the same mapping."""
    tool = "tiepolicy_dcp"
    total = num_bytes(model.state_dict())
    target = folder / "c"
    without = "save, no digests"
    yield one_row(tool, without, lambda: tiepolicy_dcp.save(target, model=model, digests=False), total)
    shutil.rmtree(target)
    yield one_row(tool, "save", lambda: tiepolicy_dcp.save(target, model=model), total)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for state, prepare in (("cold", forget), ("warm", remember)):
        for verify in ("full", "size"):
            prepare(target)
            scramble_(model)
            read = functools.partial(tiepolicy_dcp.load, target, model=model, verify=verify)
            yield one_row(tool, f"load {state}, {verify}", read, total)
            check(model, expected)
    shutil.rmtree(target)


def our_async_rows(model: nn.Module, folder: Path, worker: Any) -> Iterator[Row]:
    """Saves in the background of which the values are changed as soon as the call returns."""
    total = num_bytes(model.state_dict())
    with tiepolicy_dcp.CheckpointStore(folder / "run", keep_last=1) as store:
        for number in range(3):
            kind = ", first" if number == 0 else ", later"
            expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            begin = functools.partial(store.async_save, f"step_{number}", model=model, worker=worker)
            scramble = functools.partial(scramble_, model)
            yield from async_rows(f"tiepolicy_dcp, {worker}", begin, total, kind=kind, then=scramble)
            store.load("LATEST", model=model)
            check(model, expected)
            # As between the saves of a run: the bytes of what is not kept are gone.
            store.wait()
    shutil.rmtree(folder / "run")


def optimizer_rows(device: torch.device, folder: Path, scale: int) -> Iterator[Row]:
    """A trainer's checkpoint: model, optimizer, extra state."""
    tool = "tiepolicy_dcp"
    model, optimizer = with_optimizer(device, scale)
    total = 3 * num_bytes(dict(model.named_parameters()))
    extra = {"step": 1, "rng": torch.get_rng_state()}
    with tiepolicy_dcp.CheckpointStore(folder / "run", keep_last=1) as store:
        for number in range(3):
            kind = ", first" if number == 0 else ", later"
            trained = {"model": model, "optimizer": optimizer, "extra": extra}
            begin = functools.partial(store.async_save, f"step_{number}", **trained)
            yield from async_rows(tool, begin, total, kind=kind)
            store.wait()
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        remember(store.resolve("LATEST"))
        for verify in ("full", "size"):
            scramble_(model)
            read = functools.partial(store.load, "LATEST", model=model, optimizer=optimizer, verify=verify)
            yield one_row(tool, f"load warm, {verify}", read, total)
            check(model, expected)
    shutil.rmtree(folder / "run")


@torch.no_grad()
def scramble_(model: nn.Module) -> None:
    """Change every value, as a step of training does."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.mul_(-1).add_(1)


def check(model: nn.Module, expected: State) -> None:
    """What was loaded is what was saved."""
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items()), "loaded other values than saved"


def one_round(device: torch.device, folder: Path, scale: int) -> list[Row]:
    """Every tool once."""
    model = with_moments(device, scale)
    found = [*our_rows(model, folder), *our_async_rows(model, folder, "thread")]
    found += our_async_rows(model, folder, "process")
    found += plain_rows(model.state_dict(), folder)
    del model
    gc.collect()
    print(" W8B, optimizer", flush=True)
    return [
        *({"case": "W8B", **row} for row in found),
        *({"case": "W8B, optimizer", **row} for row in optimizer_rows(device, folder, scale)),
    ]


def summary(rows: list[Row]) -> list[Row]:
    """Medians of what was measured several times."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["tool"], row["operation"]), []).append(row)
    found = []
    for (case, tool, operation), same in groups.items():
        median = {key: statistics.median(row[key] for row in same) for key in same[0] if key not in _WORDS}
        spread = {
            "seconds_min": min(row["seconds"] for row in same),
            "seconds_max": max(row["seconds"] for row in same),
        }
        found.append({"case": case, "tool": tool, "operation": operation, "n": len(same), **median, **spread})
    return found


_WORDS = ("case", "tool", "operation")


def table(rows: list[Row]) -> str:
    """One line per tool and operation; seconds."""
    lines = [f"{'case':15} {'tool':24} {'operation':18} {'n':>2} {'s':>7} {'min..max':>14} {'GB/s':>6} {'blocked':>8}"]
    for row in rows:
        spread = f"{row['seconds_min']:.3f}..{row['seconds_max']:.3f}"
        blocked = f"{row['blocked']:.4f}" if "blocked" in row else ""
        lines.append(
            f"{row['case']:15} {row['tool']:24} {row['operation']:18} {row['n']:2} {row['seconds']:7.3f} {spread:>14} "
            f"{row['gb_per_s']:6.2f} {blocked:>8}"
        )
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table, write the JSON; what was measured is written even if a later round fails."""
    warnings.simplefilter("ignore")
    device = torch.device(arguments.device)
    rows: list[Row] = []
    try:
        for number in range(arguments.rounds):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                print(f"round {number + 1} of {arguments.rounds}", flush=True)
                rows += one_round(device, Path(folder), arguments.scale)
    finally:
        print(table(summary(rows)))
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            found = {"environment": environment("safetensors", "xxhash"), "rows": summary(rows)}
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
