"""DCP's metadata: it becomes plain records, runs nothing, and costs no more than its file is long."""

import io
import os
import pickle
import pickletools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from tiepolicy import TensorSpec
from tiepolicy._metadata import parse_sharded_metadata
from tiepolicy.errors import CheckpointError, UntrustedCheckpointError
from tiepolicy.files import read_sharded_metadata

in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def metadata(*, file="__0_0.distcp", size=(4, 2)):
    """What DCP writes of one tensor in two chunks, and one object."""
    halves = [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((2, 2))) for row in (0, 2)]
    properties = TensorProperties(dtype=torch.bfloat16)
    return Metadata(
        state_dict_metadata={
            "model.a": TensorStorageMetadata(properties, torch.Size(size), halves),
            "note": BytesStorageMetadata(),
        },
        planner_data={"model.a": ("model", "a"), "note": ("note",)},
        storage_data={
            MetadataIndex("model.a", (0, 0), 0): _StorageInfo(file, 0, 8),
            MetadataIndex("model.a", (2, 0), 1): _StorageInfo(file, 8, 8, ("zstd",)),
            MetadataIndex("note"): _StorageInfo(file, 16, 4),
        },
        storage_meta=StorageMeta(checkpoint_id=os.devnull),
    )


def parse(folder, data):
    (folder / ".metadata").write_bytes(data)
    return parse_sharded_metadata(folder)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_metadata_becomes_plain_records(tmp_path, protocol):
    found = parse(tmp_path, pickle.dumps(metadata(), protocol=protocol))
    assert TensorSpec((4, 2), torch.bfloat16) == found.tensors["model.a"].spec
    assert (((0, 0), (2, 2)), ((2, 0), (2, 2))) == found.tensors["model.a"].chunks
    assert ("note",) == found.objects
    assert [("model.a", (0, 0), 0, 8, ()), ("model.a", (2, 0), 8, 8, ("zstd",)), ("note", None, 16, 4, ())] == [
        (place.name, place.offsets, place.start, place.length, place.transforms) for place in found.places
    ]


def test_what_dcp_wrote_is_read_as_dcp_reads_it(tmp_path):
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save({"model": {"a": torch.zeros(3, 2), "b": torch.zeros(()), "n": 3}}, checkpoint_id=tmp_path)
    expected = dcp.FileSystemReader(tmp_path).read_metadata()
    found = read_sharded_metadata(tmp_path)
    assert {name: tensor.spec.shape for name, tensor in found.tensors.items()} == {
        name: tuple(entry.size)
        for name, entry in expected.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    assert {(index.fqn, info.offset, info.length) for index, info in expected.storage_data.items()} == {
        (place.name, place.start, place.length) for place in found.places
    }


def test_ranks_look_at_a_share_of_the_files_each(tmp_path):
    places = {MetadataIndex(f"note {number}"): _StorageInfo(f"{number}.distcp", 0, 4) for number in range(3)}
    notes = {index.fqn: BytesStorageMetadata() for index in places}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(notes, storage_data=places)))
    for name in ("0.distcp", "2.distcp"):
        (tmp_path / name).write_bytes(b"four")
    assert 3 == len(read_sharded_metadata(tmp_path, files=slice(0, None, 2)).places)
    with pytest.raises(CheckpointError, match=r"1\.distcp is missing"):
        read_sharded_metadata(tmp_path, files=slice(1, None, 2))


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_payload_inside_valid_metadata_is_named_and_not_run(tmp_path):
    trapped = metadata()
    trapped.planner_data = Payload(tmp_path / "pwned")
    with pytest.raises(UntrustedCheckpointError, match="is not trusted: it asks for posix.mkdir, which no"):
        parse(tmp_path, pickle.dumps(trapped))
    assert not (tmp_path / "pwned").exists()


DCP = b"torch.distributed.checkpoint.metadata"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cbuiltins\neval\n.", "asks for builtins.eval"),
        (b"ctorch\nload\n.", "asks for torch.load"),
        (b"ctorch.nn\nModule\n.", "asks for torch.nn.Module"),
        (b"Ppersistent\n.", "uses a part of pickle that no tensor needs"),
        (b"(i__main__\nexit\n.", "uses a part of pickle"),
        (b"\x82\x01.", "uses a part of pickle"),
        # Attributes of a class, which would outlive the load.
        (b"c" + DCP + b"\nMetadata\nN}\x86b.", "changes a type"),
        (b"c" + DCP + b"\nMetadata\n}b.", "changes a type"),
        (b"]}b.", "changes a list"),
    ],
)
def test_a_pickle_of_anything_else_is_not_trusted(tmp_path, data, message):
    with pytest.raises(CheckpointError, match=message):
        parse(tmp_path, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged: EOFError"),
        (b"N.", "is no metadata of a checkpoint"),
        (pickle.dumps({"a": 1}), "is no metadata of a checkpoint"),
        (pickle.dumps(Metadata({}, None, None)), "is no metadata of a checkpoint"),
        (pickle.dumps(metadata(size=(4, 2, 1))), "chunks of another number of dimensions"),
        (pickle.dumps(metadata(size=(4, -2))), "sizes that are no numbers of this machine"),
        (pickle.dumps(metadata(size=(4, 2**63))), "sizes that are no numbers of this machine"),
        (pickle.dumps(metadata(file=3)), "the place of a tensor is not made of strings"),
        (pickle.dumps(Metadata({3: 4}, None, {})), "no string or record for a key"),
    ],
)
def test_damaged_metadata_is_refused_with_its_cause(tmp_path, data, message):
    with pytest.raises(CheckpointError, match=message):
        parse(tmp_path, data)


@pytest.mark.parametrize(
    "data",
    [
        b"Nr\xff\xff\xff\xff.",  # a memo of four billion places
        b"})" + b"\x85" * 200_000 + b"Ns.",  # a key whose hash recurses
        b"})" + b"q\x00h\x00\x86" * 60 + b"Ns.",  # a key whose hash takes 2 ** 60 steps
        b"})" + b"q\x00h\x00\x86" * 60 + b".",  # a value whose text does
    ],
)
def test_a_short_file_cannot_take_much_memory_or_time(tmp_path, data):
    with pytest.raises(CheckpointError):
        parse(tmp_path, data)


def test_the_tricks_are_what_they_claim_to_be():
    """So that the tests above do not pass for a typing error."""
    pickletools.dis(b"Nr\xff\xff\xff\xff.", out=io.StringIO())
    assert ((),) == pickle.loads(b")\x85.")


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("../x.distcp", UntrustedCheckpointError, "points to '../x.distcp', a file outside the checkpoint"),
        ("/etc/passwd", UntrustedCheckpointError, "points to '/etc/passwd', a file outside"),
        ("C:\\x", UntrustedCheckpointError, "a file outside"),
        ("", UntrustedCheckpointError, "points to '', a file outside"),
        ("a\0b", UntrustedCheckpointError, "a file outside"),
        ("link.distcp", UntrustedCheckpointError, "points to 'link.distcp', a file outside"),
        ("loop.distcp", CheckpointError, "loop.distcp"),
        ("gone.distcp", CheckpointError, "gone.distcp is missing: a part of the checkpoint was lost"),
        (".", UntrustedCheckpointError, "is a folder where a checkpoint has a file"),
    ],
)
def test_a_file_is_opened_in_the_folder_only(tmp_path, file, error, message):
    folder = tmp_path / "c"
    folder.mkdir()
    (tmp_path / "x.distcp").touch()
    (folder / "link.distcp").symlink_to(tmp_path / "x.distcp")
    (folder / "loop.distcp").symlink_to(folder / "loop.distcp")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata(file=file)))
    with pytest.raises(error, match=message.replace("\\", "\\\\")):
        read_sharded_metadata(folder)


VALID = pickle.dumps(metadata())


@in_one_folder
@given(data=st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(tmp_path, data):
    with pytest.raises(CheckpointError):
        parse(tmp_path, data)


@in_one_folder
@given(changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_metadata_is_read_or_refused(tmp_path, changes):
    data = bytearray(VALID)
    for place, byte in changes:
        data[place] = byte
    try:
        found = parse(tmp_path, bytes(data))
    except CheckpointError:
        return
    assert all(type(size) is int for tensor in found.tensors.values() for size in tensor.spec.shape)


@in_one_folder
@given(length=st.integers(0, len(VALID) - 1))
def test_cut_metadata_is_refused(tmp_path, length):
    with pytest.raises(CheckpointError):
        parse(tmp_path, VALID[:length])


@in_one_folder
@given(
    value=st.recursive(
        st.sampled_from([os.system, eval, torch.load, torch.nn.Linear, 1 + 2j, slice(3), b"x", 1.5, range(2), {1}]),
        lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.text(), inner, min_size=1),
    )
)
def test_whatever_is_no_tensor_metadata_is_refused_wherever_it_stands(tmp_path, value):
    trapped = metadata()
    trapped.planner_data = value
    with pytest.raises(UntrustedCheckpointError, match="which no tensor needs|that no tensor needs"):
        parse(tmp_path, pickle.dumps(trapped))
