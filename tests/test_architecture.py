"""Imports point one way: up the list, in the order of the data."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What each package may import of the others.
PACKAGES = {
    "tiepolicy": (ROOT / "tiepolicy", set()),
    "tiepolicy_hf": (ROOT / "adapters" / "tiepolicy_hf", {"tiepolicy"}),
    "tiepolicy_dcp": (ROOT / "adapters" / "tiepolicy_dcp", {"tiepolicy"}),
    "tiepolicy_fsdp2": (ROOT / "adapters" / "tiepolicy_fsdp2", {"tiepolicy", "tiepolicy_dcp"}),
    "eagle3": (ROOT / "eagle3", {"tiepolicy", "tiepolicy_dcp", "tiepolicy_hf", "tiepolicy_fsdp2"}),
}

#: Reading order inside the packages: a module imports only modules that stand before it.
FLOW = {
    "tiepolicy": """errors _facts _memory _observe _claims _evidence _groups _values _conflict _external _retie
        _display _paths _manifest _plan hookspecs _rules _plugins _policy _reconcile _safetensors _pickles _metadata
        _contents _digests files _verify _diff _inspect _cli __main__ __init__ _laws testing""",
    "tiepolicy_hf": "_plugin _flags _folder _save _ties _load _trainer __init__",
    "tiepolicy_dcp": """_ranks _folder _devices _frames _files _archives _reader _writer _groups _state
        _stages _save _reconcile _load _root _staging _async _store __init__""",
    "tiepolicy_fsdp2": "_kept _groups _shard _materialize _pipeline __init__",
    "eagle3": """errors terminal files config options conversations features tokens data vocab description target
        cache capture parallel blueprint inputs teacher loss draft unroll flat pairs layers tape fused
        graphs optimizer metrics checkpoint finished step fused_scorer trainer embedded speculate commands
        evaluate export report demo speed forecast estimate cli __main__ __init__""",
}


def imported(path):
    """The modules that a file imports, dotted, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert 0 == node.level, f"{path} imports relatively"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_stands_before_them(package):
    folder, allowed = PACKAGES[package]
    used = {name.split(".")[0] for path in folder.glob("*.py") for name in imported(path)} & set(PACKAGES)
    assert used - {package} <= allowed


@pytest.mark.parametrize("package", FLOW)
def test_every_module_has_a_place_in_the_flow(package):
    assert sorted(FLOW[package].split()) == sorted(path.stem for path in PACKAGES[package][0].glob("*.py"))


@pytest.mark.parametrize("package", FLOW)
def test_modules_import_only_what_stands_before_them(package):
    order = FLOW[package].split()
    for path in PACKAGES[package][0].glob("*.py"):
        if path.stem == "__init__":
            continue
        siblings = {name.split(".")[1] for name in imported(path) if name.startswith(f"{package}.")} & set(order)
        later = [name for name in siblings if order.index(name) >= order.index(path.stem)]
        assert [] == later, f"{path.name} imports {later}, which stands after it"


@pytest.mark.parametrize("package", FLOW)
def test_the_steps_that_modules_name_are_counted_in_reading_order(package):
    modules = [PACKAGES[package][0] / f"{name}.py" for name in FLOW[package].split()]
    steps = [re.match(r'"""Step (\d+)', path.read_text()) for path in modules]
    numbers = [int(step[1]) for step in steps if step is not None]
    assert list(range(1, len(numbers) + 1)) == numbers


def test_the_core_imports_neither_transformers_nor_dcp():
    """Nor do the plugins that its default policy loads."""
    code = """
import sys, torch, tiepolicy
tiepolicy.plan({"a": torch.zeros(1)})
print([name for name in ("transformers", "torch.distributed.checkpoint") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]" == result.stdout.strip()


def test_only_one_core_module_reads_storages():
    readers = [path.name for path in (ROOT / "tiepolicy").glob("*.py") if "untyped_storage" in path.read_text()]
    assert ["_memory.py"] == readers


def test_transformers_is_imported_where_its_models_are_read_and_written_only():
    """A plugin that imported it would make everybody wait who plans a model."""
    plugin = PACKAGES["tiepolicy_hf"][0]
    for module in ("__init__", "_plugin"):
        assert "transformers" not in {name.split(".")[0] for name in imported(plugin / f"{module}.py")}
    for package in ("tiepolicy", "tiepolicy_dcp", "tiepolicy_fsdp2"):
        used = {name.split(".")[0] for path in PACKAGES[package][0].glob("*.py") for name in imported(path)}
        assert "transformers" not in used


def test_no_two_test_files_have_one_name():
    """They are imported by name alone, so the second would be taken for the first."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
