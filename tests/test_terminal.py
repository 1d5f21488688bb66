"""Both programs as a person meets them: help, versions, completion, widths, colours, and what is shown meanwhile."""

import argparse
import functools
import io
import os
import pty
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eagle3.cli
import tiepolicy._cli
from eagle3.cli import help_parser
from eagle3.options import read_settings
from eagle3.terminal import waiting, watched
from tiepolicy import _inspect


@functools.cache
def parsers():
    """The parser of each command of both programs, by what is typed."""
    found = {}
    for parser in (tiepolicy._cli.command_parser(), help_parser(eagle3.cli.COMMANDS)):
        found[parser.prog] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"{parser.prog} {name}": own for name, own in action.choices.items()}
    return found


def main_of(program):
    return {"tiepolicy": tiepolicy._cli.main, "eagle3": eagle3.cli.main}[program]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", parsers())
def test_help_fits_the_terminal(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert [] == [line for line in parsers()[command].format_help().splitlines() if len(line) > columns]


@pytest.mark.parametrize("command", parsers())
def test_everything_that_can_be_given_says_what_it_is(command):
    actions = parsers()[command]._actions
    listed = [entry for action in actions for entry in getattr(action, "_choices_actions", [action])]
    assert [] == [entry.dest for entry in listed if not (entry.help or "").strip()]


def test_help_of_a_command_is_what_it_was(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    expected = """\
usage: eagle3 report RUN [RUN ...] [--config FILE] [--SETTING VALUE ...]

Draw what one or several runs measured.

positional arguments:
  RUN            Folders of runs, to be compared. (required)

options:
  -h, --help     show this help message and exit
  --config FILE  YAML file with any of the settings below
  --out TEXT     Folder for `report.png` and `report.html`; null for that of
                 the first run. (default: null)

example:
  eagle3 report run another-run --out report

exit codes: 0 fine, 2 wrong input (said in one sentence), 130 interrupted
"""
    assert expected == parsers()["eagle3 report"].format_help()


def test_nobody_waits_for_torch_who_asks_eagle3_for_help_or_mistypes():
    code = """
import contextlib, sys
from eagle3.cli import main
for typed in (["--help"], ["--version"], ["train", "-h"], ["--print-completion", "bash"], ["trian"], ["train", "--x"]):
    with contextlib.suppress(SystemExit):
        main(typed)
sys.stderr.write(str({"torch", "transformers"} & {*sys.modules}))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "set()" == result.stderr.splitlines()[-1]
    assert 2 == result.stderr.count("did you mean")


@pytest.mark.parametrize("command", sorted(parsers().keys() - {"tiepolicy", "eagle3"}))
def test_the_example_of_a_command_is_one_line_that_it_takes(command, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()  # whose path --owner looks at
    (line,) = re.search(r"\nexample:\n((?:  .*\n)+)", parsers()[command].format_help())[1].splitlines()
    program, name, *typed = line.split()
    if program == "tiepolicy":
        assert tiepolicy._cli.command_parser().parse_args([name, *typed])
    else:
        chosen = eagle3.cli.COMMANDS[name]
        assert read_settings(chosen.settings, eagle3.cli._named(chosen, typed))


@pytest.mark.parametrize("program", ["tiepolicy", "eagle3"])
def test_a_program_knows_its_version(program, capsys):
    with pytest.raises(SystemExit) as caught:
        main_of(program)(["--version"])
    assert (0, f"{program} {version('tiepolicy')}\n") == (caught.value.code, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("program", "typed", "expected"),
    [
        ("tiepolicy", ["ver"], {"verify"}),
        ("tiepolicy", ["diff", "--va"], {"--values"}),
        ("eagle3", ["est"], {"estimate"}),
        ("eagle3", ["train", "--train.ep"], {"--train.epochs"}),
        ("eagle3", ["train", "--target.dtype", "b"], {"bfloat16"}),
        ("eagle3", ["train", "--train.step", "f"], {"fused"}),
    ],
)
def test_bash_completes_what_was_begun(program, typed, expected, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main_of(program)(["--print-completion", "bash"])
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    ask = f"source {script}; COMP_WORDS=({program} {' '.join(typed)}); COMP_CWORD={len(typed)}; "
    ask += f'_shtab_{program} {program} {typed[-1]} x; printf "%s\\n" "${{COMPREPLY[@]}}"'
    result = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert expected == set(result.stdout.split())


def test_without_shtab_the_core_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as caught:
        tiepolicy._cli.main(["--print-completion", "bash"])
    assert 2 == caught.value.code
    expected = "tiepolicy: error: --print-completion needs shtab: pip install 'tiepolicy[completion]'"
    assert f"{expected} (see tiepolicy --help)\n" == capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 120])
def test_long_names_go_on_in_further_lines_of_a_terminal_and_stay_whole_in_a_pipe(
    columns, tmp_path, capsys, monkeypatch
):
    name = f"a.{'long.' * 40}name"
    save_file({name: torch.zeros(2)}, tmp_path / "file.safetensors")

    def table():
        assert 0 == tiepolicy._cli.main(["inspect", str(tmp_path / "file.safetensors")])
        return capsys.readouterr().out.split("\n\n")[1].splitlines()

    monkeypatch.setenv("COLUMNS", str(columns))
    assert f"{name}  (2,)   float32  8 B   file.safetensors" == table()[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = table()
    assert columns == max(map(len, shown))
    assert name == "".join(line.split("  (2,)")[0].strip() for line in shown[1:])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_long_read_shows_how_much_was_read_and_takes_it_away(monkeypatch):
    monkeypatch.setattr(_inspect, "_PATIENCE_SECONDS", 0)
    monkeypatch.setattr(_inspect, "_PAUSE_SECONDS", 0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with _inspect.Meter("read", total=4_000_000) as meter:
        meter(1_000_000)
        meter(2_000_000)
    assert ["", "read: 1 MB of 4 MB", "read: 3 MB of 4 MB", " " * 18, ""] == terminal.getvalue().split("\r")


@pytest.mark.parametrize(("stream", "term"), [(io.StringIO, "xterm"), (Terminal, "dumb")])
def test_a_pipe_and_a_plain_terminal_show_nothing_of_it(stream, term, monkeypatch):
    monkeypatch.setattr(_inspect, "_PATIENCE_SECONDS", 0)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stderr", shown := stream())
    with _inspect.Meter("read") as meter:
        meter(1)
    assert "" == shown.getvalue()


@pytest.mark.parametrize(
    ("environment", "shown"), [({}, True), ({"TERM": "dumb"}, False), ({"RANK": "1"}, False), ({"RANK": "0"}, True)]
)
def test_what_takes_long_is_said_on_a_terminal_once_for_all_processes(environment, shown, monkeypatch):
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with waiting("Exporting"):
        pass
    assert [3] == list(watched([3], "answers", total=1))
    assert (shown, shown) == ("Exporting ..." in terminal.getvalue(), "answers" in terminal.getvalue())
    assert shown == bool(terminal.getvalue())


def test_a_bar_hands_on_what_it_watches_and_is_silent_in_a_pipe(capsys):
    with waiting("Exporting"):
        assert [3, 1, 2] == list(watched([3, 1, 2], "answers", total=3))
    assert ("", "") == capsys.readouterr()


def test_values_of_two_files_are_counted_as_they_are_compared(tmp_path, monkeypatch, capsys):
    counted = []
    monkeypatch.setattr(_inspect.Meter, "__call__", lambda _, num_bytes: counted.append(num_bytes))
    for name in ("a", "b"):
        save_file({"w": torch.zeros(3)}, tmp_path / f"{name}.safetensors")
    assert 0 == tiepolicy._cli.main(["diff", "--values", *(str(tmp_path / f"{name}.safetensors") for name in "ab")])
    assert [12] == counted


@pytest.mark.parametrize(
    ("program", "command", "step"),
    [
        ("tiepolicy", ["plugins"], "tiepolicy._cli.default_policy"),
        ("eagle3", ["report", "x"], "eagle3.report.read_runs"),
    ],
)
def test_who_interrupts_a_command_reads_one_line(program, command, step, monkeypatch, capsys):
    monkeypatch.setattr(step, lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
    try:
        assert (130, ("", f"{program}: interrupted\n")) == (main_of(program)(command), capsys.readouterr())
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("program", "code"),
    [("tiepolicy", "tiepolicy: standard output cannot be written: No space left on device"), ("eagle3", 2)],
)
def test_a_full_disk_behind_standard_output_is_a_sentence(program, code, monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as caught:
            sys.exit(main_of(program)(["--help"]))
    assert code == caught.value.code
    assert (
        program == "tiepolicy"
        or "eagle3: error: Standard output cannot be written: No space" in capsys.readouterr().err
    )


@pytest.mark.parametrize("program", ["tiepolicy", "eagle3"])
def test_a_reader_that_has_seen_enough_is_no_error(program, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as caught:
            main_of(program)(["--help"])
    assert (0, "") == (caught.value.code, capsys.readouterr().err)


def in_a_terminal(*command, **environment):
    """What a program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "80", **environment}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        output = b""
        while True:
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:  # nobody has the other end open any more
                break
            output += piece
    os.close(ours)
    return process.returncode, output.decode()


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}])
def test_tables_in_a_terminal_have_no_colours_where_none_are_wanted(environment, tmp_path):
    from eagle3_targets import make_target, make_world

    tokenizer, conversations = make_world(tmp_path, num_conversations=4)
    target = make_target(tmp_path / "target", tokenizer, vocab_size=600, tie_word_embeddings=True)
    given = ["--out", "run", "--target.model", target, "--data.train", conversations, "--draft.vocab_size", "64"]
    command = [sys.executable, "-m", "eagle3", "estimate", *map(str, given)]
    code, output = in_a_terminal(*command, **environment)
    assert (0, True) == (code, "parameters of the draft" in output)
    styles = [style for styles in re.findall(r"\x1b\[([0-9;]*)m", output) for style in styles.split(";")]
    # Bold and italic are no colours, but a dumb terminal shows their codes as they are.
    assert set(styles) <= ({"0", "1", "3"} if environment["TERM"] == "xterm" else set())
    assert [] == [line for line in output.splitlines() if len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)) > 80]
