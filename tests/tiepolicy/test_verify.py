"""What a checkpoint holds, and what is wrong with it: every kind of damage that headers can show is named."""

import json
import os
import pickle
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

import tiepolicy
import tiepolicy_dcp
from models import FlaggedPair, TiedPair, tiny_llama
from tiepolicy._contents import DCP, FILE, HF, read_contents
from tiepolicy._diff import diff
from tiepolicy._verify import _overlap, find_problems, recorded_bytes
from tiepolicy.errors import CheckpointError, TiePolicyError

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"


def sharded(folder):
    """Two files and an index, as transformers writes them."""
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3), "c": torch.zeros(())}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return folder


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_file_says_what_it_holds_and_which_names_its_writer_left_out(tmp_path):
    save_model(TiedPair(), tmp_path / "m.safetensors")
    contents = read_contents(tmp_path / "m.safetensors")
    assert (FILE, [EMBED], {HEAD: (EMBED, "recorded")}, 192) == (
        contents.form,
        list(contents.tensors),
        contents.aliases(),
        contents.nbytes,
    )


def test_a_folder_of_transformers_is_whole_in_one_file_and_in_shards(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10kB")
    single, shards = (read_contents(tmp_path / name) for name in ("single", "shards"))
    assert (HF, HF, [], []) == (single.form, shards.form, find_problems(single.path), find_problems(shards.path))
    assert [] == diff(single, shards).differences
    assert {"model.safetensors"} == {file for stored in single.tensors.values() for file in stored.files}
    assert 2 == len({file for stored in shards.tensors.values() for file in stored.files})


def test_the_cache_of_hugging_face_links_to_its_blobs(tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "0abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.zeros(2)}, blobs / "f00d")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    assert ([], ["a"]) == (find_problems(snapshot), list(read_contents(snapshot).tensors))


def test_a_dcp_folder_says_what_is_tied_and_what_was_refused(tmp_path):
    tied = read_contents(tiepolicy_dcp.save(tmp_path / "tied", model=TiedPair(), consolidated=True))
    assert (DCP, {f"model.{HEAD}": (f"model.{EMBED}", "same-object")}) == (tied.form, tied.aliases())
    assert ((12, 4), "float32") == tied.spec(f"model.{HEAD}")
    flagged = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=8, hidden_size=4)
    refused = read_contents(tiepolicy_dcp.save(tmp_path / "flagged", model=flagged))
    assert [tiepolicy.plan(flagged).refused, {}] == [refused.plan.refused, refused.aliases()]
    assert [] == find_problems(tied.path) + find_problems(refused.path)


def test_a_plain_dcp_folder_is_read_and_its_objects_are_counted(tmp_path):
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save({"model": {"a": torch.zeros(3)}, "step": 3}, checkpoint_id=tmp_path / "c")
    contents = read_contents(tmp_path / "c")
    assert (["model.a"], ("step",), None) == (list(contents.tensors), contents.objects, contents.plan)
    assert [] == find_problems(tmp_path / "c")


def remove_shard(folder):
    (folder / "two.safetensors").unlink()


def cut_shard(folder):
    os.truncate(folder / "two.safetensors", 8)


def forget_a_name(folder):
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})


def misplace_a_name(folder):
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})


def leave_the_folder(folder):
    write_index(folder, {"a": "../other/one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})


def leave_by_link(folder):
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to(sharded(folder.parent / "other") / "one.safetensors")


def leave_a_file(folder):
    save_file({"old": torch.zeros(1)}, folder / "old.safetensors")


def break_the_index(folder):
    (folder / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')


def empty_the_index(folder):
    (folder / INDEX).write_text("{}")


def second_index(folder):
    (folder / "other.safetensors.index.json").write_text("{}")


def contradict_the_manifest(folder):
    plan = tiepolicy.plan({"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1)})
    (folder / "manifest.json").write_text(json.dumps(plan.to_manifest()))


def break_the_manifest(folder):
    (folder / "manifest.json").write_text('{"format": "other"}')


def store_a_tied_name_twice(folder):
    shared = torch.zeros(2)
    plan = tiepolicy.plan({"a": shared, "b": torch.zeros(3), "c": torch.zeros(())} | {"x": shared})
    save_file({"x": torch.zeros(2)}, folder / "x.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors", "x": "x.safetensors"}
    write_index(folder, weight_map)
    (folder / "manifest.json").write_text(json.dumps(plan.to_manifest()))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_shard, ["two.safetensors is missing: a part of the checkpoint was lost"]),
        (cut_shard, ["two.safetensors is cut or no safetensors file: it has 8 bytes"]),
        (forget_a_name, [f"two.safetensors holds c, which {INDEX} does not list"]),
        (misplace_a_name, ["says that b is in one.safetensors, which does not hold it", "expects in one.safetensors"]),
        (leave_the_folder, ["points to '../other/one.safetensors', a file outside", "one.safetensors is not listed"]),
        (leave_by_link, ["points to 'one.safetensors', a file outside the checkpoint"]),
        (leave_a_file, [f"old.safetensors is not listed in {INDEX}: it is left from another save"]),
        (break_the_index, ["the key 'a' occurs twice"]),
        (empty_the_index, ["its weight_map is no object of tensor names and file names"]),
        (second_index, [f"holds several indexes, {INDEX}, other.safetensors.index.json"]),
        (
            contradict_the_manifest,
            ["disagree about b: (4,) float32 and (3,) float32", "lists d (1,), which is not in", "holds c, which"],
        ),
        (break_the_manifest, ["manifest.json: this is no manifest of tie groups"]),
        (store_a_tied_name_twice, ["stores x and a apart, which"]),
    ],
)
def test_each_damage_of_a_hugging_face_folder_is_named(tmp_path, damage, expected):
    folder = sharded(tmp_path / "hf")
    assert [] == find_problems(folder)
    damage(folder)
    problems = find_problems(folder)
    assert len(expected) == len(problems), problems
    for part, problem in zip(expected, problems, strict=True):
        assert part in problem


def change_metadata(change):
    """A damage of `.metadata`: what a function changes of DCP's own object."""

    def damage(folder):
        metadata = dcp.FileSystemReader(folder).read_metadata()
        change(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


def first_place(metadata):
    return metadata.storage_data[min(metadata.storage_data, key=lambda index: index.fqn)]


def tensor_of(metadata, name=EMBED):
    return metadata.state_dict_metadata[f"model.{name}"]


def half(metadata):
    tensor_of(metadata).chunks[0] = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((6, 4)))


def doubled(metadata):
    tensor_of(metadata).chunks.append(tensor_of(metadata).chunks[0])


def unplaced(metadata):
    del metadata.storage_data[min(metadata.storage_data, key=lambda index: index.fqn)]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda folder: os.truncate(folder / "__0_0.distcp", 99), "__0_0.distcp was cut: model.embed_tokens.weight"),
        (lambda folder: (folder / ".metadata").write_bytes(b"N."), "is no metadata of a checkpoint"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is damaged: it holds a list"),
        (lambda folder: os.truncate(folder / "model.safetensors", 99), "model.safetensors is cut"),
        (change_metadata(half), "by parts that are not the whole of it"),
        (change_metadata(doubled), "by parts that are not the whole of it"),
        (change_metadata(unplaced), "names no bytes for the part of model.embed_tokens.weight (12, 4) at (0, 0)"),
        (change_metadata(lambda m: setattr(first_place(m), "length", 8)), "8 bytes of its 192"),
        (change_metadata(lambda m: setattr(first_place(m), "offset", 8)), "overlapping bytes of __0_0.distcp"),
        (
            change_metadata(lambda m: setattr(first_place(m), "relative_path", "../x")),
            "points to '../x', a file outside the checkpoint",
        ),
        (
            change_metadata(lambda m: setattr(tensor_of(m), "size", torch.Size((4, 12)))),
            "disagree about embed_tokens.weight: (12, 4) float32 and (4, 12) float32",
        ),
    ],
)
def test_each_damage_of_a_dcp_folder_is_named(tmp_path, damage, expected):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(tied=False), consolidated=True)
    assert [] == find_problems(folder)
    damage(folder)
    assert any(expected in problem for problem in find_problems(folder)), find_problems(folder)


def test_an_alias_that_has_no_bytes_is_named(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    metadata = dcp.FileSystemReader(folder).read_metadata()
    metadata.storage_data = {index: i for index, i in metadata.storage_data.items() if index.fqn != f"model.{HEAD}"}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    expected = f"names no bytes for the part of model.{HEAD} (12, 4) at (0, 0)"
    assert any(expected in problem for problem in find_problems(folder))


def test_a_tie_that_is_stored_twice_is_named(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(tied=False))
    (folder / "manifest.json").write_text(json.dumps(tiepolicy.plan(TiedPair()).to_manifest()))
    stored = f"{folder / '.metadata'} stores {HEAD} and {EMBED} apart"
    assert f"{stored}, which {folder / 'manifest.json'} calls one tensor" in find_problems(folder)


def test_rows_of_a_stored_tensor_are_no_damage(tmp_path):
    model = torch.nn.Module()
    model.qkv = torch.nn.Parameter(torch.zeros(6, 2))
    model.k = torch.nn.Parameter(model.qkv.data[2:4])
    assert [] == find_problems(tiepolicy_dcp.save(tmp_path / "c", model=model))


def test_one_range_of_bytes_under_two_names_is_no_damage(tmp_path):
    """A tied tensor may be written once and named twice, for loaders that know nothing of manifests."""
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    contents = read_contents(folder)
    assert [f"model.{EMBED}", f"model.{HEAD}"] == list(contents.tensors)
    assert ([], 192) == (find_problems(folder), contents.nbytes)


def flip_a_bit(folder):
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)


def edit_digests(change):
    def damage(folder):
        content = json.loads((folder / "digests.json").read_text())
        change(content)
        (folder / "digests.json").write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (flip_a_bit, "__0_0.distcp does not hold what was written: its digest differs"),
        (lambda folder: (folder / "extra.json").write_text("{ }"), "extra.json has 3 bytes, but 2 were written"),
        (edit_digests(lambda c: c["files"].pop("extra.json")), "extra.json is not recorded in digests.json: it was"),
        (lambda folder: (folder / "digests.json").unlink(), "digests.json is missing: a part of the checkpoint was"),
        (edit_digests(lambda c: c.update(algorithm="md4")), "has the unknown algorithm 'md4'"),
        (edit_digests(lambda c: c.update(files=[])), "its files are no object of names with size and digest"),
        (edit_digests(lambda c: c["files"].update(x=[1])), "its files are no object"),
        (edit_digests(lambda c: c["files"].update({"../x": [1, "0" * 32]})), "points to '../x', a file outside"),
    ],
)
def test_recorded_digests_are_checked(tmp_path, damage, expected):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    damage(folder)
    assert [True] == [expected in problem for problem in find_problems(folder)], find_problems(folder)


def test_digests_that_cannot_be_checked_are_a_problem_and_say_what_to_install(tmp_path, monkeypatch):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    monkeypatch.setitem(sys.modules, "xxhash", None)
    expected = "digests of files need xxhash: pip install xxhash"
    assert [True] == [problem.endswith(expected) for problem in find_problems(folder)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is no checkpoint: it has no safetensors file, no index of such files and no .metadata"),
        (["pytorch_model.bin"], "it holds pytorch_model.bin, pickles, which are never read"),
        (["a.safetensors", "b.safetensors"], "holds a.safetensors, b.safetensors and no index"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, files, message):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=message):
        read_contents(tmp_path)
    assert [True] == [message in problem for problem in find_problems(tmp_path)]


def test_a_path_that_leads_nowhere_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="gone is neither a file nor a folder"):
        read_contents(tmp_path / "gone")


def test_two_shards_with_a_plan_each_are_of_two_saves(tmp_path):
    folder = sharded(tmp_path)
    for name, tensors in (("one", {"a": torch.zeros(2)}), ("two", {"b": torch.zeros(3), "c": torch.zeros(())})):
        save_file(tensors, folder / f"{name}.safetensors", metadata={"tiepolicy": json.dumps({})})
    with pytest.raises(CheckpointError, match="holds files of several saves: 2 of them have a manifest"):
        read_contents(folder)


def test_a_name_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path)
    save_file({"a": torch.zeros(9), "b": torch.zeros(3), "c": torch.zeros(())}, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match="holds a twice, in one.safetensors and two.safetensors"):
        read_contents(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0), byte=st.integers(0, 255), file=st.sampled_from(["manifest.json", ".metadata", INDEX]))
def test_a_changed_byte_is_a_sentence_or_no_problem_and_never_a_crash(tmp_path, place, byte, file):
    """What cannot be read is a problem; what can be read need not be right."""
    folder = tmp_path / ("hf" if file == INDEX else "dcp")
    if not folder.exists():
        sharded(folder) if file == INDEX else tiepolicy_dcp.save(folder, model=TiedPair())
    original = (folder / file).read_bytes()
    changed = bytearray(original)
    changed[place % len(changed)] = byte
    (folder / file).write_bytes(changed)
    try:
        read_contents(folder)
        is_readable = True
    except TiePolicyError:
        is_readable = False
    problems = find_problems(folder)
    (folder / file).write_bytes(original)
    assert is_readable or problems


boxes = st.lists(
    st.tuples(st.tuples(*[st.integers(0, 4)] * 2), st.tuples(*[st.integers(0, 3)] * 2)), min_size=1, max_size=5
)


@given(boxes)
def test_boxes_overlap_if_they_share_a_cell(chunks):
    cells = [
        {(x, y) for x in range(left, left + width) for y in range(top, top + height)}
        for (left, top), (width, height) in chunks
    ]
    assert (len(set().union(*cells)) < sum(map(len, cells))) == _overlap(chunks)


def test_how_much_a_check_reads_is_known_before(tmp_path):
    folder, read = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair()), []
    assert [] == find_problems(folder, seen=read.append)
    assert 0 < sum(read) == recorded_bytes(folder)
    assert 0 == recorded_bytes(tiepolicy_dcp.save(tmp_path / "sizes", model=TiedPair(), digests=False))
    assert recorded_bytes(folder / "__0_0.distcp") is None
    (folder / "digests.json").write_text("{")
    assert recorded_bytes(folder) is None
