"""python benchmarks/plots.py --out docs/pictures.

Draws what the benchmarks measured, from the files in `benchmarks/results`, as SVG pictures. Nothing is measured here.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from works import Work, sizes_of_work

from eagle3.speed import DEVICES, attention_flops, product_flops

RESULTS = Path(__file__).parent / "results"
# Told apart by people who do not see all colours, too (Okabe and Ito, "Color Universal Design", 2008).
OURS, OTHERS, FLOOR = "#0072B2", "#9a9a9a", "#D55E00"
_MARKERS = "osv^Dx*P"

Results = dict[str, Any]


def draw_planning(results: Results) -> Figure:
    """Microseconds per tensor over the number of tensors, for a state with few ties and for one where all are tied."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for ax, case in zip(panels, ("1% tied", "all tied"), strict=True):
        rows = [row for row in results["rows"] if row["case"] == case]
        tools = list(dict.fromkeys(row["tool"] for row in rows))
        for tool, marker in zip(tools, _MARKERS * 2, strict=False):
            points = sorted((row["tensors"], row["us"]) for row in rows if row["tool"] == tool and "us" in row)
            ours, floor = tool.startswith("tiepolicy"), tool.startswith("floor")
            color = OURS if ours else FLOOR if floor else OTHERS
            style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.8 if ours else 1.0}
            xs, ys = zip(*points, strict=True) if points else ((), ())  # a tool that fails has no time
            ax.loglog(xs, ys, label=tool, linestyle="--" if floor else "-", **style)
        ax.set_title(case)
        ax.set_xlabel("names in the model")
        _tidy(ax)
    panels[0].set_ylabel("microseconds per name")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    figure.suptitle(f"Deciding what is one tensor, torch {results['environment']['torch']}", fontsize=11)
    return figure


def draw_checkpoints(results: Results) -> Figure:
    """Seconds to save and load a checkpoint with one tied tensor, by one process."""
    operations = ("save", "load cold", "load warm")
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    rows = [row for row in results["rows"] if row["case"] == "tied" and row["operation"] in operations]
    tools = list(dict.fromkeys(row["tool"] for row in rows))
    for ax, operation in zip(figure.subplots(1, 3, sharey=True), operations, strict=True):
        found = {row["tool"]: row for row in rows if row["operation"] == operation}
        for place, tool in enumerate(reversed(tools)):
            if tool in found:
                row = found[tool]
                color = OURS if tool.startswith("tiepolicy") else OTHERS
                spread = [[row["seconds"] - row["seconds_min"]], [row["seconds_max"] - row["seconds"]]]
                ax.barh(place, row["seconds"], color=color, xerr=spread, error_kw={"linewidth": 0.8})
        ax.set_yticks(range(len(tools)), list(reversed(tools)))
        ax.set_title(operation)
        ax.set_xlabel("seconds")
        _tidy(ax)
    size, version = results["environment"]["size_gb"], results["environment"]["torch"]
    figure.suptitle(f"A checkpoint of {size:g} GB with a tied tensor, torch {version}", fontsize=11)
    return figure


#: What a step's kernels are for, in the order in which they are drawn, each with its colour.
_PARTS = {
    "matrix products": "#0072B2",
    "attention": "#D55E00",
    "loss": "#009E73",
    "AdamW": "#CC79A7",
    "norms": "#E69F00",
    "activation": "#56B4E9",
    "heads": "#F0E442",
    "copies": "#6b6b6b",
    "other": "#bdbdbd",
}


def draw_step(results: Results) -> Figure:
    """Where the time of a training step goes: the share of each kind of kernel."""
    rows = [row for row in results["results"] if row["kind"] == "ours" and "profile" in row]
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.3), layout="constrained")
    ax = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        total, start = sum(part["ms"] for part in row["profile"].values()), 0.0
        for name, color in _PARTS.items():
            share = 100 * row["profile"].get(name, {"ms": 0.0})["ms"] / total
            ax.barh(place, share, left=start, color=color, label=name if place == 0 else None)
            start += share
        ax.text(101, place, f"{row['ms']:.1f} ms", va="center")
    ax.set_yticks(range(len(rows)), [_work_name(row["work"]) for row in reversed(rows)])
    ax.set_xlim(0, 112)
    ax.set_xticks(range(0, 101, 20))
    ax.set_xlabel("% of the time of all kernels")
    _tidy(ax)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    found = results["environment"]
    figure.suptitle(f"Kernels of a training step, {found['gpu']}, torch {found['torch']}", fontsize=11)
    return figure


def draw_roofline(results: Results) -> Figure:
    """Operations per second of a step's matrix products and attention, over the operations for each byte they move."""
    device = DEVICES["h200"]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    ax = figure.subplots()
    intensities = [2.0**power for power in range(4, 13)]
    roof = [min(device.flops, device.bandwidth * intensity) / 1e12 for intensity in intensities]
    ax.loglog(intensities, roof, color="black", linewidth=1.2, label="data sheet: memory, then products")
    rows = [row for row in results["results"] if row["kind"] == "ours" and "profile" in row]
    for row, marker in zip(rows, itertools.cycle(_MARKERS + "<>"), strict=False):
        for (operations, moved, milliseconds), color in zip(_work_done(row), (OURS, "#009E73"), strict=True):
            point = (operations / moved, operations / milliseconds / 1e9)
            ax.loglog(*point, marker=marker, color=color, linestyle="", markersize=6)
        ax.plot([], [], marker=marker, color="black", linestyle="", markersize=5, label=_work_name(row["work"]))
    ax.plot([], [], color=OURS, marker="s", linestyle="", label="blue: matrix products")
    ax.plot([], [], color="#009E73", marker="s", linestyle="", label="green: attention")
    ax.set_xlabel("operations per byte that has to be moved")
    ax.set_ylabel("TFLOP/s")
    _tidy(ax)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    figure.suptitle(f"A training step below the roofline of an {device.name}", fontsize=11)
    return figure


def _work_name(work: dict[str, Any]) -> str:
    return Work(**work).name


def _work_done(row: Results) -> list[tuple[float, float, float]]:
    """Of matrix products and of attention: operations, bytes that must be read or written once, milliseconds."""
    sizes = sizes_of_work(Work(**row["work"]))
    s, pairs_of_rows = sizes, sizes.num_rows * sizes.num_steps
    later = s.num_rows * (s.num_steps - 1)
    # Rows, inputs, outputs of each product; all run forward, back to their input, and to their weight.
    shapes = [
        (s.num_tokens, 3 * s.target_hidden, s.hidden),
        (s.num_tokens, s.hidden, s.projected + 2 * s.keys),
        (s.num_rows, s.hidden, s.queries),
        (later, s.hidden, s.projected),
        (pairs_of_rows, s.queries, s.hidden),
        (pairs_of_rows, s.hidden, 3 * s.intermediate),
        (s.num_pairs, s.hidden, s.draft_vocab),
    ]
    moved = sum(3 * 2 * (rows * (wide + narrow) + wide * narrow) for rows, wide, narrow in shapes)
    moved += 2 * (s.num_teachers * (s.target_hidden + s.vocab) + s.target_hidden * s.vocab)
    operations = sum(product_flops(s, knows_argmax=False).values())
    # Queries, output, and their gradients; keys and values are read and their gradients written by few.
    of_attention = 2 * s.num_steps * s.num_tokens * (6 * s.queries + 8 * s.keys)
    milliseconds = {name: part["ms"] for name, part in row["profile"].items()}
    return [
        (operations, moved, milliseconds["matrix products"]),
        (attention_flops(s), of_attention, milliseconds["attention"]),
    ]


#: Each picture with the results it is drawn from.
PICTURES: dict[str, tuple[str, Callable[[Results], Figure]]] = {
    "planning.svg": ("plan.json", draw_planning),
    "checkpoints.svg": ("checkpoint.json", draw_checkpoints),
    "step.svg": ("eagle3.json", draw_step),
    "roofline.svg": ("eagle3.json", draw_roofline),
}


def draw_all(out: Path) -> None:
    """Draw every picture into a folder, with text as text and the same bytes for the same results."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (source, draw) in PICTURES.items():
        results = json.loads((RESULTS / source).read_text(encoding="utf-8"))
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
            draw(results).savefig(out / name, metadata={"Date": None})


def _tidy(ax: Axes) -> None:
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    draw_all(parser.parse_args().out)
