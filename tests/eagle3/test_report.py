"""Reports: a picture, and a page that needs nothing beside it."""

import json
import re

import pytest

from eagle3.cli import main
from eagle3.commands import ReportConfig
from eagle3.config import DataConfig, RunConfig, TargetConfig, write_run_config
from eagle3.errors import ConfigError, DataError
from eagle3.report import read_runs, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder, *, num_lines=3, validation=False, evaluated=False):
    """A run's folder as training leaves it."""
    folder.mkdir(parents=True)
    write_run_config(folder, RunConfig(out=str(folder), target=TargetConfig(model="m"), data=DataConfig(train="t")))
    lines = [
        {
            "step": 10 * n + 1,
            "epoch": 1,
            "loss": 5.0 / (n + 1),
            "accuracy": [0.2 * n, 0.1 * n],
            "accepted": [0.2 * n, 0.1 * n],
            "accept_length": 0.3 * n,
            "lr": 1e-4,
            "tokens_per_second": 100.0 + n,
        }
        for n in range(num_lines)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if validation:
        (folder / "validation.jsonl").write_text(text)
    if evaluated:
        decoding = {
            "accept_length": 1.25,
            "by_depth": [0.75, 0.5],
            "tokens_per_pass": 2.0,
            "num_tokens": 40,
            "tokens_per_second": 30.0,
            "tokens_per_second_alone": 20.0,
        }
        found = {"num_drafted": 2, "num_prompts": 4, "num_identical": 4, "simulated": 1.5}
        found |= {"simulated_by_depth": [0.8, 0.7], "greedy": decoding, "sampled": decoding}
        (folder / "evaluation.json").write_text(json.dumps(found))
    return str(folder)


def cells_of(page):
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_a_page_holds_its_picture_and_the_numbers_of_every_run(tmp_path):
    runs = read_runs(
        [write_run(tmp_path / "one", validation=True, evaluated=True), write_run(tmp_path / "two", num_lines=2)]
    )
    picture, page = write_report(runs, tmp_path / "out")
    assert PNG == picture.read_bytes()[:8]
    text = page.read_text()
    assert [] == re.findall(r'(?:src|href)="(?!data:)', text)
    rows = cells_of(text)
    assert ["one", "21", "1.6667", "0.60 of 2", "40.0%", "20.0%", "102"] in rows
    assert ["two", "11", "2.5000", "0.30 of 2", "20.0%", "10.0%", "101"] in rows
    assert ["one", "greedy", "1.25 of 2", "2.00", "30", "1.50", "4 of 4"] in rows
    assert ["two", "not evaluated yet: eagle3 evaluate", *[""] * 5] in rows


def test_the_command_takes_several_runs_and_writes_into_the_first(tmp_path, capsys):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    assert 0 == main(["report", one, two])
    assert [f"{one}/report.png", f"{one}/report.html"] == capsys.readouterr().out.split()
    assert 0 == main(["report", one, two, "--out", str(tmp_path / "out")])
    assert ["report.html", "report.png"] == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_names_of_runs_are_told_apart_and_cannot_become_part_of_the_page(tmp_path):
    runs = read_runs([write_run(tmp_path / "a" / "<b>"), write_run(tmp_path / "c" / "<b>")])
    assert ["a/<b>", "c/<b>"] == [run.name for run in runs]
    _, page = write_report(runs, tmp_path / "out")
    assert "<b>" not in page.read_text()


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    assert [1, 11, 21] == [line["step"] for line in read_runs([folder])[0].train]


def test_a_broken_line_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("broken\n" + path.read_text())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not JSON"):
        read_runs([folder])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("metrics.jsonl", b'{"a": 1}', r"metrics\.jsonl:1: no measurement of a run"),
        ("metrics.jsonl", b"\xff\xfe\n\n", r"metrics\.jsonl:1: not JSON"),
        ("validation.jsonl", b"[1]\n", r"validation\.jsonl:1: no measurement of a run"),
        ("evaluation.json", b"[1]", r"evaluation\.json is not what `eagle3 evaluate` writes"),
        ("evaluation.json", b"\xff", r"evaluation\.json is not what `eagle3 evaluate` writes"),
        ("run_config.json", b"null", r"run_config\.json, cannot be read"),
    ],
)
def test_a_file_that_no_run_writes_is_named(tmp_path, name, content, sentence):
    folder = write_run(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises((ConfigError, DataError), match=sentence):
        read_runs([folder])


def test_a_report_that_cannot_be_written_is_a_sentence(tmp_path, capsys):
    one = write_run(tmp_path / "one")
    (tmp_path / "file").touch()
    assert 2 == main(["report", one, "--out", str(tmp_path / "file" / "out")])
    expected = (
        f"eagle3: error: {tmp_path}/file/out cannot be written: Not a directory. Free some space or choose another"
    )
    assert capsys.readouterr().err.startswith(expected)


def test_a_run_that_measured_nothing_and_a_folder_without_a_run_are_refused(tmp_path):
    with pytest.raises(DataError, match="has measured nothing. Train first."):
        read_runs([write_run(tmp_path / "run", num_lines=0)])
    with pytest.raises(ConfigError, match=r"run_config\.json, cannot be read"):
        read_runs([str(tmp_path)])
    with pytest.raises(ConfigError, match="needs at least one run"):
        ReportConfig(runs=[])
