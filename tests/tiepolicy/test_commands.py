"""The commands: what they print, and how they exit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model

import tiepolicy
import tiepolicy_dcp
import tiepolicy_hf
from models import FlaggedPair, TiedPair, tiny_llama
from tiepolicy import _contents
from tiepolicy._cli import main
from tiepolicy._display import columns
from tiepolicy._inspect import WIDTH, printable
from tiepolicy.files import read_header

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A DCP checkpoint `tied`, another `flagged`, a file and a damaged file, under the working folder."""
    monkeypatch.chdir(tmp_path)
    tiepolicy_dcp.save("tied", model=TiedPair())
    tiepolicy_dcp.save("flagged", model=FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=8, hidden_size=4))
    save_file({EMBED: torch.zeros(12, 4)}, tmp_path / "file.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    return tmp_path


def run(capsys, *arguments):
    code = main(arguments)
    return code, capsys.readouterr().out


def test_inspect_shows_what_is_stored_and_what_is_tied(folder, capsys):
    expected = """\
tied: DCP folder, 1 tensor of 192 B
manifest: 1 tied group (192 B saved), 0 claims refused

name                       shape    dtype    size   stored in
model.embed_tokens.weight  (12, 4)  float32  192 B  __0_0.distcp
model.lm_head.weight       (12, 4)  float32         = model.embed_tokens.weight (same-object)
"""
    assert (0, expected) == run(capsys, "inspect", "tied")


def test_inspect_says_why_a_claim_was_refused(folder, capsys):
    code, text = run(capsys, "inspect", "flagged")
    assert 0 == code
    assert text.endswith(
        "refused\n  lm_head.weight (8, 4) and embed_tokens.weight (12, 4) cannot be one tensor: shapes differ; "
        "claimed\n    by config.tie_word_embeddings\n"
    )


def test_inspect_gives_programs_everything(folder, capsys):
    code, text = run(capsys, "inspect", "--json", "flagged")
    values = json.loads(text)
    assert (0, "DCP folder", 320, True, []) == (
        code,
        values["form"],
        values["bytes"],
        values["manifest"],
        values["groups"],
    )
    assert {"shape": [8, 4], "dtype": "float32", "bytes": 128, "files": ["__0_0.distcp"]} == values["tensors"][
        f"model.{HEAD}"
    ]
    assert [([f"model.{EMBED}", f"model.{HEAD}"], "shape-mismatch")] == [
        (refused["names"], refused["reason"]) for refused in values["refused"]
    ]
    groups = json.loads(run(capsys, "inspect", "--json", "tied")[1])["groups"]
    assert [{"canonical": f"model.{EMBED}", "aliases": [{"name": f"model.{HEAD}", "reason": "same-object"}]}] == groups


def test_diff_exits_with_one_where_there_are_differences(folder, capsys):
    expected = """\
A tied and B file.safetensors differ in 1 name

name            difference  A                                      B
lm_head.weight  only in A   (12, 4) float32 = embed_tokens.weight
"""
    assert (1, expected) == run(capsys, "diff", "tied", "file.safetensors")
    code, text = run(capsys, "diff", "tied", "tied")
    expected = """\
A tied and B tied hold the same names with the same shapes, dtypes and ties and the same values, by
  the digests that were recorded of their files
"""
    assert (0, expected) == (code, text)


def test_diff_gives_programs_everything(folder, capsys):
    code, text = run(capsys, "diff", "--json", "tied", "flagged")
    difference = {
        "name": f"model.{HEAD}",
        "kind": "differs",
        "a": f"(12, 4) float32 = model.{EMBED}",
        "b": "(8, 4) float32",
    }
    values = json.loads(text)
    assert (1, False, "digests") == (code, values["same"], values["values"])
    assert [difference, "file differs"] == [values["differences"][0], values["differences"][1]["kind"]]


def test_folders_whose_files_hold_other_values_are_not_called_the_same(folder, capsys):
    tiepolicy_dcp.save("other", model=TiedPair())
    code, text = run(capsys, "diff", "tied", "other")
    assert (1, "A tied and B other differ in 1 file") == (code, text.splitlines()[0])
    assert ["__0_0.distcp", "file", "differs"] == text.splitlines()[3].split()[:3]


def test_where_only_headers_were_compared_nobody_says_that_values_are_the_same(folder, capsys):
    save_file({EMBED: torch.ones(12, 4)}, folder / "ones.safetensors")
    expected = """\
A file.safetensors and B ones.safetensors hold the same names with the same shapes, dtypes and ties;
  only headers were compared, so their values may differ (--values reads them)
"""
    assert (0, expected) == run(capsys, "diff", "file.safetensors", "ones.safetensors")
    values = json.loads(run(capsys, "diff", "--json", "file.safetensors", "ones.safetensors")[1])
    assert (None, "not compared") == (values["same"], values["values"])


def test_values_are_compared_to_the_last_byte_on_request(folder, capsys):
    changed = torch.zeros(12, 4)
    changed[-1, -1] = -0.0
    save_file({EMBED: changed}, folder / "changed.safetensors")
    save_file({EMBED: torch.zeros(12, 4)}, folder / "same.safetensors")
    expected = """\
A file.safetensors and B changed.safetensors differ in 1 name

name                 difference     A                 B
embed_tokens.weight  values differ  byte 191 is 0x00  byte 191 is 0x80
"""
    assert (1, expected) == run(capsys, "diff", "--values", "file.safetensors", "changed.safetensors")
    code, text = run(capsys, "diff", "--values", "file.safetensors", "same.safetensors")
    assert (0, True) == (code, "shapes, dtypes and ties and the same values\n" in text.replace("\n  ", " "))


def test_values_of_an_alias_are_those_of_its_tensor(folder, capsys):
    model = TiedPair()
    save_model(model, folder / "tied.safetensors")
    save_file({EMBED: model.embed_tokens.weight.detach(), HEAD: torch.zeros(12, 4)}, folder / "apart.safetensors")
    values = json.loads(run(capsys, "diff", "--values", "--json", "tied.safetensors", "apart.safetensors")[1])
    assert {(HEAD, "tied differently"), (HEAD, "values differ")} >= {
        (difference["name"], difference["kind"]) for difference in values["differences"] if difference["name"] == HEAD
    }
    assert "values differ" in {difference["kind"] for difference in values["differences"]}


def test_a_large_tensor_is_compared_piece_by_piece(folder, capsys, monkeypatch):
    monkeypatch.setattr(_contents, "_PIECE_BYTES", 64)
    changed = torch.zeros(12, 4)
    changed[11, 0] = 1
    save_file({EMBED: changed}, folder / "changed.safetensors")
    code, text = run(capsys, "diff", "--values", "file.safetensors", "changed.safetensors")
    assert (1, True) == (code, "byte 178 is 0x00  byte 178 is 0x80" in text)


def test_values_of_a_dcp_folder_are_not_read_and_that_is_said(folder, capsys):
    assert 1 == main(["diff", "--values", "tied", "tied"])
    assert "tied is a DCP folder, whose values --values does not read" in capsys.readouterr().err.replace("\n  ", " ")


@pytest.fixture
def draft(folder):
    """A DCP checkpoint `draft` of a draft whose embedding belongs to a target."""
    target = TiedPair()
    draft = FlaggedPair(flag=False, vocab_size=12, draft_vocab_size=8, hidden_size=4)
    draft.embed_tokens = target.embed_tokens
    save_model(target, folder / "target.safetensors")
    plan = tiepolicy.plan(draft, external={"target": target}, digests=True)
    tiepolicy_dcp.save("draft", model=draft, plan=plan)
    return plan


def test_inspect_shows_whose_a_tensor_is_with_its_digest(draft, capsys):
    digest = draft.external[0].digest
    code, text = run(capsys, "inspect", "draft")
    assert (0, True) == (code, "1 tensor of other models: target" in text)
    expected = "manifest: 0 tied groups and 1 tensor of other models left out (192 B saved), 0 claims refused"
    assert expected == text.splitlines()[1]
    assert f"= target:embed_tokens.weight ({digest[:12]})" in text
    expected = {"name": f"model.{EMBED}", "owner": "target", "owner_name": EMBED, "sha256": digest}
    assert [expected] == json.loads(run(capsys, "inspect", "--json", "draft")[1])["external"]


def test_verify_holds_what_belongs_to_another_model_against_that_model(draft, folder, capsys):
    assert (0, "draft: nothing wrong\n") == run(capsys, "verify", "draft", "--owner", "target=target.safetensors")
    save_file({EMBED: torch.zeros(12, 4)}, folder / "trained.safetensors")
    code, text = run(capsys, "verify", "draft", "--owner", "target=trained.safetensors")
    assert (1, True) == (code, "holds other values of it: expected SHA-256" in " ".join(text.split()))

    def found(owner):
        return " ".join(run(capsys, "verify", "draft", "--owner", owner)[1].split())

    save_file({EMBED: torch.zeros(12, 5)}, folder / "wide.safetensors")
    assert "is (12, 5) float32 in" in found("target=wide.safetensors")
    save_file({HEAD: torch.zeros(12, 4)}, folder / "other.safetensors")
    assert "holds no embed_tokens.weight" in found("target=other.safetensors")
    assert (
        "no tensor that belongs to a model 'teacher'"
        in (run(capsys, "verify", "draft", "--owner", "teacher=target.safetensors")[1])
    )


def test_verify_says_which_tensor_of_another_model_it_cannot_check(folder, capsys):
    target = TiedPair()
    save_model(target, folder / "target.safetensors")
    for digests, rows, expected in [
        (False, slice(None), "without a digest, so target.safetensors was not held against it"),
        (True, slice(2, 10), "whose digest cannot be checked against target.safetensors"),
    ]:
        draft = FlaggedPair(flag=False, vocab_size=8, draft_vocab_size=8, hidden_size=4)
        draft.embed_tokens.weight = torch.nn.Parameter(target.embed_tokens.weight.data[rows])
        plan = tiepolicy.plan(draft, external={"target": target}, digests=digests)
        tiepolicy_dcp.save(f"draft_{digests}", model=draft, plan=plan, external={"target": target})
        code, text = run(capsys, "verify", f"draft_{digests}", "--owner", "target=target.safetensors")
        assert (1, True) == (code, expected in " ".join(text.split())), text


def test_an_owner_that_is_no_checkpoint_is_wrong_usage(draft, capsys):
    for owner in ("target", "=target.safetensors", "target=gone"):
        with pytest.raises(SystemExit) as caught:
            main(["verify", "draft", "--owner", owner])
        assert (2, True) == (caught.value.code, "is no NAME=PATH of a file or folder" in capsys.readouterr().err)


def test_verify_finds_a_stored_tensor_that_belongs_to_another_model(draft, folder, capsys):
    assert 0 == run(capsys, "verify", "draft")[0]
    (folder / "hf").mkdir()
    save_file({EMBED: torch.zeros(12, 4), HEAD: torch.zeros(8, 4)}, folder / "hf" / "model.safetensors")
    (folder / "hf" / "manifest.json").write_text(json.dumps(draft.to_manifest()))
    code, text = run(capsys, "verify", "hf")
    assert (1, True) == (code, "says belongs to target:embed_tokens.weight" in text.replace("\n    ", " "))


def test_the_manifest_of_a_hugging_face_folder_is_read_from_its_first_file(folder, capsys):
    tiepolicy_hf.save_pretrained(tiny_llama(tie_word_embeddings=True), folder / "hf", max_shard_size=8000)
    code, text = run(capsys, "inspect", "hf")
    assert (0, "manifest: 1 tied group (6.14 kB saved), 0 claims refused") == (code, text.splitlines()[1])
    groups = json.loads(run(capsys, "inspect", "--json", "hf")[1])["groups"]
    aliases = [{"name": "lm_head.weight", "reason": "same-object"}]
    assert [{"canonical": "model.embed_tokens.weight", "aliases": aliases}] == groups
    assert 0 == run(capsys, "verify", "hf")[0]


def test_a_tied_name_that_a_file_holds_apart_is_shown_as_stored(folder, capsys):
    manifest = json.dumps(tiepolicy.plan(TiedPair()).to_manifest())
    apart = {EMBED: torch.zeros(12, 4), HEAD: torch.zeros(12, 4)}
    save_file(apart, folder / "apart.safetensors", metadata={"tiepolicy": manifest})
    expected = """\
apart.safetensors: safetensors file, 2 tensors of 384 B
manifest: 1 tied group (0 B saved), 0 claims refused, 1 tied name stored apart

name                 shape    dtype    size   stored in
embed_tokens.weight  (12, 4)  float32  192 B  apart.safetensors
lm_head.weight       (12, 4)  float32  192 B  apart.safetensors
"""
    assert (0, expected) == run(capsys, "inspect", "apart.safetensors")


def test_verify_finds_a_tensor_that_the_manifest_of_a_hugging_face_folder_stores_and_no_file_holds(folder, capsys):
    model = tiny_llama(tie_word_embeddings=True)
    file = tiepolicy_hf.save_pretrained(model, folder / "hf") / "model.safetensors"
    assert 0 == run(capsys, "verify", "hf")[0]
    tensors, metadata = load_file(file), dict(read_header(file).metadata)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata=metadata)
    code, text = run(capsys, "verify", "hf")
    assert (1, True) == (code, "lists model.norm.weight (16,), which no file holds" in " ".join(text.split()))
    save_file(tensors, file, metadata={"tiepolicy": "{"})
    code, text = run(capsys, "verify", "hf")
    assert (1, True) == (code, "the metadata of hf" in text)


def test_verify_exits_with_one_where_there_is_damage(folder, capsys):
    assert (0, "tied: nothing wrong\n") == run(capsys, "verify", "tied")
    expected = "file.safetensors: nothing wrong. No digests were recorded, so the values of tensors were not checked\n"
    assert (0, expected) == run(capsys, "verify", "file.safetensors")
    assert (0, {"path": "tied", "ok": True, "problems": []}) == (
        main(["verify", "--json", "tied"]),
        json.loads(capsys.readouterr().out),
    )
    (folder / "tied" / "__0_0.distcp").unlink()
    expected = (
        "tied: 1 problem\n  tied/__0_0.distcp is missing: a part of the checkpoint was lost. Nothing was loaded\n"
    )
    assert (1, expected) == run(capsys, "verify", "tied")


@pytest.mark.parametrize("command", [["inspect"], ["diff", "tied"]])
def test_a_damaged_checkpoint_is_an_error_with_exit_code_one(folder, capsys, command):
    assert 1 == main([*command, "cut.safetensors"])
    captured = capsys.readouterr()
    assert ("", True) == (captured.out, captured.err.startswith("tiepolicy: cut.safetensors is cut or no safetensors"))


def test_an_error_is_json_too(folder, capsys):
    code, text = run(capsys, "inspect", "--json", "cut.safetensors")
    error = json.loads(text)["error"]
    assert (1, "CheckpointError", []) == (code, error["type"], error["names"])
    assert error["message"].startswith("cut.safetensors is cut")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["inspect"], "the following arguments are required: PATH"),
        (["inspect", "gone"], "there is no file or folder gone"),
        (["diff", "a"], "the following arguments are required: B"),
        (["repair", "a"], "invalid choice"),
    ],
)
def test_wrong_usage_exits_with_two(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert (2, True) == (caught.value.code, message in capsys.readouterr().err)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["inspect", "--jsno", "x"], "tiepolicy inspect: error: --jsno is unknown, did you mean --json?"),
        (["verify", "x", "y"], "tiepolicy verify: error: y is unknown"),
        (["inspect", "x" * 5000], f"tiepolicy inspect: error: there is no file or folder {'x' * 5000}"),
    ],
)
def test_wrong_usage_is_one_line(capsys, typed, sentence):
    with pytest.raises(SystemExit):
        main(typed)
    assert f"{sentence} (see {sentence.split(':')[0]} --help)\n" == capsys.readouterr().err


def test_a_picture_goes_into_a_pipe_and_does_not_replace_it(folder, capsys):
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert 0 == main(["inspect", "tied", "--svg", "pipe"])
    assert (b"<svg", True) == (os.read(reader, 4), Path("pipe").is_fifo())
    os.close(reader)


@pytest.mark.parametrize("command", [[], ["inspect"], ["diff"], ["verify"], ["plugins"]])
def test_help_says_what_the_exit_codes_mean(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (0, True) == (
        caught.value.code,
        "exit codes: 0 fine, 1 differences or damage, 2 wrong usage, 130 interrupted" in text,
    )


@pytest.mark.parametrize("command", [["inspect", "x.safetensors"], ["diff", "x.safetensors", "file.safetensors"]])
def test_a_pipe_and_json_have_every_name_in_full(folder, capsys, command):
    name = "encoder." * 40 + "weight"
    save_file({name: torch.zeros(1, 2, 3), "b": torch.zeros(1)}, folder / "x.safetensors")
    assert name in run(capsys, *command)[1]
    assert name in run(capsys, command[0], "--json", *command[1:])[1]


def test_a_name_from_a_file_cannot_steer_the_terminal(folder, capsys):
    save_file({"\x1b[2J\nu\u00e9\u202e": torch.zeros(1)}, folder / "x.safetensors")
    _, text = run(capsys, "inspect", "x.safetensors")
    assert "\\x1b[2J\\x0au\\xe9\\u202e" in text


@given(st.text(st.characters(), max_size=20))
def test_what_is_printed_is_ascii_without_control_characters(text):
    assert all(" " <= character <= "~" for character in printable(text))


@given(st.lists(st.tuples(*[st.text("abc.", max_size=200)] * 4), min_size=1, max_size=5))
def test_a_table_fits_and_holds_all_of_every_cell(rows):
    lines = columns(rows, width=WIDTH).split("\n")
    assert all(len(line) <= WIDTH for line in lines)
    assert sorted("".join("".join(row) for row in rows)) == sorted("".join(lines).replace(" ", ""))


def test_the_module_runs_as_a_program_and_imports_no_dcp(folder):
    code = """
import sys
from tiepolicy._cli import main
code = main(["inspect", "tied"])
print([name for name in ("transformers", "torch.distributed.checkpoint", "hypothesis") if name in sys.modules])
sys.exit(code)
"""
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("\n[]\n")
    result = subprocess.run(
        [sys.executable, "-m", "tiepolicy", "verify", "cut.safetensors"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (1, True) == (result.returncode, result.stdout.startswith("cut.safetensors: 1 problem"))
