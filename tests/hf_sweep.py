"""Saves and loads every class that `hf_zoo` builds, by transformers and by tiepolicy_hf, and compares what comes back.

    PYTHONPATH=.:adapters:tests python -m hf_sweep [CLASS ...]

prints the table.
"""

import collections
import gc
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

import tiepolicy
import tiepolicy_hf
from hf_zoo import VOCAB_SIZE, Entry, build, entries, fill_, logits, with_small_head

VARIANTS = ("tied", "untied", "small head")


class Row(NamedTuple):
    """What became of one class in one variant."""

    entry: Entry
    variant: str
    #: "passed", "differs", "not built", or "no head" for a variant that the class does not have.
    outcome: str
    reason: str = ""
    #: Whether the outputs were compared too; a few models need an image to give one.
    has_logits: bool = False
    num_tied: int = 0


def sweep(chosen: Iterable[Entry]) -> list[Row]:
    """All variants of the classes, one after another."""
    rows = []
    for number, entry in enumerate(chosen, start=1):
        for variant in VARIANTS:
            rows.append(_row(entry, variant))
            if rows[-1].outcome == "not built":
                break
        if number % 10 == 0:  # models refer to themselves, and a collection takes as long as saving one
            gc.collect()
    return rows


def table(rows: list[Row]) -> str:
    """Counts per kind and variant, then what was not built and what differs, each with its reason."""
    lines = [f"transformers {transformers.__version__}, torch {torch.__version__}", ""]
    lines.append(f"{'kind':<16} {'variant':<11} {'built':>5} {'passed':>6} {'tied':>5} {'outputs compared':>16}")
    for kind in dict.fromkeys(row.entry.kind for row in rows):
        for variant in VARIANTS:
            found = [row for row in rows if (row.entry.kind, row.variant) == (kind, variant)]
            built = [row for row in found if row.outcome in ("passed", "differs")]
            passed, tied = sum(row.outcome == "passed" for row in built), sum(row.num_tied > 0 for row in built)
            compared = sum(row.has_logits for row in built)
            lines.append(f"{kind:<16} {variant:<11} {len(built):>5} {passed:>6} {tied:>5} {compared:>16}")
    names = {row.entry.name for row in rows}
    lines += ["", f"{len(names)} classes, {len(built_classes(rows))} of them built"]
    for outcome in ("not built", "differs"):
        found = [row for row in rows if row.outcome == outcome]
        lines += ["", f"{outcome}: {len(found)}"]
        lines += [f"  {row.entry.name} ({row.variant}): {row.reason}" for row in found]
    return "\n".join(lines)


def built_classes(rows: list[Row]) -> set[str]:
    """The classes of which at least one variant was built."""
    return {row.entry.name for row in rows if row.outcome in ("passed", "differs")}


def _row(entry: Entry, variant: str) -> Row:
    torch.manual_seed(0)
    try:
        model = build(entry, tied=variant != "untied")
    except Exception as error:  # whatever a class raises for a config that is too small for it
        return Row(entry, variant, "not built", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    if variant == "small head":
        model = _with_small_head(model)
        if model is None:
            return Row(entry, variant, "no head")
    with tempfile.TemporaryDirectory() as folder:
        if variant != "small head" and not _transformers_reads_back(model, Path(folder, "theirs")):
            return Row(entry, variant, "not built", "transformers does not read back what it saves of it")
        try:
            problem = _difference(model, Path(folder), variant)
        except Exception as error:  # a crash is a difference, and the table names it
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    has_logits = _logits(model) is not None
    return Row(entry, variant, "differs" if problem else "passed", problem, has_logits, len(_ties(model)))


def _with_small_head(model: PreTrainedModel) -> PreTrainedModel | None:
    """The same class with a head of fewer rows under the inherited flag; None if its head is no plain matrix."""
    try:
        head = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    tied = {name for group in tiepolicy.plan(model).groups for name in group.names}
    names = tiepolicy.observe(model).names_of(head.weight) if isinstance(head, torch.nn.Linear) else []
    if not tied.intersection(names) or head.bias is not None or head.out_features != VOCAB_SIZE:
        return None
    small = with_small_head(type(model))(model.config).eval()
    fill_(small)
    return small


def _transformers_reads_back(model: PreTrainedModel, folder: Path) -> bool:
    try:
        model.save_pretrained(folder)
        type(model).from_pretrained(folder)
    except Exception:  # whatever its loader raises
        return False
    return True


def _difference(model: PreTrainedModel, folder: Path, variant: str) -> str:
    """Where a model that was saved and loaded differs from itself; empty if nowhere."""
    cls, state, output = type(model), _copied(model), _logits(model)
    ours, theirs = folder / "ours", folder / "theirs"
    tiepolicy_hf.save_pretrained(model, ours, max_shard_size="100KB")
    loads: dict[str, Callable[[], PreTrainedModel]] = {
        "saved and loaded by us": lambda: tiepolicy_hf.from_pretrained(cls, ours),
        "saved by us, loaded by transformers": lambda: cls.from_pretrained(ours),
    }
    ties = _ties(model)
    if variant != "small head":
        loads["saved by transformers, loaded by us"] = lambda: tiepolicy_hf.from_pretrained(cls, theirs)
    for name, load in loads.items():
        loaded = load().eval()
        problem = _compared(loaded, state, output, ties)
        if problem and variant != "small head":
            # What transformers itself does not bring back is not ours to bring back.
            reference = cls.from_pretrained(theirs).eval()
            problem = problem and _compared(loaded, _copied(reference), _logits(reference), _ties(reference))
        if problem:
            return f"{name}: {problem}"
        # Which of several pairs are tied, no flag in a file can say; what we load knows it.
        if variant == "small head" and (not ties or name == "saved and loaded by us"):
            loaded.tie_weights()
            problem = _compared(loaded, state, output, ties)
            if problem:
                return f"{name}, then tie_weights(): {problem}"
    return ""


def _compared(
    loaded: PreTrainedModel, state: dict[str, torch.Tensor], output: torch.Tensor | None, ties: set[tuple[str, ...]]
) -> str:
    found = loaded.state_dict()
    if state.keys() != found.keys():
        return f"other names: {sorted(state.keys() ^ found.keys())[:4]}"
    different = [name for name, tensor in state.items() if tiepolicy.first_difference(tensor, found[name]) is not None]
    if different:
        return f"{len(different)} other values: {different[:3]}"
    if _ties(loaded) != ties:
        return f"other ties: {sorted(ties ^ _ties(loaded))[:3]}"
    if output is not None and tiepolicy.first_difference(output, logits(loaded)) is not None:
        return "other outputs"
    return ""


def _ties(model: PreTrainedModel) -> set[tuple[str, ...]]:
    """The names that are one parameter, found by asking torch alone."""
    names = collections.defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {tuple(sorted(group)) for group in names.values() if len(group) > 1}


def _copied(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _logits(model: PreTrainedModel) -> torch.Tensor | None:
    try:
        return logits(model)
    except Exception:  # a model that wants an image, or more layers than two
        return None


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(table(sweep([entry for entry in entries() if not sys.argv[1:] or entry.name in sys.argv[1:]])))
