"""A store of checkpoints: names, and one of them is the latest."""

import pytest
import torch

import tiepolicy_dcp
from models import TiedPair
from tiepolicy_dcp import CheckpointError, CheckpointStore


def test_latest_is_the_checkpoint_saved_last(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    first, second = TiedPair(), TiedPair()
    store.save("b_first", model=first)
    store.save("a_second", model=second)
    model = TiedPair()
    store.load("LATEST", model=model)
    assert torch.equal(second.lm_head.weight, model.lm_head.weight)
    assert (["a_second", "b_first"], "a_second\n") == (store.names(), (tmp_path / "run" / "LATEST").read_text())


def test_a_checkpoint_is_found_by_name_and_by_path(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    folder = store.save("one", model=TiedPair())
    assert [folder, folder] == [store.resolve("one"), store.resolve(folder)]


def test_latest_does_not_move_when_a_save_fails(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save("one", model=TiedPair())
    with pytest.raises(CheckpointError, match="extra state"):
        store.save("two", model=TiedPair(), extra={"bad": object()})
    assert (tmp_path / "one", ["one"]) == (store.resolve("LATEST"), store.names())


def test_what_a_killed_save_left_is_no_checkpoint_and_does_not_stop_the_next(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save("one", model=TiedPair())
    (tmp_path / ".two.unfinished").mkdir()
    (tmp_path / ".two.unfinished" / "__0_0.distcp").write_bytes(b"half")
    assert ["one"] == store.names()
    store.save("two", model=TiedPair())
    assert (["one", "two"], []) == (store.names(), list(tmp_path.glob(".*unfinished")))


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "LATEST"])
def test_a_name_that_is_no_plain_file_name_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
        CheckpointStore(tmp_path / "run").save(name, model=TiedPair())


def test_a_missing_checkpoint_is_an_error_that_lists_what_there_is(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint to restore LATEST from: .* holds no checkpoint"):
        store.resolve("LATEST")
    store.save("one", model=TiedPair())
    with pytest.raises(CheckpointError, match="there is no checkpoint 'two': .* holds one"):
        store.resolve("two")


def test_a_root_that_is_a_file_cannot_take_a_checkpoint(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointError, match=r"run cannot take a checkpoint: .* Nothing was written"):
        CheckpointStore(tmp_path / "run").save("one", model=TiedPair())


def test_a_damaged_pointer_is_named_and_not_followed(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save("one", model=TiedPair())
    (tmp_path / "LATEST").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"LATEST is damaged: .* Name the checkpoint instead"):
        store.resolve("LATEST")
    (tmp_path / "LATEST").unlink()
    (tmp_path / "LATEST").mkdir()
    with pytest.raises(CheckpointError, match=r"LATEST is no file, and nothing was read of it. Name the checkpoint"):
        store.resolve("LATEST")


def test_a_pointer_out_of_the_store_is_not_followed(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    store.save("one", model=TiedPair())
    CheckpointStore(tmp_path / "other").save("two", model=TiedPair())
    (tmp_path / "run" / "LATEST").write_text("../other/two\n")
    with pytest.raises(CheckpointError, match="names '../other/two', which is not there"):
        store.resolve("LATEST")


def test_a_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(
        CheckpointError, match=r"run cannot take a checkpoint: File exists\. Nothing was written\. Give a"
    ):
        CheckpointStore(tmp_path / "run").save("one", model=TiedPair())
    with pytest.raises(CheckpointError, match=r"run/one: Not a directory\. Name one in a folder"):
        tiepolicy_dcp.save(tmp_path / "run" / "one", model=TiedPair())
