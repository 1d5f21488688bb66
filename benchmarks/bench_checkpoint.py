"""python benchmarks/bench_checkpoint.py --out checkpoint.json.

How many bytes, seconds and megabytes of memory does a checkpoint of a tied and of an untied model take? `tiepolicy_dcp`
beside the tools that save the same model. Each round runs every tool once, in turn, so that a busy moment of the
machine hits all of them; each operation runs in a process of its own, forked from one that holds the model. Saves end
when the disk has everything. A load fills a model that is there already. Before it the files are all in memory
("warm") or all on the disk only ("cold"), however they were written. A disk is less even than memory: cold loads have
six times as many rounds, after one save of each tool, and an order of their own in each. Two ranks under torchrun
save and load the model as FSDP2 shards it. A save in the background is held against one copy in memory, made right
before it: by the clock, and by the processor time of the caller, which other processes of the machine do not lengthen.
`--size 0.02` tries it quickly.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from checkpoint_on_gpu import forget, remember, run
from checkpoint_tools import BASELINE, HEAD, OURS, TOOLS, Save
from environment import environment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import tiepolicy
import tiepolicy_dcp

Row = dict[str, Any]
PACKAGES = ("safetensors", "transformers", "xxhash")


def llama(*, tied: bool, size: float) -> LlamaForCausalLM:
    """A model of about `size` GB in bfloat16, half of which is the embedding (with the head)."""
    vocab_size = round(128_256 * size / 0.5) // (1 if tied else 2)
    layer = {"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 2048}
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=1024,
        num_hidden_layers=10 if size >= 0.2 else 1,
        tie_word_embeddings=tied,
        **layer,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(()).bfloat16()).add_(torch.arange(parameter.shape[-1]).bfloat16())
    return model.requires_grad_(requires_grad=False)


def unique_bytes(model: nn.Module) -> int:
    """What has to be written."""
    return sum(tensor.nbytes for tensor in tiepolicy.plan(model).compact(dict(model.state_dict())).values())


#: Cold loads of each tool, for one round of all else.
COLD_ROUNDS = 6
RANKED_TOOLS = (OURS, BASELINE, "dcp")


def peak_reset() -> int:
    """Start a new measurement of this process's peak memory; bytes in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes of memory of this process: in use (VmRSS) or at most since the reset (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(step: Callable[[], object]) -> Row:
    """Seconds and extra peak memory of one operation."""
    before = peak_reset()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "extra_mb": (resident("VmHWM") - before) / 1e6}


def forked(step: Callable[[], Any]) -> Any:
    """What a step returns in a process forked for it."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        warnings.simplefilter("ignore")
        send.send(step())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    send.close()  # so that the end of a process that failed is the end of the wait
    result = receive.recv()
    process.join()
    return result


def one_round(model: nn.Module, folder: Path) -> list[Row]:
    """Every tool saves in each of its ways, and loads warm."""
    rows = []
    target = folder / "c"
    for tool, (saves, loads) in TOOLS.items():
        for operation, save in saves.items():
            shutil.rmtree(target, ignore_errors=True)
            row = forked(lambda save=save: measured(lambda: save(model, target)))
            size = sum(path.stat().st_size for path in target.rglob("*"))
            rows.append({"tool": tool, "operation": operation, "bytes": size, **row})
        for operation, load in loads.items():
            remember(target)
            row = forked(lambda load=load: measured_load(model, load, target))
            rows.append({"tool": tool, "operation": f"{operation} warm", **row})
    shutil.rmtree(target)
    return rows


def cold_rounds(
    tools: Iterable[str], folder: Path, num_rounds: int, *, saved: Callable[..., object], loaded: Callable[..., Row]
) -> list[list[Row]]:
    """Every tool saves once in the last of its ways; then all load from the disk, in another order in each round."""
    loads = [(tool, operation, load) for tool in tools for operation, load in TOOLS[tool][1].items()]
    for tool in dict.fromkeys(tool for tool, *_ in loads):
        saved(list(TOOLS[tool][0].values())[-1], folder / tool)
    rounds = []
    for number in range(num_rounds):
        rows = {}
        for tool, operation, load in random.Random(number).sample(loads, len(loads)):  # noqa: S311 - any order
            row = loaded(load, folder / tool)
            rows[tool, operation] = {"tool": tool, "operation": f"{operation} cold", **row}
        rounds.append([rows[tool, operation] for tool, operation, _ in loads])
    return rounds


def cold_rounds_of_one(model: nn.Module, folder: Path, num_rounds: int) -> list[list[Row]]:
    """The same in one process after the other."""

    def loaded(load: Save, path: Path) -> Row:
        forget(path)
        row: Row = forked(lambda: measured_load(model, load, path))
        return row

    def saved(save: Save, path: Path) -> None:
        forked(lambda: save(model, path))

    return cold_rounds(TOOLS, folder, num_rounds, saved=saved, loaded=loaded)


def measured_load(model: nn.Module, load: Save, folder: Path) -> Row:
    """Fill a model whose memory is this process's own; what was loaded is compared."""
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != HEAD}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    row = measured(lambda: load(model, folder))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())
    return row


def measured_async(model: nn.Module, folder: Path, worker: Any) -> list[Row]:
    """How long `async_save` keeps its caller, for the first save of a run and the next, beside one copy in memory."""
    state = tiepolicy.plan(model).compact(dict(model.state_dict()))
    rows = []
    tiepolicy_dcp.save(folder / "warm", model=nn.Linear(1, 1))  # what is imported and planned once
    with tiepolicy_dcp.CheckpointStore(folder / "run") as store:
        for number, kind in enumerate(("first", "later")):
            start, cpu = time.perf_counter(), time.thread_time()
            copies = [tensor.clone() for tensor in state.values()]
            clone, clone_cpu = time.perf_counter() - start, time.thread_time() - cpu
            del copies
            cpu = time.thread_time()
            row = measured(lambda number=number: store.async_save(f"step_{number}", model=model, worker=worker))
            row |= {"cpu": time.thread_time() - cpu, "clone": clone, "clone_cpu": clone_cpu}
            start = time.perf_counter()
            store.wait()
            total = row["seconds"] + time.perf_counter() - start
            rows.append({"tool": f"async_save, {worker}", "operation": kind, "total": total, **row})
    for name in ("run", "warm"):
        shutil.rmtree(folder / name)
    return rows


def many_names(folder: Path) -> list[Row]:
    """A model of 100,000 names and 800 MB, saved: time and peak memory beyond the model's own."""
    model = nn.Module()
    for index in range(100_000):
        model.register_parameter(f"p{index}", nn.Parameter(torch.full((2_000,), float(index))))
    row = forked(lambda: measured(lambda: tiepolicy_dcp.save(folder / "c", model=model)))
    size = sum(path.stat().st_size for path in (folder / "c").rglob("*"))
    rows = [{"tool": OURS, "operation": "save", "bytes": size, **row}]
    return summary("100,000 names", [rows], unique_bytes(model))


def measured_digest(model: nn.Module) -> Row:
    """The digest of what is saved, alone."""
    tensors = tiepolicy.plan(model).compact(dict(model.state_dict())).values()
    return measured(lambda: [xxhash.xxh3_128(tensor.view(torch.uint8).numpy()) for tensor in tensors])


def on_ranks(folder: Path, *, tied: bool, size: float, num_rounds: int) -> tuple[list[list[Row]], list[list[Row]]]:
    """The same in two processes under torchrun: rounds of all but the cold loads, and rounds of these."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    options = ["--ranked", str(folder), "--tied", str(int(tied)), "--size", str(size), "--rounds", str(num_rounds)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *options], env=variables, check=True)
    rounds, cold = json.loads((folder / "rows.json").read_text())
    return rounds[1:], cold[COLD_ROUNDS:]  # the first ones warm up


def as_rank(folder: Path, *, tied: bool, size: float, num_rounds: int) -> None:
    """What each of the two processes does; rank 0 writes the rows. Seconds and memory are the larger of both."""
    dist.init_process_group("gloo")
    warnings.simplefilter("ignore")
    model = fully_shard(llama(tied=tied, size=size), mesh=init_device_mesh("cpu", (2,)))
    rounds: list[list[Row]] = []
    target = folder / "c"
    for _ in range(num_rounds):
        rows: list[Row] = []
        rounds.append(rows)
        for tool in RANKED_TOOLS:
            saves, loads = TOOLS[tool]
            for operation, save in saves.items():
                on_first(lambda: shutil.rmtree(target, ignore_errors=True))
                row = ranked(lambda save=save: save(model, target))
                size = sum(path.stat().st_size for path in target.rglob("*"))
                rows.append({"tool": tool, "operation": operation, "bytes": size, **row})
            for operation, load in loads.items():
                on_first(lambda: remember(target))
                row = ranked(lambda load=load: load(model, target))
                rows.append({"tool": tool, "operation": f"{operation} warm", **row})
    on_first(lambda: shutil.rmtree(target))

    def loaded(load: Save, path: Path) -> Row:
        on_first(lambda: forget(path))
        return ranked(lambda: load(model, path))

    num_cold = COLD_ROUNDS * num_rounds
    cold = cold_rounds(RANKED_TOOLS, folder, num_cold, saved=lambda save, path: save(model, path), loaded=loaded)
    if dist.get_rank() == 0:
        (folder / "rows.json").write_text(json.dumps([rounds, cold]))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that shuts down


def on_first(step: Callable[[], object]) -> None:
    """Rank 0 does it, the other waits."""
    dist.barrier()
    if dist.get_rank() == 0:
        step()
    dist.barrier()


def ranked(step: Callable[[], object]) -> Row:
    """Seconds until both ranks are done, and the larger extra peak memory."""
    dist.barrier()
    found = measured(lambda: (step(), dist.barrier()))
    both: list[Any] = [None, None]
    dist.all_gather_object(both, found)
    return {key: max(b[key] for b in both) for key in found}


def summary(case: str, rounds: list[list[Row]], unique: int) -> list[Row]:
    """Medians over rounds, and the median of each round's ratio to plain DCP on the same bytes."""
    found = []
    for index, first in enumerate(rounds[0]):
        runs = [rows[index] for rows in rounds]
        row: Row = {"case": case, "tool": first["tool"], "operation": first["operation"], "rounds": len(runs)}
        for key in ("seconds", "extra_mb", "clone", "total", "cpu", "clone_cpu"):
            if key in first:
                row[key] = statistics.median(run[key] for run in runs)
        row["seconds_min"], row["seconds_max"] = (f(run["seconds"] for run in runs) for f in (min, max))
        if "bytes" in first:
            row["bytes_over_unique"] = first["bytes"] / unique
        if "clone" in first:
            row["over_clone"] = statistics.median(run["seconds"] / run["clone"] for run in runs)
            row["cpu_over_clone"] = statistics.median(run["cpu"] / run["clone_cpu"] for run in runs)
        same = [_baseline(rows, first["operation"]) for rows in rounds]
        if None not in same:
            row["over_dcp"] = statistics.median(run["seconds"] / base for run, base in zip(runs, same, strict=True))
            row["over_dcp_min"] = row["seconds_min"] / min(same)
        found.append(row)
    return found


def _baseline(rows: Iterable[Row], operation: str) -> float | None:
    wanted = operation.replace(", verify=off", "").replace(", no digests", "")
    return next((row["seconds"] for row in rows if (row["tool"], row["operation"]) == (BASELINE, wanted)), None)


_RATIOS = ("over_dcp", "over_dcp_min", "over_clone", "cpu_over_clone")


def table(rows: list[Row]) -> str:
    """One line per tool and operation.

    `/dcp` compares with plain DCP on the same bytes, `/clone` with one copy, `/cpu` with that by processor time.
    """
    names = f"{'case':16} {'tool':24} {'operation':22} {'bytes':>7} {'s':>7} {'min..max':>14} {'MB':>6}"
    lines = [f"{names} {'/dcp':>5} {'/min':>5} {'/clone':>6} {'/cpu':>5}"]
    for row in rows:
        spread = f"{row['seconds_min']:.3f}..{row['seconds_max']:.3f}"
        ends = [f"{row[key]:.2f}" if key in row else "" for key in _RATIOS]
        size = f"{row['bytes_over_unique']:.3f}" if "bytes_over_unique" in row else ""
        lines.append(
            f"{row['case']:16} {row['tool']:24} {row['operation']:22} {size:>7} {row['seconds']:7.3f} {spread:>14} "
            f"{row['extra_mb']:6.0f} {ends[0]:>5} {ends[1]:>5} {ends[2]:>6} {ends[3]:>5}"
        )
    return "\n".join(lines)


def run_case(folder: Path, *, tied: bool, size: float, num_rounds: int) -> list[Row]:
    """All of one model."""
    name = "tied" if tied else "untied"
    model = llama(tied=tied, size=size)
    unique = unique_bytes(model)
    one_round(model, folder)  # warms up
    rows = summary(name, [one_round(model, folder) for _ in range(num_rounds)], unique)
    cold = folder / "cold"
    cold.mkdir()
    rows += summary(name, cold_rounds_of_one(model, cold, COLD_ROUNDS * num_rounds), unique)
    shutil.rmtree(cold)
    for worker in ("thread", "process"):
        rounds = [forked(lambda worker=worker: measured_async(model, folder, worker)) for _ in range(num_rounds)]
        rows += summary(name, rounds, unique)
    digests = [[{"tool": "xxh3_128 alone", "operation": "digest", **measured_digest(model)}] for _ in range(num_rounds)]
    rows += summary(name, digests, unique)
    for rounds in on_ranks(folder, tied=tied, size=size, num_rounds=num_rounds + 1):
        rows += summary(f"{name}, 2 ranks", rounds, unique)
    return rows


def main() -> None:
    """Measure both models, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cpu", help="cuda: a draft on a GPU, see checkpoint_on_gpu.py")
    parser.add_argument("--size", type=float, default=0.5, help="GB of unique bytes, on the CPU")
    parser.add_argument("--scale", type=int, default=1, help="what the dimensions of the draft are divided by")
    parser.add_argument("--rounds", type=int, help="5 on the CPU, 2 on a GPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; the disk that is measured")
    parser.add_argument("--ranked", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tied", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu" and arguments.scale == 1
    arguments.rounds = arguments.rounds or (5 if on_cpu else 2)
    if not on_cpu:
        run(arguments)
        return
    torch.set_num_threads(1)
    if arguments.ranked is not None:
        as_rank(arguments.ranked, tied=bool(arguments.tied), size=arguments.size, num_rounds=arguments.rounds)
    rows = []
    for tied in (True, False):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows += run_case(Path(folder), tied=tied, size=arguments.size, num_rounds=arguments.rounds)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows += forked(lambda: many_names(Path(folder)))
    print(table(rows))
    if arguments.out is not None:
        found = {"environment": {"size_gb": arguments.size, **environment(*PACKAGES)}, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
