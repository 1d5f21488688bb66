"""The pages with code that runs here: their code runs, and their output is what it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

import tiepolicy
from tiepolicy._cli import main
from torchrun import torchrun

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "plugin"
GUIDES = ["cli", "concepts", "dcp", "fsdp2", "huggingface", "index", "migration", "plugins"]
PAGES = ["README.md", *(f"docs/{name}.md" for name in GUIDES)]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall((ROOT / page).read_text())


def printed(function):
    """What a function prints, errors included."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        function()
    return output.getvalue()


def commands(session):
    """The commands of a console session, each with the output that is shown for it."""
    return [part.split("\n", maxsplit=1) for part in re.split(r"^\$ ", session, flags=re.MULTILINE) if part]


def check_command(command, expected):
    program, *arguments = command.split()
    assert "tiepolicy" == program
    actual = printed(lambda: main(arguments))
    if arguments != ["plugins"]:
        assert expected == actual
        return
    # More plugins may be installed, and versions change: the rows that are shown are there.
    shown = [line.split() for line in expected.splitlines()]
    rows = [line.split() for line in actual.splitlines()]
    assert [row for row in shown if not any(row == other[: len(row)] for other in rows)] == []


# What plain DCP says when it saves in a single process.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(PLUGIN / "src")
    namespace, output = {}, ""
    for language, text in blocks(page):
        if language == "python" and not text.startswith(("# src/", "# tests/")):
            output = printed(lambda text=text: exec(compile(text, page, "exec"), namespace))
        elif language == "text":
            assert text == output
        elif language == "console":
            for command, expected in commands(text):
                check_command(command, expected)


def scripts(page):
    """Its scripts for torchrun by their names, each with what is shown for it."""
    script = re.compile(r"```py\n(# (\w+\.py): torchrun .*?)```(?:\n\n```output\n(.*?)```)?", re.DOTALL)
    return {name: (code, shown) for code, name, shown in script.findall((ROOT / page).read_text())}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("page", "name"), [(page, name) for page in PAGES for name in scripts(page)])
def test_a_script_of_a_page_runs_in_two_processes_and_prints_what_the_page_shows(page, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    code, shown = scripts(page)[name]
    (model,) = [text for _, text in blocks("docs/fsdp2.md") if text.startswith("# model.py\n")]
    Path("model.py").write_text(model)
    Path(name).write_text(code)
    result = torchrun(ROOT / "tests" / "example_ranks.py", name, num_processes=2)
    assert shown in result.stdout, result.stdout
    fails = name == "before.py" and torch.__version__ >= "2.12"  # 2.11 trains two copies and says nothing
    assert (fails, fails) == (result.returncode != 0, "in the same FSDP group" in result.stdout), result.stdout


@pytest.mark.parametrize(
    ("page", "name", "picture"), [("README.md", "draft", "draft.svg"), ("docs/concepts.md", "model", "plan.svg")]
)
def test_the_picture_on_a_page_is_that_of_its_model(page, name, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    code = next(text for language, text in blocks(page) if language == "python")
    printed(lambda: exec(compile(code, page, "exec"), namespace))
    assert (ROOT / "docs" / "pictures" / picture).read_text() == tiepolicy.plan(namespace[name]).to_svg()


def test_the_files_on_the_page_of_plugins_are_those_of_the_example():
    shown = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "docs" / "plugins.md").read_text(), re.DOTALL))
    shown["pyproject.toml"] = dict(blocks("docs/plugins.md"))["toml"]
    assert {path: (PLUGIN / path).read_text() for path in shown} == shown
    assert 4 == len(shown)
