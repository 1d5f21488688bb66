"""The wheel: what it claims, and that what it publishes is found."""

import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {"tiepolicy", "tiepolicy_dcp", "tiepolicy_hf", "tiepolicy_fsdp2", "eagle3"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The wheel unpacked, as an installer does it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_claims_no_other_top_level_name(site):
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert TOP_LEVEL == names


def test_every_package_says_that_it_is_typed(site):
    packages = [path for path in site.iterdir() if not path.name.endswith(".dist-info")]
    assert [True] * len(packages) == [(path / "py.typed").exists() for path in packages]


def test_the_configs_of_the_trainer_come_with_it(site):
    names = {path.name for path in (site / "eagle3" / "configs").iterdir()}
    assert {path.name for path in (ROOT / "eagle3" / "configs").iterdir()} == names


def test_the_core_needs_only_torch_pluggy_safetensors_and_numpy(site):
    (metadata,) = site.glob("*.dist-info/METADATA")
    requirements = email.message_from_string(metadata.read_text()).get_all("Requires-Dist")
    needed = {re.split("[<>]", requirement)[0] for requirement in requirements if "extra ==" not in requirement}
    assert {"torch", "pluggy", "safetensors", "numpy"} == needed


def test_plugins_are_loaded_from_the_wheel_by_their_entry_points(site):
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
import tiepolicy
from importlib.metadata import entry_points
from tiepolicy._policy import default_policy
names = [plugin.name for plugin in default_policy().plugins()]
files = {{name.split(".")[0]: sys.modules[name].__file__ for name in ("tiepolicy", "tiepolicy_hf")}}
print(names, all(file.startswith({str(site)!r}) for file in files.values()))
"""
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "['built-in rules', 'hf'] True" == result.stdout.strip()


@pytest.mark.parametrize(
    ("code", "absent", "expected"),
    [
        ("import eagle3.cli", "shtab", "eagle3: error: shtab is missing: pip install 'tiepolicy[eagle3]'"),
        (
            "tiepolicy_hf.from_pretrained",
            "transformers",
            "ImportError: from_pretrained needs transformers: pip install 'tiepolicy[hf]'",
        ),
        (
            "import tiepolicy.testing",
            "hypothesis",
            "ImportError: tiepolicy.testing needs hypothesis: pip install 'tiepolicy[testing]'",
        ),
    ],
)
def test_what_needs_an_extra_says_how_to_get_it(code, absent, expected):
    code = f"import sys, tiepolicy_hf; sys.modules[{absent!r}] = None; {code}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert expected == result.stderr.splitlines()[-1]


def test_the_pins_fulfil_what_the_package_asks_for():
    """The constraints file pins each direct dependency, so that a fresh set-up is the one that was tested."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, groups = content["project"], content["dependency-groups"]
    named = chain(project["dependencies"], *project["optional-dependencies"].values(), *groups.values())
    asked = {item.split(">")[0].split("[")[0].lower() for item in named if isinstance(item, str)}
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    # speculators wants an older transformers, and an environment of its own.
    assert asked - {"tiepolicy", "speculators"} <= pinned


def test_every_line_of_the_constraints_pins_a_released_version():
    """A path, or a build for one kind of machine, would fail elsewhere."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [] == [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*(\.post\d+)?", line)]
