"""The scripts of `examples/` run as processes and print what their page shows."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchrun import torchrun

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SECTION = re.compile(r"^## (\S+)\.py\n\n(.+)\n\n```sh\n(.+)\n```\n\n```text\n((?:.*\n)*?)```$", re.MULTILINE)
#: Of the page: script, what it shows, the command that runs it, what it prints.
SECTIONS = {section[0]: section[1:] for section in SECTION.findall((EXAMPLES / "README.md").read_text())}


def run(script, folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == result.returncode, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_an_example_prints_what_its_page_shows(name, tmp_path):
    _, command, expected = SECTIONS[name]
    script = EXAMPLES / f"{name}.py"
    if command.startswith("python"):
        assert expected == run(script, tmp_path)
    else:
        result = torchrun(ROOT / "tests" / "example_ranks.py", script, num_processes=2)
        assert expected in result.stdout, result.stdout


def test_every_example_has_its_words_and_its_command_on_the_page():
    docstrings = {path.stem: ast.get_docstring(ast.parse(path.read_text())) for path in EXAMPLES.glob("*.py")}
    assert docstrings == {name: f"{title}\n\n{command}" for name, (title, command, _) in SECTIONS.items()}
