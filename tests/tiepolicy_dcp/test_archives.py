"""What `torch.save` wrote is read in place, and what is no plain tensor is left to `torch.load`."""

import errno
import io
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

import tiepolicy_dcp
from models import TiedPair
from tiepolicy_dcp import CheckpointError
from tiepolicy_dcp._archives import StoredTensor, find_framed, find_tensor
from tiepolicy_dcp._frames import STORAGES, frame

linux = pytest.mark.skipif(sys.platform != "linux", reason="open files are named by Linux's /proc")
#: What stands before the archive in its file.
BEFORE = b"other tensors "


def saved(value):
    """A file with an archive in its middle, and where that is."""
    archive = io.BytesIO()
    torch.save(value, archive)
    content = archive.getvalue()
    return io.BytesIO(BEFORE + content + b"more"), len(BEFORE), len(content)


@given(shape=st.lists(st.integers(0, 5), max_size=3), dtype=st.sampled_from(sorted(STORAGES.values(), key=str)))
def test_a_plain_tensor_is_found_with_its_bytes(shape, dtype):
    tensor = torch.randint(0, 2, shape).to(dtype)
    file, offset, length = saved(tensor)
    found = find_tensor(file, offset, length)
    assert (tuple(shape), dtype) == (found.shape, found.dtype)
    expected = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert expected == file.getvalue()[found.start : found.start + len(expected)]


@given(
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    dtype=st.sampled_from(sorted(STORAGES.values(), key=str)),
    data=st.data(),
)
def test_a_frame_is_known_by_every_byte_at_both_ends(shape, dtype, data):
    around = frame(shape, dtype)
    num_bytes = torch.empty(shape, dtype=dtype).nbytes
    content = around.head + bytes(num_bytes) + around.tail
    found = find_framed(io.BytesIO(BEFORE + content), len(BEFORE), len(content), shape=shape, dtype=dtype)
    assert find_tensor(io.BytesIO(BEFORE + content), len(BEFORE), len(content)) == found
    assert found is not None
    at = data.draw(st.integers(0, len(content) - 1))
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    inside = len(around.head) <= at < len(around.head) + num_bytes
    assert inside == (find_framed(io.BytesIO(flipped), 0, len(content), shape=shape, dtype=dtype) is not None)
    assert find_framed(io.BytesIO(content), 0, len(content), shape=(*shape, 2), dtype=dtype) is None
    assert find_framed(io.BytesIO(content[:-1]), 0, len(content), shape=shape, dtype=dtype) is None


def mappings(monkeypatch, seen):
    """Tells `seen` which part of which file a disk is about to be asked for."""
    real = mmap.mmap

    def mapped(descriptor, num_bytes, *, prot, offset):
        seen(Path(f"/proc/self/fd/{descriptor}").readlink().name, offset, offset + num_bytes)
        return real(descriptor, num_bytes, prot=prot, offset=offset)

    monkeypatch.setattr(mmap, "mmap", mapped)
    monkeypatch.setattr("tiepolicy._digests._is_in_memory", lambda *_: False)  # what was just written is


@linux
def test_a_load_asks_for_short_files_first_and_for_the_start_of_a_long_one(tmp_path, monkeypatch):
    model = torch.nn.Linear(3000, 3000, bias=False)
    tiepolicy_dcp.save(tmp_path / "c", model=model)
    asked = []
    mappings(monkeypatch, lambda *part: asked.append(part))
    monkeypatch.setattr("tiepolicy_dcp._load.READ_AHEAD_BYTES", 1 << 23)
    tiepolicy_dcp.load(tmp_path / "c", model=model, verify="off")
    names = list(dict.fromkeys(name for name, *_ in asked))
    assert [".metadata", "manifest.json", "digests.json", "extra.json", "__0_0.distcp"] == names
    size = (tmp_path / "c" / "__0_0.distcp").stat().st_size
    long = [(start, end) for name, start, end in asked if name == "__0_0.distcp"]
    assert [(0, 1 << 22), (1 << 22, 1 << 23)] == long[:2]
    assert [(0, 1024), ((size - 1024) // 4096 * 4096, size)] == long[2:4]


@linux
@pytest.mark.parametrize("verify", ["full", "off"])
def test_a_disk_is_asked_for_all_that_is_read_and_for_little_more_at_a_time(tmp_path, monkeypatch, verify):
    model = torch.nn.Sequential(*(torch.nn.Linear(2000, 1500, bias=False) for _ in range(3)))
    tiepolicy_dcp.save(tmp_path / "c", model=model)
    size = (tmp_path / "c" / "__0_0.distcp").stat().st_size
    window, piece, asked, num_read = 1 << 23, 1 << 22, 0, 0
    read = os.preadv

    def asking(name, start, end):
        nonlocal asked
        if name == "__0_0.distcp" and end - start > piece // 8:
            asked = max(asked, end)

    def reading(descriptor, buffers, start):
        nonlocal num_read
        count = read(descriptor, buffers, start)
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "__0_0.distcp":
            num_read = max(num_read, start + count)
            assert num_read <= asked <= min(num_read + window + piece, size)
        return count

    mappings(monkeypatch, asking)
    monkeypatch.setattr(os, "preadv", reading)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # threads read ahead of others
    monkeypatch.setattr("tiepolicy_dcp._load.READ_AHEAD_BYTES", window)
    monkeypatch.setattr("tiepolicy._digests.READ_AHEAD_BYTES", window)
    monkeypatch.setattr("tiepolicy_dcp._devices._NUM_ASKED", window // piece)
    loaded = torch.nn.Sequential(*(torch.nn.Linear(2000, 1500, bias=False) for _ in range(3)))
    tiepolicy_dcp.load(tmp_path / "c", model=loaded, verify=verify)
    assert size - 1024 < num_read
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(model, loaded, strict=True))


def refused(*_, **__):
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.mark.parametrize(
    "changes",
    [
        {"mmap.MADV_HUGEPAGE": None},
        {"mmap.MADV_HUGEPAGE": -1},
        {"tiepolicy._digests._MADV_POPULATE_READ": -1},
        {"mmap.mmap": refused},
    ],
    ids=["macOS", "a kernel without huge pages", "an old kernel", "a file system without mappings"],
)
def test_a_load_does_without_a_system_that_can_be_asked(tmp_path, monkeypatch, changes):
    model = torch.nn.Linear(1000, 1000)
    tiepolicy_dcp.save(tmp_path / "c", model=model)
    monkeypatch.setattr("tiepolicy._digests._CACHESTAT", -1)
    for name, value in changes.items():
        if value is None:
            monkeypatch.delattr(name, raising=False)
        else:
            monkeypatch.setattr(name, value, raising=False)
    loaded = torch.nn.Linear(1000, 1000)
    tiepolicy_dcp.load(tmp_path / "c", model=loaded)
    assert torch.equal(model.weight, loaded.weight)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(6.0)[2:],
        torch.zeros(2).expand(3, 2),
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.nn.Parameter(torch.ones(2)),
        {"a": torch.ones(2)},
        print,
    ],
    ids=["transposed", "part", "expanded", "float8", "parameter", "dict", "function"],
)
def test_anything_else_is_left_to_torch(value):
    assert find_tensor(*saved(value)) is None


def test_an_archive_that_is_cut_or_none_at_all_is_left_to_torch():
    file, offset, length = saved(torch.ones(100))
    assert isinstance(find_tensor(file, offset, length), StoredTensor)
    assert find_tensor(file, offset, length - 300) is None
    assert find_tensor(file, 0, 5) is None
    assert find_tensor(io.BytesIO(b"PK\x03\x04 no zip"), 0, 12) is None


def test_tensors_that_plain_dcp_wrote_in_other_layouts_are_read_as_before(tmp_path):
    model = TiedPair(tied=False, vocab_size=50)
    state = {"model": {"embed_tokens.weight": model.embed_tokens.weight.T.contiguous().T.detach()}}
    state["model"]["lm_head.weight"] = torch.cat([torch.zeros(3, 4), model.lm_head.weight.detach()])[3:]
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(state, checkpoint_id=tmp_path / "c")
    loaded = TiedPair(tied=False, vocab_size=50)
    tiepolicy_dcp.load(tmp_path / "c", model=loaded)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_a_file_that_holds_another_shape_than_the_metadata_says_is_an_error(tmp_path):
    small, large = (tiepolicy_dcp.save(tmp_path / str(size), model=TiedPair(vocab_size=size)) for size in (12, 13))
    data = (small / "__0_0.distcp").read_bytes()
    (large / "__0_0.distcp").write_bytes(data.ljust((large / "__0_0.distcp").stat().st_size, b"\0"))
    with pytest.raises(CheckpointError, match="could not be read"):
        tiepolicy_dcp.load(large, model=TiedPair(vocab_size=13), verify="off")
