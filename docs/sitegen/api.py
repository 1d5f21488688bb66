"""The public names of a module, from what it defines and exports."""

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import TypeGuard

#: Public modules of each package, whose names the site documents.
MODULES = {
    "tiepolicy": ("tiepolicy", "tiepolicy.files"),
    "tiepolicy_dcp": ("tiepolicy_dcp",),
    "tiepolicy_hf": ("tiepolicy_hf",),
    "tiepolicy_fsdp2": ("tiepolicy_fsdp2",),
}


def api(module: str, *only: str) -> str:
    """Functions, classes, errors and the rest of what a module exports, or of a few names of it.

    Args:
        module: Its dotted name.
        only: The names to show; all if none are given.
    """
    namespace = importlib.import_module(module)
    parts: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": [], "Names": []}
    for name in only or exported(module):
        value = getattr(namespace, name)
        if _is_error(value) and value.__module__.split(".")[0] != module.split(".")[0]:
            continue  # it is on the page of the package that defines it
        kind, directive, options = _described(value)
        if kind == "Names":
            options = f"\n   {comment_of(module, name)}\n"
        parts[kind].append(f"```{{eval-rst}}\n.. {directive}:: {module}.{name}\n{options}```\n")
    shown = {kind: "\n".join(entries) for kind, entries in parts.items() if entries}
    if only or len(shown) == 1:
        return "\n".join(shown.values())
    return "\n".join(f"## {kind}\n\n{entries}" for kind, entries in shown.items())


def exported(module: str) -> tuple[str, ...]:
    """The public names of a module: those of `__all__`, or what it defines and what it imports `as` itself."""
    namespace = importlib.import_module(module)
    if hasattr(namespace, "__all__"):
        return tuple(namespace.__all__)
    return tuple(sorted(name for name in _origins(module) if not name.startswith("_")))


def comment_of(module: str, name: str) -> str:
    """The comment above a constant or an alias of types, where it is defined.

    Raises:
        LookupError: If it has none that begins with `#:`.
    """
    origin = _origins(module)[name]
    found = re.search(rf"((?:^#: .*\n)+){name}\b.*=", _source(origin), re.MULTILINE)
    if found is None:
        raise LookupError(f"{name} of {origin} is public: say what it is in a comment above it that begins with #:")
    return " ".join(line.removeprefix("#: ") for line in found[1].splitlines())


@functools.cache
def _origins(module: str) -> dict[str, str]:
    """The module that defines each name which a module defines or imports `as` itself."""
    origins = {}
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            origins[node.name] = module
        elif isinstance(node, ast.Assign):
            origins |= {target.id: module for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            origins |= {alias.name: node.module or "" for alias in node.names if alias.asname == alias.name}
    return origins


def _source(module: str) -> str:
    return Path(importlib.import_module(module).__file__ or "").read_text(encoding="utf-8")


def home_of(target: str) -> str | None:
    """Where the site documents what annotations call by the module that defines it; None if it does not.

    >>> home_of("tiepolicy._plan.TiePlan")
    'tiepolicy.TiePlan'
    """
    package, _, rest = target.partition(".")
    name = rest.rpartition(".")[2]
    if not rest.startswith("_"):
        return None
    return next((f"{module}.{name}" for module in MODULES.get(package, ()) if name in exported(module)), None)


def _is_error(value: object) -> TypeGuard[type[BaseException]]:
    return inspect.isclass(value) and issubclass(value, BaseException)


def _described(value: object) -> tuple[str, str, str]:
    """Under which heading a name stands, and the directive that documents it, with its options."""
    if _is_error(value):
        # One of the trainer's errors has the name of one of the core's, which is the one that is linked to.
        options = "   :no-index:\n" if value.__module__.startswith("eagle3") else ""
        return "Errors", "autoclass", f"   :members:\n   :show-inheritance:\n{options}"
    if inspect.isclass(value):
        return "Classes", "autoclass", "   :members:\n   :show-inheritance:\n"
    if inspect.isroutine(value):
        return "Functions", "autofunction", ""
    return "Names", "py:data", ""
