"""Damaged and hostile checkpoints: found before the model is touched, named, and never run."""

import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

import tiepolicy_dcp
from models import TiedPair
from tiepolicy._cli import main
from tiepolicy.errors import ManifestError, MissingTensorError
from tiepolicy_dcp import CheckpointError, CheckpointStore, PendingSave, UntrustedCheckpointError

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def test_an_edited_manifest_is_noticed(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(tied=False))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(HEAD, "lm_tail.weight"))
    with pytest.raises(CheckpointError, match="manifest.json does not hold what was written"):
        tiepolicy_dcp.load(folder, model=TiedPair(tied=False))
    with pytest.raises(ManifestError, match="disagree about lm_head.weight"):
        tiepolicy_dcp.load(folder, model=TiedPair(tied=False), verify="off")


def test_a_lost_data_file_is_named_before_the_model_is_touched(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__0_0.distcp is missing"):
        tiepolicy_dcp.load(folder, model=TiedPair())


def test_a_cut_data_file_is_an_error(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    data = folder / "__0_0.distcp"
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp has \d+ bytes, but \d+ were written"):
        tiepolicy_dcp.load(folder, model=TiedPair())
    with pytest.raises(CheckpointError, match="was cut: model.embed_tokens.weight ends at byte"):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="off")


@pytest.mark.parametrize(
    "name", [".metadata", "__0_0.distcp", "extra.json", "extra.safetensors", "manifest.json", "model.safetensors"]
)
def test_one_flipped_bit_in_any_file_is_found_before_the_model_is_touched(tmp_path, name):
    extra = {"rng": torch.get_rng_state()}
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(), extra=extra, consolidated=True)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content)
    model = TiedPair()
    before = model.lm_head.weight.clone()
    with pytest.raises(CheckpointError, match=f"{name} does not hold what was written: its digest differs"):
        tiepolicy_dcp.load(folder, model=model)
    assert torch.equal(before, model.lm_head.weight)


def test_every_file_of_a_checkpoint_has_a_digest(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(), consolidated=True)
    described = set(json.loads((folder / "digests.json").read_text())["files"])
    assert {path.name for path in folder.iterdir()} == described | {"digests.json"}


@pytest.mark.parametrize("save", [tiepolicy_dcp.save, tiepolicy_dcp.async_save, CheckpointStore.save])
def test_without_digests_sizes_are_checked_and_it_is_said(tmp_path, caplog, capsys, save):
    model, loaded = TiedPair(), TiedPair()
    if save is CheckpointStore.save:
        folder = CheckpointStore(tmp_path).save("c", model=model, digests=False)
    else:
        folder = tmp_path / "c"
        pending = save(folder, model=model, digests=False)
        if isinstance(pending, PendingSave):
            pending.result()
    record = json.loads((folder / "digests.json").read_text())
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "digests.json"}
    assert ("none", {name: [size, ""] for name, size in sizes.items()}) == (record["algorithm"], record["files"])
    tiepolicy_dcp.load(folder, model=loaded, verify="size")
    assert [] == caplog.messages
    tiepolicy_dcp.load(folder, model=loaded)
    assert [f"{folder} was saved without digests: only the sizes of its files are checked"] == caplog.messages
    assert torch.equal(model.lm_head.weight, loaded.lm_head.weight)
    assert 0 == main(["verify", str(folder)])
    assert "nothing wrong. No digests were recorded" in " ".join(capsys.readouterr().out.split())
    os.truncate(folder / "__0_0.distcp", 100)
    with pytest.raises(CheckpointError, match="__0_0.distcp has 100 bytes"):
        tiepolicy_dcp.load(folder, model=loaded)


def test_lost_or_damaged_digests_are_an_error_unless_nothing_is_to_be_checked(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    (folder / "digests.json").write_text('{"algorithm": "crc1", "files": {}}')
    with pytest.raises(CheckpointError, match="digests.json has the unknown algorithm 'crc1'"):
        tiepolicy_dcp.load(folder, model=TiedPair())
    (folder / "digests.json").write_text('{"algorithm": "xxh3_128", "files": {".metadata": 3}}')
    with pytest.raises(CheckpointError, match="digests.json is damaged"):
        tiepolicy_dcp.load(folder, model=TiedPair())
    (folder / "digests.json").unlink()
    with pytest.raises(CheckpointError, match="digests.json is missing: a part of the checkpoint was lost"):
        tiepolicy_dcp.load(folder, model=TiedPair())
    tiepolicy_dcp.load(folder, model=TiedPair(), verify="off")


def test_a_file_that_was_put_there_later_is_not_read(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    content = json.loads((folder / "digests.json").read_text())
    del content["files"]["extra.json"]
    (folder / "digests.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="extra.json is not recorded in digests.json: .* Nothing was loaded"):
        tiepolicy_dcp.load(folder, model=TiedPair())


def test_sizes_alone_do_not_find_a_changed_byte(tmp_path):
    """What `verify="size"` gives up for its speed."""
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("same-object", "same-0bject"))
    with pytest.raises(ManifestError, match="'same-0bject' is no Reason"):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="size")


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_metadata_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    with pytest.raises(UntrustedCheckpointError, match="asks for posix.mkdir, which no tensor needs"):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="off")
    assert not (tmp_path / "pwned").exists()


def test_a_pickled_entry_is_never_unpickled(tmp_path):
    state = {"model": {HEAD: TiedPair().lm_head.weight, EMBED: Payload(tmp_path / "pwned")}}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(state, checkpoint_id=tmp_path / "c")
    with pytest.raises(MissingTensorError, match="embed_tokens.weight"):
        tiepolicy_dcp.load(tmp_path / "c", model=TiedPair(tied=False))
    assert not (tmp_path / "pwned").exists()


def test_a_file_outside_the_checkpoint_is_not_opened(tmp_path):
    tiepolicy_dcp.save(tmp_path / "other", model=TiedPair())
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    metadata = (folder / ".metadata").read_bytes()
    inside = b"\x8c\x0c__0_0.distcp"
    assert inside in metadata
    outside = bytes([0x8C, len("../other/__0_0.distcp")]) + b"../other/__0_0.distcp"
    (folder / ".metadata").write_bytes(rebuilt(metadata, inside, outside))
    with pytest.raises(UntrustedCheckpointError, match="'../other/__0_0.distcp', a file outside the checkpoint"):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="off")


def rebuilt(metadata, old, new):
    """The pickle with one string replaced and the length of its frame corrected."""
    changed = metadata.replace(old, new)
    assert changed[2:3] == b"\x95"
    length = int.from_bytes(changed[3:11], "little") + len(new) - len(old)
    return changed[:3] + length.to_bytes(8, "little") + changed[11:]
