"""Turns what a Hugging Face model declares about its ties into claims; imports no transformers.

A declaration is two things: a flag in the config, and which names it means. The names come from the class
(`_tied_weights_keys`, a mapping of alias to source since transformers 5, a list of aliases before) or, where it has
none, from `get_input_embeddings()` and `get_output_embeddings()`.
"""

import re
from collections.abc import Iterator, Mapping

from torch import nn

from tiepolicy import Claim, Facts, Source, hookimpl, named_modules

_FLAG = "tie_word_embeddings"


@hookimpl
def tiepolicy_claims(model: nn.Module | None, facts: Facts) -> list[Claim]:
    """Claim what every module of the tree with a config and a true flag declares."""
    if model is None:
        return []
    return [claim for prefix, module in named_modules(model) for claim in _declared(prefix, module, facts)]


def _declared(prefix: str, module: nn.Module, facts: Facts) -> Iterator[Claim]:
    flag = _true_flag(module)
    if flag is None:
        return
    start = f"{prefix}." if prefix else ""
    keys = getattr(module, "_tied_weights_keys", None) or ()
    source = _weight_name(module, "get_input_embeddings", facts)
    if isinstance(keys, Mapping):
        pairs = [(start + origin, start + alias) for alias, origin in keys.items()]
    elif keys:
        pairs = [] if source is None else [(source, start + alias) for alias in keys]
    else:
        output = _weight_name(module, "get_output_embeddings", facts)
        pairs = [] if source is None or output is None else [(source, output)]
    detail = f"{flag} and {type(module).__name__}._tied_weights_keys" if keys else flag
    for origin_pattern, alias_pattern in pairs:
        origins = _matching(origin_pattern, facts)
        for alias in _matching(alias_pattern, facts):
            if origins and alias != origins[0]:
                yield Claim((origins[0], alias), Source.DECLARED, detail)


def _true_flag(module: nn.Module) -> str | None:
    """Where a module's config says that embeddings are tied: its path, or None if no flag is true."""
    config = getattr(module, "config", None)
    if config is None:
        return None
    if getattr(config, _FLAG, False):
        return f"config.{_FLAG}"
    if getattr(getattr(config, "text_config", None), _FLAG, False):
        return f"config.text_config.{_FLAG}"
    return None


def _weight_name(module: nn.Module, getter: str, facts: Facts) -> str | None:
    """The name of the weight of a module's input or output embedding; None if it has none of its own."""
    get = getattr(module, getter, None)
    if get is None:
        return None
    try:
        embedding = get()
    except NotImplementedError:  # transformers' base class raises for models without embeddings
        return None
    path = next((path for path, child in named_modules(module) if child is embedding), None)
    weight = getattr(embedding, "weight", None)
    if path is None or weight is None:
        return None
    ending = f"{path}.weight" if path else "weight"
    return next((name for name in facts.names_of(weight) if f".{name}".endswith(f".{ending}")), None)


def _matching(pattern: str, facts: Facts) -> list[str]:
    """The names that a declared key means: the name itself, or all that it matches in full as an expression."""
    if pattern in facts:
        return [pattern]
    return sorted(name for name in facts if re.fullmatch(pattern, name))
