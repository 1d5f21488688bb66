"""The modules of every package in reading order, each with the first sentence of its docstring."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def modules(package: str) -> str:
    """A table of a package's modules, in the order that the tests hold their imports to."""
    architecture = _architecture()
    folder: Path = architecture.PACKAGES[package][0]
    names = architecture.FLOW[package].split()
    lines = ["| module | what it does |", "|---|---|"]
    lines += [f"| `{name}` | {summary(folder / f'{name}.py')} |" for name in names]
    return "\n".join(lines) + "\n"


def summary(path: Path) -> str:
    """The first line of a module's docstring, without the number of its step."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = re.sub(r"^Step \d+[,:] *", "", doc.split("\n")[0])
    return line[:1].upper() + line[1:]


def _architecture() -> ModuleType:
    """The test that holds the arrows; the one place where the order is written down."""
    spec = importlib.util.spec_from_file_location("test_architecture", ROOT / "tests" / "test_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
