"""Pictures of plans: what they show, that they are whole SVG documents, and that a name cannot break one."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tiepolicy
import tiepolicy_dcp
from models import FlaggedPair, TiedPair
from tiepolicy._cli import main

SVG = "{http://www.w3.org/2000/svg}"


def texts(document, *, of="text"):
    return [element.text for element in ET.fromstring(document).iter(f"{SVG}{of}")]


def test_a_plan_is_drawn_with_its_stored_name_and_its_alias():
    expected = [
        "2 tensors, 1 tied group (192 B saved), 0 claims refused",
        "One tensor: stored once, under the name on the left:",
        "lm_head.weight",
        "same-object",
        "embed_tokens.weight",
        "(12, 4) float32, 192 B",
    ]
    assert expected == texts(tiepolicy.plan(TiedPair()).to_svg())


def test_a_refused_claim_is_drawn_with_its_reason():
    plan = tiepolicy.plan(FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=8, hidden_size=4))
    shown = " ".join(texts(plan.to_svg()))
    assert "(8, 4)" in shown
    assert str(plan.refused[0]) in shown


def test_who_does_not_see_a_picture_reads_it():
    target = TiedPair()
    draft = torch.nn.ModuleDict({"embed": target.embed_tokens})
    document = tiepolicy.plan(draft, external={"target": target}, digests=True).to_svg()
    assert ["1 tensor, 0 tied groups and 1 tensor of other models left out (192 B saved), 0 claims refused"] == texts(
        document, of="title"
    )[:1]
    expected = "embed.weight is target:embed_tokens.weight, which belongs to another model"
    assert [expected] == texts(document, of="desc")


@settings(max_examples=30)
@given(names=st.sets(st.text(min_size=1), min_size=2, max_size=4))
def test_no_name_breaks_a_picture(names):
    tensor = torch.zeros(2)
    document = tiepolicy.plan(dict.fromkeys(names, tensor)).to_svg()
    elements = {element.tag.removeprefix(SVG) for element in ET.fromstring(document).iter()}
    assert elements <= {"svg", "title", "desc", "style", "rect", "g", "text", "path"}
    assert document.isascii()


@settings(max_examples=30)
@given(num_aliases=st.integers(1, 6), lengths=st.lists(st.integers(1, 200), min_size=1, max_size=30))
def test_nothing_lies_outside_a_picture(num_aliases, lengths):
    state = {}
    for index, length in enumerate(lengths):
        state |= {f"{index}.{alias}.{'x' * length}": torch.zeros(1) for alias in range(num_aliases)}
        tensor = torch.zeros(2)
        state |= {f"{index}.{alias}.{'y' * length}": tensor for alias in range(num_aliases)}
    root = ET.fromstring(tiepolicy.plan(state).to_svg())
    width, height = float(root.get("width")), float(root.get("height"))
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.get("x")) + float(rect.get("width")) <= width
        assert float(rect.get("y")) + float(rect.get("height")) <= height
    # The characters of a name are 8 pixels wide, a little less in most fonts.
    for text in root.iter(f"{SVG}text"):
        if text.get("class") == "name":
            assert len(text.text) * 8 <= 330 - 2 * 8
        assert float(text.get("y")) < height


def test_a_picture_of_many_groups_says_how_many_it_leaves_out():
    state = {}
    for index in range(23):
        state |= dict.fromkeys((f"a{index}", f"b{index}"), torch.zeros(1))
    assert "and 3 more" in texts(tiepolicy.plan(state).to_svg())


def test_inspect_draws_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiepolicy_dcp.save("tied", model=TiedPair())
    assert 0 == main(["inspect", "tied", "--svg", "tied.svg"])
    shown = texts((tmp_path / "tied.svg").read_text())
    assert ["tied: DCP folder, 1 tensor of 192 B", "model.lm_head.weight", "model.embed_tokens.weight"] == [
        text for text in shown if re.match("tied|model", text)
    ]
    assert "model.embed_tokens.weight" in capsys.readouterr().out


def test_inspect_says_in_the_picture_that_nothing_is_known(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "file.safetensors")
    assert 0 == main(["inspect", str(tmp_path / "file.safetensors"), "--svg", str(tmp_path / "file.svg")])
    assert "no manifest: nothing says which names are one tensor" in texts((tmp_path / "file.svg").read_text())


@pytest.mark.parametrize("place", ["nowhere/tied.svg", "."])
def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "file.safetensors")
    assert 1 == main(["inspect", "file.safetensors", "--svg", place])
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith(f"tiepolicy: the picture {place} cannot be written: ")
    assert ["file.safetensors"] == [path.name for path in tmp_path.iterdir()]
