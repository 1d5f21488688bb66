"""Damage to every file of every kind of checkpoint: a load finds it, and touches nothing; so does `verify`."""

import copy
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from two_checkpoints import write

import tiepolicy_dcp
import tiepolicy_hf
from models import TiedPair, tiny_llama, train_steps
from strategies import damages
from tiepolicy._verify import find_problems
from tiepolicy.errors import CheckpointError, ExternalOwnerError, ManifestError, TiePolicyError
from tiepolicy.files import DIGESTS, digests_text, measure
from torchrun import torchrun

KINDS = ["one process", "two processes", "one file", "shards"]
OLDER, NEWER = "step-1", "step-2"


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """By kind, a function that makes a folder with two checkpoints of one model, once."""
    made = {}

    def root(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("checkpoints") / "root"
            make_(made[kind], kind)
        return made[kind]

    return root


def make_(root, kind):
    torch.manual_seed(0)
    if kind == "one process":
        write(root, TiedPair(vocab_size=13))
    elif kind == "two processes":
        result = torchrun(Path(__file__).with_name("two_checkpoints.py"), root, num_processes=2)
        assert 0 == result.returncode, result.stdout
    else:
        for name in (OLDER, NEWER):
            size = 10_000 if kind == "shards" else "1GB"
            tiepolicy_hf.save_pretrained(tiny_llama(tie_word_embeddings=True), root / name, max_shard_size=size)


@contextmanager
def copy_of(folder):
    """A copy to damage."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(folder, Path(place) / "c"))


def load(kind, folder):
    """Load a checkpoint; of a live model and optimizer, nothing has changed after an error."""
    if kind in ("one file", "shards"):
        tiepolicy_hf.from_pretrained(LlamaForCausalLM, folder)
        return
    model = TiedPair(vocab_size=13)
    optimizer = torch.optim.AdamW(model.parameters())
    train_steps(model, optimizer, num_steps=1)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    try:
        tiepolicy_dcp.load(folder, model=model, optimizer=optimizer)
    except TiePolicyError:
        torch.testing.assert_close([model.state_dict(), optimizer.state_dict()["state"]], before, rtol=0, atol=0)
        raise


def damage_(damage, folder, older):
    """Do it.

    Args:
        damage: What, and where: see `strategies.damages`.
        folder: A checkpoint.
        older: Another one of the same model.

    Returns:
        Names of the files that are no longer what they were.
    """
    files = sorted(path.name for path in folder.iterdir())
    before = {name: (folder / name).read_bytes() for name in files}
    path = folder / files[damage.file % len(files)]
    if damage.way == "delete":
        path.unlink()
    elif damage.way == "cut":
        path.write_bytes(before[path.name][: damage.place % len(before[path.name])])
    elif damage.way == "append":
        path.write_bytes(before[path.name] + b"\0")
    elif damage.way == "flip":
        data = bytearray(before[path.name])
        # Headers are at the front, and half of the damage is done there.
        place = damage.place % (len(data) if damage.place % 2 else min(len(data), 512))
        data[place] ^= 1 << damage.bit
        path.write_bytes(data)
    elif damage.way == "older":
        shutil.copy(older / path.name, path)
    else:
        other = folder / files[(damage.file + 1 + damage.place) % len(files)]
        path.write_bytes(before[other.name])
        other.write_bytes(before[path.name])
    return {name for name in files if not (folder / name).exists() or (folder / name).read_bytes() != before[name]}


def check_found(kind, root, damage):
    with copy_of(root / NEWER) as folder:
        changed = damage_(damage, folder, root / OLDER)
        assume(changed)
        # A folder of Hugging Face that has lost its digests is one that another tool wrote: whole, and not recorded.
        assume(changed != {DIGESTS} or (folder / DIGESTS).exists() or kind not in ("one file", "shards"))
        with pytest.raises(TiePolicyError) as caught:
            load(kind, folder)
        problems = find_problems(folder)
    # Digests that are wrong themselves accuse the files that they are about.
    named = changed if DIGESTS not in changed else {str(root.name), "c/"}
    assert any(name in str(caught.value) for name in named), (changed, str(caught.value))
    assert any(name in problem for name in named for problem in problems), (changed, problems)


@pytest.mark.parametrize("kind", ["one process", "shards"])
def test_damage_is_found_by_loading_and_by_verifying(roots, kind):
    root = roots(kind)

    @settings(max_examples=8, database=None)
    @given(damages())
    def check(damage):
        check_found(kind, root, damage)

    check()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage_is_found_by_loading_and_by_verifying(roots, kind):
    root = roots(kind)

    @settings(max_examples=200, database=None)
    @given(damages())
    def check(damage):
        check_found(kind, root, damage)

    check()


@pytest.mark.parametrize("kind", ["one process", "shards"])
def test_what_is_not_damaged_is_loaded_and_has_no_problems(roots, kind):
    for name in (OLDER, NEWER):
        load(kind, roots(kind) / name)
        assert [] == find_problems(roots(kind) / name)


# Manifests edited by hand, with and without the digest set right for it


def edited(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rename_the_canonical(manifest):
    manifest["groups"][0]["canonical"] = "embed.weight"


def exchange_the_shape(manifest):
    manifest["tensors"]["lm_head.weight"][0] = [4, 13]


def forget_the_tie(manifest):
    manifest["groups"] = []
    manifest["tensors"].pop("lm_head.weight")


@pytest.mark.parametrize("change", [rename_the_canonical, exchange_the_shape, forget_the_tie])
def test_an_edited_manifest_is_found_even_if_its_digest_fits(roots, change):
    with copy_of(roots("one process") / NEWER) as folder:
        edited(folder, change)
        with pytest.raises(CheckpointError, match=r"manifest.json has \d+ bytes, but \d+ were written"):
            load("one process", folder)
        (folder / DIGESTS).write_text(digests_text(measure(p for p in folder.iterdir() if p.name != DIGESTS)))
        with pytest.raises(ManifestError, match="manifest.json"):
            load("one process", folder)
        assert any("manifest.json" in problem for problem in find_problems(folder))


def test_another_digest_for_the_tensor_of_another_model_is_found(tmp_path):
    target, draft = TiedPair(), TiedPair()
    draft.embed_tokens = target.embed_tokens
    draft.lm_head = torch.nn.Linear(4, 5, bias=False)
    folder = tiepolicy_dcp.save(tmp_path / "c", model=draft, external={"target": target})
    edited(folder, lambda manifest: manifest["external"][0].update(sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"manifest.json has \d+ bytes, but \d+ were written"):
        tiepolicy_dcp.load(folder, model=draft, external={"target": target})
    with pytest.raises(ExternalOwnerError, match="embed_tokens.weight"):
        tiepolicy_dcp.load(folder, model=draft, external={"target": target}, verify="off")


def test_a_companion_that_was_taken_out_is_found(tmp_path):
    class Draft(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = torch.nn.Linear(4, 5, bias=False)
            self.register_buffer("d2t", torch.arange(5))

    folder = tiepolicy_dcp.save(tmp_path / "c", model=Draft())
    edited(folder, lambda manifest: (manifest.pop("companions"), manifest["tensors"].pop("d2t")))
    with pytest.raises(CheckpointError, match=r"manifest.json has \d+ bytes, but \d+ were written"):
        tiepolicy_dcp.load(folder, model=Draft())
    with pytest.raises(ManifestError, match="disagree about d2t"):
        tiepolicy_dcp.load(folder, model=Draft(), verify="off")


def test_the_manifest_in_a_header_is_covered_by_the_digest_of_its_file(roots):
    with copy_of(roots("one file") / NEWER) as folder:
        path = folder / "model.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        manifest = json.loads(metadata["tiepolicy"])
        manifest["groups"] = []
        save_file(load_file(path), path, metadata=metadata | {"tiepolicy": json.dumps(manifest)})
        with pytest.raises(CheckpointError, match="model.safetensors (does not hold what was written|has .* bytes)"):
            load("one file", folder)


# Folders of Hugging Face that others wrote, whose damage nothing was recorded against


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[" * 100_000, "maximum recursion depth"),
        ("config.json", '{"a": 1, "a": 2}', "occurs twice"),
        ("config.json", '{"model_type": "llama", "hidden_size": "many"}', "describes no model"),
        ("config.json", '{"model_type": "llama", "hidden_size": -4}', "describes no model"),
        ("config.json", '{"model_type": "no such"}', "config.json describes (a model of [0-9]+ elements|no model)"),
        ("generation_config.json", "{", "is damaged"),
        ("adapter_config.json", '{"base_model_name_or_path": "/elsewhere"}', "says where to take a base model from"),
    ],
)
@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
def test_a_config_that_fits_no_file_of_the_folder_is_named(tmp_path, cls, name, content, message):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(TiePolicyError, match=message):
        tiepolicy_hf.from_pretrained(cls, tmp_path)


def test_code_in_a_folder_is_not_run_and_nobody_is_asked(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json describes no model"):
        tiepolicy_hf.from_pretrained(AutoModelForCausalLM, tmp_path)
    assert not ran.exists()
