"""python benchmarks/bench_plan.py --out plan.json.

How long does it take to decide which of N tensors are one? `tiepolicy.plan` beside the tools that answer the same
question, or a part of it, in one process. Each round runs every tool once, in turn, so that a busy moment of the
machine hits all of them. Times are CPU time of this process; the garbage collector is off while a tool runs.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import _find_shared_tensors, _remove_duplicate_names
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import tiepolicy

State = dict[str, torch.Tensor]


def one_pair(count: int) -> State:
    """Tensors of their own, and one pair that is one tensor."""
    return tied(count, num_tied=1)


def one_percent(count: int) -> State:
    """One name in a hundred is a second name of another tensor."""
    return tied(count, num_tied=count // 100)


def tied(count: int, *, num_tied: int) -> State:
    """`num_tied` names of the `count` are second names."""
    state = {f"layers.{index}.weight": torch.empty(4, 4) for index in range(count - num_tied)}
    names = list(state)
    return state | {f"heads.{index}.weight": state[names[index]] for index in range(num_tied)}


def one_storage(count: int) -> State:
    """All names are separate parts of one storage."""
    flat = torch.empty(count * 16)
    return {f"layers.{index}.weight": part.view(4, 4) for index, part in enumerate(flat.split(16))}


def one_fused(count: int) -> State:
    """One tensor, and every other name a part of it: everything is tied."""
    flat = torch.empty((count - 1) * 16)
    return {"fused": flat} | {f"parts.{index}": part.view(4, 4) for index, part in enumerate(flat.split(16))}


def floor(state: State) -> None:
    """A bare loop that reads the facts and keeps nothing."""
    for tensor in state.values():
        _ = (
            tensor.untyped_storage()._cdata,  # noqa: SLF001
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )


def floor_grouped(state: State) -> object:
    """The same loop, grouping the names on what it read."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        key = (
            tensor.untyped_storage()._cdata,  # noqa: SLF001
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        groups.setdefault(key, []).append(name)
    return groups


class Holder(nn.Module):
    """A module that holds given tensors, for the tools that want one."""

    def __init__(self, state: State) -> None:
        super().__init__()
        parameters: dict[int, nn.Parameter] = {}
        for name, tensor in state.items():
            parameter = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            self.register_parameter(name.replace(".", "_"), parameter)


#: Each tool, and whether it looks at a module instead of a mapping.
TOOLS: dict[str, tuple[Callable[[Any], object], bool]] = {
    "floor: read the facts": (floor, False),
    "floor, grouped": (floor_grouped, False),
    "tiepolicy.plan": (tiepolicy.plan, False),
    "tiepolicy.plan(module)": (tiepolicy.plan, True),
    "safetensors._find_shared_tensors": (_find_shared_tensors, False),
    "safetensors._remove_duplicate_names": (_remove_duplicate_names, False),
    "hub.split_torch_state_dict": (split_torch_state_dict_into_shards, False),
    "dcp.get_model_state_dict": (get_model_state_dict, True),
}
if importlib.util.find_spec("accelerate") is not None:
    accelerate = importlib.import_module("accelerate.utils.modeling")
    TOOLS["accelerate.find_tied_parameters"] = (accelerate.find_tied_parameters, True)
CASES: dict[str, Callable[[int], State]] = {
    "one pair": one_pair,
    "1% tied": one_percent,
    "one storage": one_storage,
    "all tied": one_fused,
}


def measure(case: str, count: int, *, num_rounds: int) -> list[dict[str, Any]]:
    """Microseconds per tensor of every tool on one case."""
    state = CASES[case](count)
    module = Holder(state)
    times: dict[str, list[float]] = {name: [] for name in TOOLS}
    failures: dict[str, str] = {}
    for _ in range(num_rounds + 1):  # the first round warms up
        for name, (tool, wants_module) in TOOLS.items():
            if name in failures:
                continue
            source: Any = module if wants_module else state
            gc.collect()
            gc.disable()
            start = time.process_time()
            try:
                tool(source)
            except RuntimeError as error:
                failures[name] = str(error).splitlines()[0][:60]
            times[name].append((time.process_time() - start) / count * 1e6)
            gc.enable()
    rows = []
    base = statistics.median(times["floor: read the facts"][1:])
    for name in TOOLS:
        row: dict[str, Any] = {"case": case, "tensors": count, "tool": name}
        if name in failures:
            rows.append(row | {"error": failures[name]})
            continue
        kept = times[name][1:]
        median = statistics.median(kept)
        rows.append(row | {"us": median, "us_min": min(kept), "us_max": max(kept), "times_floor": median / base})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line per tool, case and size."""
    lines = [f"{'case':12} {'tensors':>8}  {'tool':36} {'us/tensor':>9}  {'min..max':>14}  {'x floor':>7}"]
    for row in rows:
        head = f"{row['case']:12} {row['tensors']:8}  {row['tool']:36}"
        if "error" in row:
            lines.append(f"{head} raises: {row['error']}")
        else:
            spread = f"{row['us_min']:.2f}..{row['us_max']:.2f}"
            lines.append(f"{head} {row['us']:9.2f}  {spread:>14}  {row['times_floor']:7.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measure all cases and sizes, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        for count in arguments.sizes:
            rows += measure(case, count, num_rounds=arguments.rounds)
    print(table(rows))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        found = {"rounds": arguments.rounds, **environment("safetensors", "huggingface_hub")}
        arguments.out.write_text(json.dumps({"environment": found, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
