"""Step 38: draws what one or several runs measured: a picture, and one page that needs nothing beside it."""

import base64
import html
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eagle3.commands import ReportConfig
from eagle3.config import RunConfig, read_run_config
from eagle3.errors import DataError
from eagle3.evaluate import EVALUATION
from eagle3.files import naming_disk_errors, write_whole
from eagle3.metrics import METRICS, VALIDATION
from eagle3.terminal import say, waiting

PICTURE, PAGE = "report.png", "report.html"

# Told apart by people who do not see all colours, too (Okabe and Ito, "Color Universal Design", 2008).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# What a look at training or validation data holds, at least.
_MEASURED = {"step", "loss", "accepted", "accept_length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run wrote down.

    Attributes:
        name: Of its folder; the whole path where two folders have one name.
        config: Its settings.
        train: The lines of `metrics.jsonl`, at least one.
        validation: Those of `validation.jsonl`.
        evaluation: Its `evaluation.json`, if it was evaluated.
    """

    name: str
    config: RunConfig
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    evaluation: dict[str, Any] | None


def run_report(config: ReportConfig) -> None:
    """Draw the runs, and print where the report is.

    Raises:
        ConfigError: A folder holds no run.
        DataError: A run has measured nothing yet, or its files cannot be read.
    """
    for path in write_report(read_runs(config.runs), Path(config.out or config.runs[0])):
        say(f"{path}\n")


def read_runs(folders: Sequence[str]) -> list[RunRecord]:
    """Reads what runs wrote down.

    Args:
        folders: Of the runs.

    Returns:
        A record of each, in the order given.

    Raises:
        ConfigError: A folder holds no run.
        DataError: A run has measured nothing yet, or its files cannot be read.
    """
    paths = [Path(folder).resolve() for folder in folders]
    names = [path.name for path in paths]
    return [
        _read_run(path, name=name if names.count(name) == 1 else os.path.relpath(path, os.path.commonpath(paths)))
        for path, name in zip(paths, names, strict=True)
    ]


def write_report(runs: Sequence[RunRecord], out: Path) -> tuple[Path, Path]:
    """Draws the picture and writes the page, which holds a copy of it.

    Args:
        runs: At least one.
        out: Folder; made if it does not exist. An older report in it is replaced.

    Returns:
        The paths of the picture and of the page.

    Raises:
        CheckpointError: They cannot be written.
    """
    picture, page = out / PICTURE, out / PAGE
    with waiting("Drawing"):
        drawn = _draw(runs)
    with naming_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(picture, drawn)
        write_whole(page, _page(runs, drawn).encode())
    return picture, page


def _read_run(folder: Path, *, name: str) -> RunRecord:
    config = read_run_config(folder)
    train = _read_lines(folder / METRICS, _MEASURED | {"lr", "tokens_per_second"})
    if not train:
        raise DataError(f"{folder / METRICS} has no line yet: the run {folder} has measured nothing. Train first.")
    return RunRecord(
        name=name,
        config=config,
        train=train,
        validation=_read_lines(folder / VALIDATION, _MEASURED),
        evaluation=_read_evaluation(folder / EVALUATION),
    )


def _read_lines(path: Path, needed: set[str]) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # a run may be writing it just now
                break
            raise DataError(
                f"{path}:{number}: not JSON ({error}). Delete the line; the report needs the rest."
            ) from error
        if not (isinstance(entry, dict) and needed <= entry.keys()):
            raise DataError(f"{path}:{number}: no measurement of a run. Delete the line; the report needs the rest.")
        entries.append(entry)
    return entries


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {"greedy", "sampled", "simulated_by_depth"} <= dict(found).keys():
            return found
    except (OSError, ValueError, TypeError):
        pass
    raise DataError(f"{path} is not what `eagle3 evaluate` writes. Run it again, or delete the file.")


def _draw(runs: Sequence[RunRecord]) -> bytes:
    figure = Figure(figsize=(13, 7.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    panels: list[Callable[[Any, Sequence[RunRecord]], None]] = [
        _draw_loss,
        _draw_accept_length,
        _draw_depths_over_steps,
        _draw_rate,
        _draw_speed,
        _draw_acceptance_by_depth,
    ]
    for ax, panel in zip(axes.flat, panels, strict=True):
        panel(ax, runs)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        if len(ax.get_legend_handles_labels()[1]) > 1:
            ax.legend(frameon=False, fontsize=8)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    figure.suptitle(f"EAGLE-3 draft: {title}", fontsize=13, fontweight="bold")
    png = io.BytesIO()
    figure.savefig(png)
    return png.getvalue()


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _as_share(ax: Any) -> None:
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter("{x:.0%}")


def _series(entries: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _draw_over_steps(ax: Any, runs: Sequence[RunRecord], key: str) -> None:
    """A line for the training of each run, and a dashed one with points for its validation data."""
    for index, run in enumerate(runs):
        ax.plot(*_series(run.train, key), color=_color(index), linewidth=1.4, label=run.name)
        if run.validation and key in run.validation[0]:
            style = {"color": _color(index), "linestyle": "--", "marker": "o", "markersize": 3}
            ax.plot(*_series(run.validation, key), **style, label=f"{run.name}, validation")
    ax.set_xlabel("step")


def _draw_loss(ax: Any, runs: Sequence[RunRecord]) -> None:
    _draw_over_steps(ax, runs, "loss")
    ax.set_title("Loss")


def _draw_accept_length(ax: Any, runs: Sequence[RunRecord]) -> None:
    _draw_over_steps(ax, runs, "accept_length")
    for index, run in enumerate(runs):
        if run.evaluation:
            real = run.evaluation["greedy"]["accept_length"]
            ax.plot(run.train[-1]["step"], real, marker="*", markersize=12, linestyle="", color=_color(index))
            ax.annotate(
                f"{real:.2f} when decoding",
                (run.train[-1]["step"], real),
                xytext=(-8, -9),
                textcoords="offset points",
                ha="right",
                va="top",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
    ax.set_ylim(bottom=0)
    ax.set_title(f"Accept length, of {max(run.config.unroll.steps for run in runs)}")


def _draw_depths_over_steps(ax: Any, runs: Sequence[RunRecord]) -> None:
    """Of the first run: one line for each depth."""
    run = runs[0]
    num_depths = len(run.train[0]["accepted"])
    for depth in range(num_depths):
        shares = [entry["accepted"][depth] for entry in run.train]
        color = colormaps["viridis"](0.9 * depth / max(1, num_depths - 1))
        ax.plot([entry["step"] for entry in run.train], shares, color=color, linewidth=1.2, label=f"first {depth + 1}")
    _as_share(ax)
    ax.set_xlabel("step")
    ax.set_title("Share of chains that stand" + (f", {run.name}" if len(runs) > 1 else ""))


def _draw_rate(ax: Any, runs: Sequence[RunRecord]) -> None:
    _draw_over_steps(ax, runs, "lr")
    ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    ax.set_title("Learning rate")


def _draw_speed(ax: Any, runs: Sequence[RunRecord]) -> None:
    _draw_over_steps(ax, runs, "tokens_per_second")
    ax.set_ylim(bottom=0)
    ax.set_title("Tokens per second")


def _draw_acceptance_by_depth(ax: Any, runs: Sequence[RunRecord]) -> None:
    """Bars: the end of training, and what decoding found."""
    groups: list[tuple[str, Sequence[float], str, str]] = []
    for index, run in enumerate(runs):
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        if run.evaluation:
            groups.append((f"{prefix}simulated", run.evaluation["simulated_by_depth"], _color(index), ""))
            groups.append((f"{prefix}greedy", run.evaluation["greedy"]["by_depth"], _color(index), "///"))
            groups.append((f"{prefix}sampled", run.evaluation["sampled"]["by_depth"], _color(index), "..."))
        else:
            groups.append((f"{prefix}end of training", run.train[-1]["accepted"], _color(index), ""))
    width = 0.8 / len(groups)
    for place, (label, shares, color, hatch) in enumerate(groups):
        xs = [depth + 1 - 0.4 + width * (place + 0.5) for depth in range(len(shares))]
        alpha = 0.9 if not hatch else 0.55
        ax.bar(xs, shares, width=0.92 * width, color=color, alpha=alpha, hatch=hatch, edgecolor="white", label=label)
    _as_share(ax)
    ax.set_xticks(range(1, 1 + max(len(shares) for _, shares, _, _ in groups)))
    ax.set_xlabel("depth")
    ax.set_title("Share of chains that stand up to a depth")


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 1200px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; } th, td { padding: .25rem .9rem .25rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 1px solid #999; }
tr + tr td { border-top: 1px solid #eee; } details { margin-top: .5rem; } pre { overflow-x: auto; font-size: 13px; }
"""


def _page(runs: Sequence[RunRecord], picture: bytes) -> str:
    title = html.escape("EAGLE-3 draft: " + ", ".join(run.name for run in runs))
    source = base64.b64encode(picture).decode("ascii")
    settings = "".join(
        f"<details><summary>Settings of {html.escape(run.name)}</summary><pre>{html.escape(_settings(run))}</pre>"
        "</details>"
        for run in runs
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'</head>\n<body><h1>{title}</h1>\n<img alt="Measurements over steps and by depth; the numbers stand below."'
        f' src="data:image/png;base64,{source}">\n'
        f"<h2>At the end of training</h2>\n{_html_table(_ends(runs))}\n"
        f"<h2>Decoding</h2>\n{_html_table(_decodings(runs))}\n<h2>Settings</h2>\n{settings}\n</body></html>\n"
    )


def _settings(run: RunRecord) -> str:
    return json.dumps(asdict(run.config), indent=2)


def _ends(runs: Sequence[RunRecord]) -> list[list[str]]:
    depths = range(1, 1 + max(len(run.train[-1]["accepted"]) for run in runs))
    rows = [["run", "step", "loss", "accept length", *(f"first {depth}" for depth in depths), "tokens/s"]]
    for run in runs:
        last = run.train[-1]
        shares = [f"{share:.1%}" for share in last["accepted"]]
        shares += [""] * (len(depths) - len(shares))
        rows.append(
            [
                *(run.name, str(last["step"]), f"{last['loss']:.4f}"),
                *(f"{last['accept_length']:.2f} of {len(last['accepted'])}", *shares),
                f"{last['tokens_per_second']:.0f}",
            ]
        )
    return rows


def _decodings(runs: Sequence[RunRecord]) -> list[list[str]]:
    rows = [["run", "", "accept length", "tokens per pass", "tokens/s", "speed-up", "identical"]]
    for run in runs:
        found = run.evaluation
        if not found:
            rows.append([run.name, "not evaluated yet: eagle3 evaluate", *[""] * 5])
            continue
        of = f"of {found['num_drafted']}"
        rows.append([run.name, "simulated", f"{found['simulated']:.2f} {of}", *[""] * 4])
        for kind in ("greedy", "sampled"):
            part = found[kind]
            speed_up = part["tokens_per_second"] / part["tokens_per_second_alone"]
            identical = f"{found['num_identical']} of {found['num_prompts']}" if kind == "greedy" else ""
            rows.append(
                [
                    *(run.name, kind, f"{part['accept_length']:.2f} {of}", f"{part['tokens_per_pass']:.2f}"),
                    *(f"{part['tokens_per_second']:.0f}", f"{speed_up:.2f}", identical),
                ]
            )
    return rows


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    cells = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    cells += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in body]
    return f"<table>{''.join(cells)}</table>"
