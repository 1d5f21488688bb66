"""What the documents show is what happens."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT, ROOT / "adapters"]
WITH_EXAMPLES = [
    ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
    for source in SOURCES
    for package in ("tiepolicy", "tiepolicy_dcp", "tiepolicy_hf", "tiepolicy_fsdp2", "eagle3")
    for path in sorted((source / package).rglob("*.py"))
    if ">>> " in path.read_text()
]


def test_the_page_of_the_architecture_names_every_module():
    tree = (ROOT / "docs" / "architecture.md").read_text().split("## The modules")[1]
    modules = [*(ROOT / "tiepolicy").glob("*.py"), *(ROOT / "adapters").glob("*/*.py"), *(ROOT / "eagle3").glob("*.py")]
    missing = {path.name for path in modules if path.name not in tree}
    assert [] == sorted(missing - {"__init__.py", "__main__.py"})


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(module))
    assert (0, True) == (results.failed, results.attempted > 0)
