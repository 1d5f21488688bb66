"""Step 1, declarations: which names a Hugging Face model says are one tensor, and which flags say so, as claims.

A declaration is two things: a flag in a config, and which names it means. The names come from the class
(`_tied_weights_keys`, a mapping of alias to source since transformers 5, a list of aliases before) or, where it has
none, from `get_input_embeddings()` and `get_output_embeddings()`. The flag that transformers reads is the one in the
config of the module that has the names; a flag of the text part below it is read by other tools, and claims too.

Imports no transformers: a plugin is loaded by everybody who plans a model.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from tiepolicy import Claim, Facts, Source, hookimpl, named_modules

FLAG = "tie_word_embeddings"
#: Where a composite config keeps the part that describes text, as transformers' `get_text_config` looks for it.
_TEXT_PARTS = ("text_config", "decoder", "generator", "text_encoder")
# A key that is a name and no expression; transformers takes any other for an expression, or the name of a module.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What one flag says about the names of one module."""

    module: nn.Module
    #: The config that holds the flag.
    config: object
    value: bool
    #: Whether transformers ties by this flag: it is the module's own, and the class maps aliases to sources.
    binding: bool
    #: Source and alias, full names of tensors in the model.
    pairs: tuple[tuple[str, str], ...]
    #: Where the flag is, from the module, and the keys, in words for messages.
    detail: str


def declarations(model: nn.Module, facts: Facts) -> Iterator[Declaration]:
    """Every flag of every module that has names for it to mean; a module's own flag before those of its text part."""
    for prefix, module in named_modules(model):
        config = getattr(module, "config", None)
        if config is None:
            continue
        keys = getattr(module, "_tied_weights_keys", None) or ()
        flags = list(_flags("config", config))
        # Most modules of a model keep its config and declare nothing.
        if not keys and not any(value for _, _, value in flags):
            continue
        pairs = tuple(_pairs(prefix, module, keys, facts))
        if not pairs:
            continue
        for path, holder, value in flags:
            yield Declaration(
                module=module,
                config=holder,
                value=value,
                binding=holder is config and isinstance(keys, Mapping),
                pairs=pairs,
                detail=f"{path}.{FLAG}" + (f" and {type(module).__name__}._tied_weights_keys" if keys else ""),
            )


def _flags(path: str, config: object) -> Iterator[tuple[str, object, bool]]:
    """The flag of a config and of the text parts below it: where it is, who holds it, whether it is true."""
    yield path, config, bool(getattr(config, FLAG, False))
    for name in _TEXT_PARTS:
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "__dict__"):
            yield from _flags(f"{path}.{name}", part)


def _pairs(prefix: str, module: nn.Module, keys: object, facts: Facts) -> Iterator[tuple[str, str]]:
    start = f"{prefix}." if prefix else ""
    if isinstance(keys, Mapping):
        yield from _mapped(start, keys, facts)
        return
    source = _weight_name(module, "get_input_embeddings", facts)
    if source is None:
        return
    if keys:
        aliases = [name for key in keys for name in _matching(start, key, facts)]  # type: ignore[attr-defined]  # a list, by convention
    else:
        output = _weight_name(module, "get_output_embeddings", facts)
        aliases = [] if output is None else [output]
    yield from ((source, alias) for alias in dict.fromkeys(aliases) if alias != source)


def _mapped(start: str, keys: Mapping[str, str], facts: Facts) -> Iterator[tuple[str, str]]:
    """Pairs of a mapping of alias to source, each a name, a module or an expression, paired as transformers does."""
    source_of: dict[str, str] = {}
    for alias_key, source_key in keys.items():
        sources, aliases = _matching(start, source_key, facts), _matching(start, alias_key, facts)
        if not sources or len(aliases) % len(sources):
            continue
        for alias, source in zip(aliases, itertools.cycle(sources), strict=False):
            if alias != source:
                source_of[alias] = source_of.get(source, source)
    yield from ((source, alias) for alias, source in source_of.items())


def _matching(start: str, key: str, facts: Facts) -> list[str]:
    """The names that a declared key means: the name itself, the tensors of that module, or what it matches in full.

    Unlike `re.search`, which takes every name that only begins like the key.
    """
    if start + key in facts:
        return [start + key]
    pattern = re.escape(key) if _PLAIN_NAME.fullmatch(key) else key
    whole = re.compile(rf"(?:{pattern})(?:\..+)?")
    return sorted(name for name in facts if name.startswith(start) and whole.fullmatch(name, len(start)))


def _weight_name(module: nn.Module, getter: str, facts: Facts) -> str | None:
    """The name of the weight of a module's input or output embedding; None if it has none of its own."""
    get = getattr(module, getter, None)
    if get is None:
        return None
    try:
        embedding = get()
    except (NotImplementedError, AttributeError):  # transformers' base class raises for models without embeddings
        return None
    path = next((path for path, child in named_modules(module) if child is embedding), None)
    weight = getattr(embedding, "weight", None)
    if path is None or weight is None:
        return None
    ending = f"{path}.weight" if path else "weight"
    return next((name for name in facts.names_of(weight) if f".{name}".endswith(f".{ending}")), None)


@hookimpl
def tiepolicy_claims(model: nn.Module | None, facts: Facts) -> list[Claim]:
    """Claim what the true flags of every module of the tree declare, each pair by the first flag that does."""
    if model is None:
        return []
    claims: dict[tuple[str, str], Claim] = {}
    for declared in declarations(model, facts):
        if declared.value:
            for pair in declared.pairs:
                claims.setdefault(pair, Claim(pair, Source.DECLARED, declared.detail))
    return list(claims.values())
