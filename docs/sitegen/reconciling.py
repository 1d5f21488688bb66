"""The table of what loading does: each row is a small model held against a small checkpoint while the site is built."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import tiepolicy
import tiepolicy_dcp
from tiepolicy import Action, ActionKind, TensorSpec, TiePlan
from tiepolicy.errors import TiePolicyError

EMBED, HEAD = "embed.weight", "head.weight"
_SPEC = TensorSpec((12, 4), torch.float32)


class Model(nn.Module):
    """An embedding and a head.

    Args:
        tied: Whether they are one tensor.
        head_rows: Of the head; the embedding has 12.
        declared: Whether the model says that they are one, as those of transformers do.
    """

    def __init__(self, *, tied: bool, head_rows: int = 12, declared: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 4), nn.Linear(4, head_rows, bias=False)
        nn.init.zeros_(self.embed.weight)
        nn.init.ones_(self.head.weight)
        if tied:
            self.head.weight = self.embed.weight
        if declared:
            self.config = type("Config", (), {"tie_word_embeddings": True})
            self.get_input_embeddings, self.get_output_embeddings = lambda: self.embed, lambda: self.head


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case, in words, and how to find out what happens."""

    checkpoint: str
    model: str
    outcome: Callable[[], str]


def reconcile_table() -> str:
    """The table, with what the library did just now in its last column."""
    lines = ["| in the checkpoint | the live model | what happens |", "|---|---|---|"]
    lines += [f"| {row.checkpoint} | {row.model} | {row.outcome()} |" for row in ROWS]
    return "\n".join(lines) + "\n"


def reconciled(live: nn.Module, saved: TiePlan | dict[str, TensorSpec], **owners: nn.Module) -> str:
    """What `tiepolicy.reconcile` answers, in words."""
    try:
        actions = tiepolicy.reconcile(tiepolicy.plan(live, external=owners or None, digests=bool(owners)), saved)
    except TiePolicyError as error:
        return _failure(error)
    return "; ".join(map(_in_words, actions))


def loaded(stored: nn.Module, live: nn.Module) -> str:
    """What `tiepolicy_dcp.load` does with a checkpoint of one model and another live model, in words."""
    with tempfile.TemporaryDirectory() as folder:
        path = tiepolicy_dcp.save(Path(folder) / "checkpoint", model=stored)
        try:
            restored = tiepolicy_dcp.load(path, model=live)
        except TiePolicyError as error:
            return _failure(error)
    return "; ".join(map(_in_words, restored.actions))


def _in_words(action: Action) -> str:
    source = f"{action.external.source}" if action.external else action.saved
    words = {
        ActionKind.LOAD: f"load `{source}`" + ("" if source == action.name else f" into `{action.name}`"),
        ActionKind.COPY: f"copy `{source}` into `{action.name}`",
        ActionKind.COMPARE: f"read `{source}` and compare",
        ActionKind.EXTERNAL: f"take `{source}` as `{action.name}`, once its digest matches",
        ActionKind.LEAVE: f"leave `{action.name}`",
    }[action.kind]
    return f"{words} (assumed, and reported so)" if action.note.startswith("assumed") else words


def _failure(error: TiePolicyError) -> str:
    return f"`{type(error).__name__}`: {str(error).split('. ')[0]}"


def _tied_values() -> tuple[nn.Module, nn.Module]:
    """A model whose two tensors have equal values, and a tied one."""
    stored = Model(tied=False)
    nn.init.zeros_(stored.head.weight)
    return stored, Model(tied=True)


def _stage() -> nn.Module:
    """The last stage of a pipeline, which has the head only."""
    return nn.ModuleDict({"head": nn.Linear(4, 12, bias=False)})


def _draft_of(target: Model) -> Model:
    draft = Model(tied=False, head_rows=8)
    draft.embed = target.embed
    return draft


def _external() -> str:
    target = Model(tied=False)
    draft = _draft_of(target)
    return reconciled(draft, tiepolicy.plan(draft, external={"target": target}, digests=True), target=target)


def _other_owner() -> str:
    target, other = Model(tied=False), Model(tied=False)
    nn.init.ones_(other.embed.weight)
    saved = tiepolicy.plan(_draft_of(target), external={"target": target}, digests=True)
    return reconciled(_draft_of(other), saved, target=other)


ROWS = (
    Row(checkpoint="canonical name only", model="tied", outcome=lambda: reconciled(Model(tied=True), {EMBED: _SPEC})),
    Row(checkpoint="an alias only", model="tied", outcome=lambda: reconciled(Model(tied=True), {HEAD: _SPEC})),
    Row(checkpoint="both names, equal bytes", model="tied", outcome=lambda: loaded(*_tied_values())),
    Row(
        checkpoint="both names, different bytes",
        model="tied",
        outcome=lambda: loaded(Model(tied=False), Model(tied=True)),
    ),
    Row(
        checkpoint="canonical name, and a manifest that says alias",
        model="untied, same shape",
        outcome=lambda: reconciled(Model(tied=False), tiepolicy.plan(Model(tied=True))),
    ),
    Row(
        checkpoint="canonical name, no manifest",
        model="untied, same shape, declared tied",
        outcome=lambda: reconciled(Model(tied=False, declared=True), {EMBED: _SPEC}),
    ),
    Row(
        checkpoint="canonical name, no manifest",
        model="untied, another shape, declared tied",
        outcome=lambda: reconciled(Model(tied=False, head_rows=8, declared=True), {EMBED: _SPEC}),
    ),
    Row(
        checkpoint="name missing, nobody claims it",
        model="untied",
        outcome=lambda: reconciled(Model(tied=False), {EMBED: _SPEC}),
    ),
    Row(
        checkpoint="another shape",
        model="any",
        outcome=lambda: reconciled(Model(tied=True), {EMBED: TensorSpec((13, 4), torch.float32)}),
    ),
    Row(
        checkpoint="another dtype",
        model="any",
        outcome=lambda: reconciled(Model(tied=True), {EMBED: TensorSpec((12, 4), torch.float16)}),
    ),
    Row(checkpoint="left to another model", model="shares with that model", outcome=_external),
    Row(checkpoint="left to another model", model="shares with a different model", outcome=_other_owner),
    Row(
        checkpoint="canonical name, and a manifest that says alias",
        model="a pipeline stage with the alias only",
        outcome=lambda: reconciled(_stage(), tiepolicy.plan(Model(tied=True))),
    ),
)
