"""The example plugin: its wheel is built and installed, and the default policy finds and judges what it claims."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "plugin"


def python(*arguments, site):
    """Run Python with the installed example and this library on its path."""
    paths = [str(site), *(path for path in sys.path if path)]
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that pip installed the example's wheel into, without network."""
    folder = tmp_path_factory.mktemp("example")
    wheels, target = folder / "wheels", folder / "site"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(EXAMPLE)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = wheels.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return target


def test_the_default_policy_finds_the_installed_plugin_and_judges_its_claims(site):
    code = """
import tiepolicy
from loom_ties.framework import LoomModel
print(tiepolicy.plan(LoomModel(vocab_size=12, head_sizes=(12, 8), hidden_size=4)))
"""
    expected = """\
3 tensors, 1 tied group (192 B saved), 1 claim refused

stored        also named      shape    dtype    saved  because
table.weight  heads.0.weight  (12, 4)  float32  192 B  same-object

refused
  heads.1.weight (8, 4) and table.weight (12, 4) cannot be one tensor: shapes differ; claimed by \
LoomModel.registry['table.weight']
"""
    result = python("-c", code, site=site)
    assert expected == result.stdout, result.stderr


def test_the_command_lists_the_installed_plugin_with_its_version(site):
    result = python("-m", "tiepolicy", "plugins", site=site)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["loom", "loom_ties.plugin", "tiepolicy_claims", "tiepolicy-example-loom", "0.1.0"] in rows, result.stderr


def test_the_examples_own_tests_pass_against_what_is_installed(site):
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", EXAMPLE, EXAMPLE / "tests"]
    result = python(*arguments, site=site)
    assert (0, True) == (result.returncode, "2 passed" in result.stdout), result.stdout
