"""Files made to do harm: none is run, none is waited for, and none costs more than a multiple of its length."""

import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import tracemalloc
import zipfile
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import tiepolicy
import tiepolicy_dcp
from eagle3.cli import main as eagle3_main
from eagle3.trainer import train
from eagle3_runs import ALONE, config_of, make_run_world
from models import TiedPair
from tiepolicy import TensorSpec
from tiepolicy._cli import main
from tiepolicy._contents import read_plan
from tiepolicy._metadata import MAX_METADATA_BYTES, parse_sharded_metadata
from tiepolicy._verify import find_problems
from tiepolicy.errors import CheckpointError, ShapeMismatchError, TiePolicyError
from tiepolicy.files import DIGESTS, digests_text, measure, read_json
from tiepolicy_dcp import CheckpointStore
from tiepolicy_dcp._archives import check_archive, find_tensor


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@contextmanager
def no_waiting():
    """Ends what waits for a pipe, in the middle of a system call, with an error."""

    def stop(*_):
        raise AssertionError("a reader waits for what never comes")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)


def record_(folder):
    """Set the digests right for what the files hold now."""
    (folder / DIGESTS).write_text(digests_text(measure(path for path in folder.iterdir() if path.name != DIGESTS)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A DCP folder with every kind of file in it."""
    model = TiedPair()
    optimizer = torch.optim.AdamW(model.parameters())
    extra = {"rng": torch.get_rng_state(), "loss": float("nan")}
    folder = tmp_path_factory.mktemp("whole") / "c"
    return tiepolicy_dcp.save(folder, model=model, optimizer=optimizer, extra=extra, consolidated=True)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to do harm to."""
    return shutil.copytree(whole, tmp_path / "c")


FILES = [
    ".metadata",
    "__0_0.distcp",
    "digests.json",
    "extra.json",
    "extra.safetensors",
    "manifest.json",
    "model.safetensors",
]


def assert_refused(folder, message, capsys):
    """A load says so and leaves the model alone, `verify` says the same, and no command waits or fails otherwise."""
    model = TiedPair()
    before = model.lm_head.weight.clone()
    with no_waiting():
        with pytest.raises(CheckpointError, match=message):
            tiepolicy_dcp.load(folder, model=model)
        problems = find_problems(folder)
        assert any(re.search(message, problem) for problem in problems), problems
        for command in (["inspect"], ["verify"], ["diff", str(folder)]):
            assert main([*command, str(folder)]) in (0, 1)
    assert torch.equal(before, model.lm_head.weight)
    capsys.readouterr()


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder, capsys, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert_refused(folder, f"{name} is a pipe, a socket or a device where a checkpoint has a file", capsys)


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, capsys, name):
    """Not even to a file that holds what was written."""
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert_refused(folder, f"{name}'?,? (is a link to )?a file outside the checkpoint", capsys)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("is_recorded", [False, True], ids=["unnoticed", "noticed"])
def test_a_pickle_in_place_of_a_file_is_not_run(folder, tmp_path, capsys, name, is_recorded):
    """Whether or not the digests were set right for it."""
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    if is_recorded and name != DIGESTS:
        record_(folder)
    if is_recorded and name == "model.safetensors":  # the export, which no load reads
        assert any(name in problem for problem in find_problems(folder))
    else:
        assert_refused(folder, name, capsys)
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_in_a_data_file_is_not_run(folder, tmp_path):
    """Neither where a tensor should be nor where the metadata says there is an object."""
    archive = io.BytesIO()
    torch.save([torch.zeros(4096), Payload(tmp_path / "pwned")], archive)
    metadata = dcp.FileSystemReader(folder).read_metadata()
    for index in metadata.storage_data:
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", 0, len(archive.getvalue()))
    (folder / "__0_0.distcp").write_bytes(archive.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    model = TiedPair()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="could not be read: .*posix.mkdir, which no tensor needs"):
        tiepolicy_dcp.load(folder, model=model, optimizer=optimizer, verify="off")
    assert not (tmp_path / "pwned").exists()


def zipped(content, *, method=zipfile.ZIP_STORED, **others):
    """An archive as `torch.save` writes it, with a pickle of one's own."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in ({"data.pkl": content, "byteorder": b"little", "data/0": b""} | others).items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def nested_key(depth):
    """A dict whose only key is a pair of pairs of pairs: its hash takes 2 ** depth steps."""
    return b"\x80\x02}" + b")" + b"2\x86" * depth + b"K\x00s."


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (zipped(nested_key(60)), "no string or record for a key"),
        (zipped(b"\x80\x02Nr\xff\xff\xff\x7f.") + b"", "a NoneType, no tensor"),
        (zipped(b"N" * 70_000 + b"."), "its data.pkl has 70001 bytes"),
        (zipped(b"N.", method=zipfile.ZIP_DEFLATED, bomb=bytes(1 << 22)), "was compressed, or is larger than its file"),
        (zipped(pickle.dumps(print)), "asks for builtins.print, which no tensor needs"),
        (zipped(pickle.dumps({"a": 1})), "a dict, no tensor"),
        (b"PK\x03\x04", "File is not a zip file"),
        (pickle.dumps(3), "File is not a zip file"),
    ],
    ids=["hash", "memo", "long", "compressed", "call", "dict", "cut", "bare"],
)
def test_an_archive_that_was_made_to_exhaust_its_reader_is_not_handed_on(archive, message):
    with pytest.raises(CheckpointError, match=f"the bytes of a are .*{message}"), no_waiting():
        check_archive(io.BytesIO(archive), 0, len(archive), name="a")
    assert find_tensor(io.BytesIO(archive), 0, len(archive)) is None


def peak_bytes(action):
    """The most memory that an action takes, in bytes, beside its error."""
    tracemalloc.start()
    try:
        with pytest.raises(TiePolicyError) as caught:
            action()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak, str(caught.value)


DCP = b"ctorch.distributed.checkpoint.metadata\n"
MANY = 700


def copied_sizes():
    """One long list, made a `torch.Size` many times."""
    return b"ctorch\nSize\nq\x000](" + b"N" * MANY + b"eq\x010" + b"h\x00h\x01\x85R" * MANY + b"."


def copied_arguments():
    """One long tuple, given to records many times."""
    return DCP + b"Metadata\nq\x000(" + b"N" * MANY + b"tq\x010" + b"h\x00h\x01R" * MANY + b"."


def shared_chunks():
    """One list of chunks that many tensors have."""
    chunk = ChunkStorageMetadata(torch.Size((0,)), torch.Size((1,)))
    chunks, properties = [chunk] * MANY, TensorProperties(dtype=torch.float32)
    tensors = {str(name): TensorStorageMetadata(properties, torch.Size((MANY,)), chunks) for name in range(MANY)}
    return pickle.dumps(Metadata(tensors, None, {}))


@pytest.mark.parametrize("bomb", [copied_sizes, copied_arguments, shared_chunks])
def test_metadata_takes_memory_by_its_length_alone(tmp_path, bomb):
    """Each of these took the square of it: any memory for a megabyte."""
    data = bomb()
    (tmp_path / ".metadata").write_bytes(data)
    peak, message = peak_bytes(lambda: parse_sharded_metadata(tmp_path))
    assert "is damaged" in message
    assert peak < 100 * len(data)


def test_metadata_that_is_larger_than_any_is_not_read(tmp_path):
    with (tmp_path / ".metadata").open("wb") as file:
        file.truncate(1 << 40)  # a sparse file
    peak, message = peak_bytes(lambda: parse_sharded_metadata(tmp_path))
    assert f"has {1 << 40} bytes, more than the {MAX_METADATA_BYTES} that are read" in message
    assert peak < 100_000


def test_a_tensor_that_claims_more_than_the_files_hold_is_refused(folder):
    """Before room is made for it: a part of it may be all that the model has."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    huge = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32),
        torch.Size((1 << 40,)),
        [ChunkStorageMetadata(torch.Size((0,)), torch.Size((1 << 40,)))],
    )
    metadata.state_dict_metadata["model.huge"] = huge
    metadata.storage_data[MetadataIndex("model.huge", (0,), 0)] = _StorageInfo("__0_0.distcp", 0, 64)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=r"model.huge \(1099511627776,\) has 4398046511104 bytes, of which 64 are"
    ):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="off")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "maximum recursion depth"),
        ('{"a":' * 100_000, "maximum recursion depth"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ("[" + "[]," * 5_000_001 + "[]]", "5000003 lists and objects; no more than 100000000 and 5000000 are read"),
        ('{"a": ' + "9" * 5_000 + "}", "is damaged: Exceeds the limit"),
        ("\xff", "is damaged: 'utf-8' codec"),
        ("[]", "it holds a list, expected an object"),
    ],
    ids=["lists", "objects", "twice", "nan", "infinity", "many", "digits", "bytes", "list"],
)
def test_json_that_was_made_to_exhaust_or_to_confuse_its_reader_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"x.json .*{message}"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["digests.json", "extra.json", "manifest.json"])
def test_every_json_file_is_read_so(folder, name):
    (folder / name).write_text('{"a":' * 100_000)
    with pytest.raises(TiePolicyError, match=f"{name} is damaged: maximum recursion depth"):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="full" if name == DIGESTS else "off")
    assert any("maximum recursion depth" in problem for problem in find_problems(folder))


@pytest.mark.parametrize("value", [[1], {}, None, "gone"])
def test_extra_state_that_names_no_tensor_of_its_file_is_refused(folder, value):
    (folder / "extra.json").write_text(json.dumps({"rng": {"tensor in extra.safetensors": value}}))
    with pytest.raises(CheckpointError, match="extra.safetensors is damaged or does not belong to extra.json"):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="off")


def test_extra_state_may_hold_numbers_that_json_has_none_for(folder):
    assert math.isnan(tiepolicy_dcp.load(folder, model=TiedPair()).extra["loss"])


EVIL = "a\x1b]0;owned\x07\r\n\u202eb"


def test_names_reach_no_terminal_as_they_are(tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    save_file({EVIL: torch.zeros(2)}, path)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    for command in (["inspect"], ["verify"], ["diff", str(tmp_path / "other.safetensors")], ["inspect", "--json"]):
        main([*command, str(path)])
        shown = capsys.readouterr()
        assert "" == "".join(c for c in shown.out + shown.err if not (" " <= c <= "~" or c == "\n"))


def test_an_error_shows_control_characters_and_still_carries_the_name(tmp_path):
    with pytest.raises(ShapeMismatchError) as caught:
        tiepolicy.reconcile(tiepolicy.plan({EVIL: torch.zeros(2)}), {EVIL: TensorSpec((3,), torch.float32)})
    assert "a\\x1b]0;owned\\x07\\r\\n\\u202eb has shape (3,)" in str(caught.value)
    assert (EVIL,) == caught.value.names


@pytest.mark.slow
def test_a_manifest_of_a_million_groups_is_refused_in_little_memory(tmp_path):
    """And one of as many lists as fit into a file that is read."""
    groups = '{"canonical": "a", "aliases": []},' * 1_000_001
    head = '{"format": "tiepolicy", "version": 1, "tensors": {}, "refused": [], "groups": ['
    (tmp_path / "manifest.json").write_text(head + groups[:-1] + "]}")
    peak, message = peak_bytes(lambda: read_plan(tmp_path))
    assert "lists more than 1000000 tensors, groups or refused claims" in message
    assert peak < 1 << 30
    (tmp_path / "manifest.json").write_text("[" * 99_000_000)
    peak, message = peak_bytes(lambda: read_plan(tmp_path))
    assert "99000000 lists and objects; no more than" in message
    assert peak < 110_000_000


@pytest.mark.slow
def test_the_trainer_runs_nothing_that_a_checkpoint_holds(tmp_path, capsys):
    """Neither when it evaluates or exports a run nor when it takes one up again."""
    out = tmp_path / "run"
    train(config_of(make_run_world(tmp_path), out, epochs=1), ALONE)
    folder = CheckpointStore(out / "checkpoints").resolve("LATEST")
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    record_(folder)
    commands = [
        ["evaluate", "--run", str(out)],
        ["export", "--run", str(out), "--out", str(tmp_path / "exported")],
    ]
    for command in commands:
        assert 2 == eagle3_main(command)
        assert "asks for posix.mkdir, which no tensor needs" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()
