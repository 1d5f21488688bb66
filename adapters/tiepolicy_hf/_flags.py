"""Step 3, flags: what the tie flags of a model must say for what is really tied, in memory and in `config.json`.

A flag that calls tied what is not lets the next `tie_weights()` replace a trained head; one that calls untied what is
lets the next load fill it with random values. So a flag is true exactly if all pairs that it speaks of are one tensor.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tiepolicy import TiePlan, named_modules, observe
from tiepolicy_hf._declared import FLAG, Declaration, declarations


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A flag that says something else than the model is."""

    config: object
    #: Where the flag is, from the module that declares: `config.text_config.tie_word_embeddings`.
    flag: str
    #: What it must say.
    value: bool


def are_tied(plan: TiePlan, a: str, b: str) -> bool:
    """Whether two names are the whole of one tensor."""
    whole = [*plan.whole_aliases(plan.canonical(a))]
    names = {plan.canonical(a), *(alias.name for alias in whole)}
    return a in names and b in names


def corrections(declared: list[Declaration], plan: TiePlan) -> list[Correction]:
    """The flags that contradict the model, each once."""
    found: dict[int, Correction] = {}
    spoken_for = {id(declaration.config) for declaration in declared if declaration.binding}
    for config in {id(declaration.config): declaration.config for declaration in declared}.values():
        mine = [declaration for declaration in declared if declaration.config is config]
        # A flag that transformers reads answers for the names it ties; what other modules make of it comes second.
        binding = [declaration for declaration in mine if declaration.binding]
        relevant = binding or mine
        pairs = [pair for declaration in relevant for pair in declaration.pairs if set(pair) <= set(plan.tensors)]
        tied = bool(pairs) and all(are_tied(plan, *pair) for pair in pairs)
        says = bool(getattr(config, FLAG, False))
        # Where nobody ties by a flag, making it true would promise a tie that nobody makes.
        if tied != says and pairs and (binding or not tied or spoken_for):
            found[id(config)] = Correction(config=config, flag=relevant[0].flag, value=tied)
    return list(found.values())


def rebuilt_pairs(declared: list[Declaration], fixes: list[Correction]) -> list[tuple[str, str]]:
    """Source and alias of what transformers ties when it loads the model with corrected flags."""
    value_of = {id(fix.config): fix.value for fix in fixes}
    return [
        pair
        for declaration in declared
        if declaration.binding and value_of.get(id(declaration.config), declaration.value)
        for pair in declaration.pairs
    ]


def declared_by(model: nn.Module) -> list[Declaration]:
    """What a model declares."""
    return list(declarations(model, observe(model)))


def corrected_config(config: Any, fixes: list[Correction]) -> Any:
    """A copy of a model's config with the flags set right; what it was copied from is not changed."""
    paths = dict(_parts(config, ()))
    corrected = copy.deepcopy(config)
    for fix in fixes:
        path = paths.get(id(fix.config))
        if path is not None:
            part = corrected
            for attribute in path:
                part = getattr(part, attribute)
            setattr(part, FLAG, fix.value)
    return corrected


def correct_flags_(model: nn.Module, plan: TiePlan) -> list[Correction]:
    """Set the flags of a live model right, and the list of ties that transformers made of them when it was built.

    After that neither `tie_weights()` nor `resize_token_embeddings()` ties what the plan keeps apart.
    """
    fixes = corrections(declared_by(model), plan)
    for fix in fixes:
        setattr(fix.config, FLAG, fix.value)
    for prefix, module in named_modules(model):
        made = getattr(module, "all_tied_weights_keys", None)
        if isinstance(made, dict):
            start = f"{prefix}." if prefix else ""
            kept = {alias: origin for alias, origin in made.items() if are_tied(plan, start + alias, start + origin)}
            if kept != made:
                module.all_tied_weights_keys = kept  # type: ignore[assignment]  # a plain attribute of the module
    return fixes


def _parts(config: Any, path: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Every config within a config, by its identity, with the attributes that lead to it."""
    yield id(config), path
    for name, part in vars(config).items():
        if hasattr(part, "to_dict") and hasattr(part, "model_type"):
            yield from _parts(part, (*path, name))
