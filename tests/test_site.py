"""The site: what it says about code is all that the code has, and it fails to build where a page cannot be reached."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(autouse=True)
def generators(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)


def test_every_hook_is_on_the_page_of_hooks():
    from sitegen.hooks import hooks
    from tiepolicy import hookspecs

    names = [name for name in vars(hookspecs) if name.startswith("tiepolicy_")]
    assert [f"## {name}" for name in names] == [line for line in hooks().splitlines() if line.startswith("## ")]


def test_every_setting_is_in_the_tables_with_a_meaning():
    from eagle3.config import RunConfig
    from eagle3.options import _leaves
    from sitegen.settings import settings

    rows = [line.strip("|").split("|") for line in settings().splitlines() if line.startswith("| `")]
    names = [row[0].strip(" `") for row in rows]
    assert {name for name, _ in _leaves(RunConfig)} <= set(names)
    assert [] == [name for name, row in zip(names, rows, strict=True) if not row[-1].strip().endswith(".")]


@pytest.mark.parametrize("module", ["tiepolicy", "tiepolicy.files", "tiepolicy_dcp", "tiepolicy_hf", "tiepolicy_fsdp2"])
def test_every_public_name_is_on_the_page_of_its_package(module):
    from sitegen.api import api, exported

    namespace = importlib.import_module(module)
    undocumented = {name for name in exported(module) if f":: {module}.{name}\n" not in api(module)}
    elsewhere = {name for name in undocumented if getattr(namespace, name).__module__ == "tiepolicy.errors"}
    assert undocumented == elsewhere


def test_the_table_of_loading_is_what_the_library_does():
    from sitegen.reconciling import reconcile_table

    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in reconcile_table().splitlines()[2:]]
    outcome = {(checkpoint, model): happens for checkpoint, model, happens in rows}
    assert "load `head.weight` into `embed.weight`" == outcome["an alias only", "tied"]
    assert outcome["both names, different bytes", "tied"].startswith("`TieConflictError`: head.weight and embed.weight")
    assert len(rows) == len(outcome)


@pytest.mark.slow
def test_a_page_that_is_missing_from_the_navigation_fails_the_build(tmp_path):
    for name in ("adapters", "benchmarks", "docs", "eagle3", "tests", "tiepolicy"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "docs" / "stray.md").write_text("# A page that nobody finds\n")
    options = ["--builder", "dummy", "--fail-on-warning", "--quiet", "--fresh-env"]
    command = [sys.executable, "-m", "sphinx", *options, str(tmp_path / "docs"), str(tmp_path / "site")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 0 != result.returncode
    (warning,) = [line for line in result.stderr.splitlines() if "WARNING" in line]
    assert "stray.md: WARNING: document isn't included in any toctree" in warning
