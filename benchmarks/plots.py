"""python benchmarks/plots.py --out docs/pictures.

Draws what the benchmarks measured, from the files in `benchmarks/results`, as SVG pictures. Nothing is measured here.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


#: Each picture with the results it is drawn from.
PICTURES: dict[str, tuple[str, Callable[[Results], Figure]]] = {
    "planning.svg": ("plan.json", draw_planning),
    "checkpoints.svg": ("checkpoint.json", draw_checkpoints),
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
