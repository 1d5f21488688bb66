"""Step 2, flags: what the tie flags of a model must say for what is really tied, in memory and in `config.json`.

A flag that calls tied what is not lets the next `tie_weights()` replace a trained head; one that calls untied what is
lets the next load fill it with random values. So a flag is true exactly if something that it speaks of is one tensor.
Where it speaks of several pairs and only some are (an encoder and a decoder share their embedding, the head has other
rows), no flag is right: then it stays true, both names are stored, which transformers reads as apart, and the names
that the live module ties by are cut down to the tied ones.
"""

import copy
from typing import Any, NamedTuple

from torch import nn

from tiepolicy import TiePlan, named_modules, observe
from tiepolicy_hf._plugin import FLAG, Declaration, declarations


class Correction(NamedTuple):
    """A flag that says something else than the model is."""

    config: object
    #: What the config's flag must say.
    value: bool


def are_tied(plan: TiePlan, a: str, b: str) -> bool:
    """Whether two names are the whole of one tensor."""
    canonical = plan.canonical(a)
    return {a, b} <= {canonical, *(alias.name for alias in plan.whole_aliases(canonical))}


def corrections(declared: list[Declaration], plan: TiePlan) -> list[Correction]:
    """The flags that contradict the model, each once."""
    found = []
    is_read = any(each.binding for each in declared)
    for config in {id(each.config): each.config for each in declared}.values():
        mine = [each for each in declared if each.config is config]
        # A flag that transformers reads answers for the names it ties; what other modules make of it comes second.
        relevant = [each for each in mine if each.binding] or mine
        pairs = [pair for each in relevant for pair in each.pairs if set(pair) <= plan.tensors.keys()]
        tied = any(are_tied(plan, *pair) for pair in pairs)
        # Where nobody ties by a flag, making it true would promise a tie that nobody makes.
        if pairs and tied != bool(getattr(config, FLAG, False)) and (is_read or not tied):
            found.append(Correction(config, tied))
    return found


def rebuilt_pairs(declared: list[Declaration], fixes: list[Correction]) -> list[tuple[str, str]]:
    """Source and alias of what transformers ties when it loads the model with corrected flags."""
    value_of = {id(fix.config): fix.value for fix in fixes}
    ties = [each for each in declared if each.binding and value_of.get(id(each.config), each.value)]
    return [pair for each in ties for pair in each.pairs]


def declared_by(model: nn.Module) -> list[Declaration]:
    """What a model declares."""
    return list(declarations(model, observe(model)))


def corrected_config(config: Any, fixes: list[Correction]) -> Any:
    """A copy of a model's config with the flags set right; what it was copied from is not changed."""
    corrected = copy.deepcopy(config)
    parts = dict(zip(_parts(config), _parts(corrected).values(), strict=True))
    for fix in fixes:
        if id(fix.config) in parts:
            setattr(parts[id(fix.config)], FLAG, fix.value)
    return corrected


def lasting(config: Any, fixes: list[Correction]) -> list[Correction]:
    """The corrections that outlive a save: some classes, as T5's, set their flag themselves whenever a file is read.

    There the flag in the file means something else, and changing it would change what the model computes.
    """
    if not hasattr(config, "to_dict"):
        return fixes
    read = type(config).from_dict(corrected_config(config, fixes).to_dict())
    parts = dict(zip(_parts(config), _parts(read).values(), strict=False))
    return [
        fix
        for fix in fixes
        if id(fix.config) not in parts or bool(getattr(parts[id(fix.config)], FLAG, fix.value)) is fix.value
    ]


def correct_flags_(model: nn.Module, plan: TiePlan) -> None:
    """Set the flags of a live model right, and the names that transformers ties by where a flag cannot say it.

    After that neither `tie_weights()` nor `resize_token_embeddings()` ties what the plan keeps apart.
    """
    declared = declared_by(model)
    for fix in lasting(getattr(model, "config", None), corrections(declared, plan)):
        setattr(fix.config, FLAG, fix.value)
    for prefix, module in named_modules(model):
        start = f"{prefix}." if prefix else ""
        binding = [each for each in declared if each.module is module and each.binding]
        pairs = [pair for each in binding for pair in each.pairs if pair[1].startswith(start)]
        tied = {alias: origin for origin, alias in pairs if are_tied(plan, origin, alias)}
        if len(tied) < len(pairs) and any(getattr(each.config, FLAG, False) for each in binding):
            keys = {alias.removeprefix(start): origin.removeprefix(start) for alias, origin in tied.items()}
            module._tied_weights_keys = keys  # type: ignore[assignment]  # noqa: SLF001 - the attribute models declare by
        made = getattr(module, "all_tied_weights_keys", None)
        if isinstance(made, dict):
            module.all_tied_weights_keys = {  # type: ignore[assignment]  # a plain attribute of the module
                alias: origin for alias, origin in made.items() if are_tied(plan, start + alias, start + origin)
            }


def _parts(config: Any) -> dict[int, Any]:
    """Every config within a config, by its identity, always in one order."""
    found = {id(config): config}
    for part in vars(config).values():
        if hasattr(part, "to_dict") and hasattr(part, "model_type"):
            found |= _parts(part)
    return found
