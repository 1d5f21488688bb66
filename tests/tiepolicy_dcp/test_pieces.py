"""Data files: tensors written piece by piece are those that `torch.load` reads, and the record is that of the file."""

import io
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from tiepolicy import TensorSpec
from tiepolicy._safetensors import DTYPES
from tiepolicy.errors import CheckpointError
from tiepolicy.files import FileRecord, check_files, measure
from tiepolicy_dcp import _files
from tiepolicy_dcp._archives import find_tensor
from tiepolicy_dcp._devices import PIECE_BYTES, Section, Streams, as_bytes, fetch, read_
from tiepolicy_dcp._files import write_safetensors, write_tensors
from tiepolicy_dcp._frames import STORAGES, frame


def framed(tensor):
    around = frame(tensor.shape, tensor.dtype)
    return around.head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes() + around.tail


@given(shape=st.lists(st.integers(0, 5), max_size=3), dtype=st.sampled_from(sorted(STORAGES.values(), key=str)))
def test_torch_reads_a_frame_and_what_is_in_it(shape, dtype):
    tensor = torch.randint(0, 2, shape).to(dtype)
    content = framed(tensor)
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (loaded.dtype, loaded.shape, loaded.stride())
    assert torch.equal(tensor, loaded)
    found = find_tensor(io.BytesIO(content), 0, len(content))
    assert (tuple(shape), dtype) == (found.shape, found.dtype)


def test_torch_reads_a_frame_with_another_reader_too(tmp_path):
    tensor = torch.arange(1000.0).reshape(50, 20)
    (tmp_path / "t.pt").write_bytes(framed(tensor))
    assert torch.equal(tensor, torch.load(tmp_path / "t.pt", mmap=True, weights_only=True))


def write_all(path, tensors):
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return write_safetensors(path, specs, lambda names: [tensors[name] for name in names])


@given(
    kinds=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.tuples(
            st.sampled_from([getattr(torch, name) for name, _ in DTYPES.values() if hasattr(torch, name)]),
            st.lists(st.integers(0, 5), min_size=1, max_size=3) | st.just([]),
        ).filter(lambda kind: kind != (torch.float4_e2m1fn_x2, [])),
    )
)
def test_a_safetensors_file_is_the_one_that_safetensors_writes_to_the_byte(kinds):
    tensors = {}
    for name, (dtype, shape) in kinds.items():
        noise = torch.randint(0, 2, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
        tensors[name] = noise.view(dtype).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        record = write_all(path, tensors)
        assert save(tensors, metadata={"format": "pt"}) == path.read_bytes()
        assert {path.name: record} == measure([path])


def test_a_dtype_that_safetensors_files_cannot_hold_is_refused_before_there_is_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="head is of complex128, which no safetensors file can hold: convert it"):
        write_all(tmp_path / "x", {"head": torch.zeros(2, dtype=torch.complex128)})
    assert [] == list(tmp_path.iterdir())


def every_layout():
    """Tensors of which each is stored in a way of its own, two of them longer than a piece."""
    return [
        torch.randint(0, 256, (2 * PIECE_BYTES + 12_345,), dtype=torch.uint8),
        torch.randn(1000, 1100).T,
        torch.arange(24.0).reshape(4, 6)[1:3, 2:5],
        torch.zeros(2).expand(3, 2),
        torch.tensor(7),
        torch.empty(0, 3),
        torch.randn(5).to(torch.float8_e4m3fn),
        torch.randn(3, dtype=torch.complex64).conj(),
    ]


def check_file(path, tensors, written):
    content = path.read_bytes()
    assert (len(content), xxhash.xxh3_128(content).hexdigest()) == written.record
    for tensor, (start, length) in zip(tensors, written.places, strict=True):
        loaded = torch.load(io.BytesIO(content[start : start + length]), weights_only=True)
        assert (tensor.dtype, tensor.shape) == (loaded.dtype, loaded.shape)
        assert torch.equal(tensor.to(torch.complex64), loaded.to(torch.complex64))


def test_tensors_of_every_layout_are_written_whole(tmp_path):
    tensors = every_layout()
    check_file(tmp_path / "data", tensors, write_tensors(tmp_path / "data", tensors))


def test_a_file_system_that_knows_only_its_cache_is_written_through_it(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_open_past_cache", lambda _: None)
    tensors = every_layout()
    check_file(tmp_path / "data", tensors, write_tensors(tmp_path / "data", tensors))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
def test_a_piece_that_cannot_be_written_is_an_error_that_is_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_open_past_cache", lambda _: os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(OSError, match="No space left on device"):
        write_tensors(tmp_path / "data", every_layout())


def test_without_a_digest_there_is_a_size(tmp_path):
    written = write_tensors(tmp_path / "data", [torch.ones(5)], digest=False)
    assert ((tmp_path / "data").stat().st_size, "") == written.record


def test_what_is_fetched_lies_where_it_belongs(tmp_path):
    tensors = every_layout()
    starts = [index * 3 * PIECE_BYTES for index in range(len(tensors))]
    with (tmp_path / "data").open("w+b") as file:
        fetch(file.fileno(), dict(zip(starts, tensors, strict=True)), Streams())
    content = (tmp_path / "data").read_bytes()
    for start, tensor in zip(starts, tensors, strict=True):
        expected = as_bytes(tensor).numpy().tobytes()
        assert expected == content[start : start + len(expected)]


@pytest.mark.parametrize("num_processors", [1, 64])
def test_sections_of_a_file_are_read_to_where_they_belong(tmp_path, num_processors, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(num_processors), raising=False)
    content = torch.randint(0, 256, (3 * PIECE_BYTES,), dtype=torch.uint8)
    (tmp_path / "data").write_bytes(content.numpy().tobytes())
    starts, lengths = (7, PIECE_BYTES + 9, 0), (PIECE_BYTES, 2 * PIECE_BYTES - 9, 0)
    targets = [torch.empty(length, dtype=torch.uint8) for length in lengths]
    with (tmp_path / "data").open("rb") as file:
        read_(Section(file.fileno(), *part) for part in zip(starts, targets, strict=True))
        for start, target in zip(starts, targets, strict=True):
            assert torch.equal(content[start : start + len(target)], target)
        with pytest.raises(EOFError, match="the file ends 1 bytes before the tensor"):
            read_([Section(file.fileno(), len(content) - 4, torch.empty(5, dtype=torch.uint8))])


@pytest.mark.parametrize("num_processors", [1, 2, 64])
@pytest.mark.parametrize("num_bytes", [0, 1, PIECE_BYTES, 11 * PIECE_BYTES + 5])
def test_a_file_has_the_digest_of_its_bytes_in_order_though_it_is_read_ahead(
    tmp_path, num_bytes, num_processors, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(num_processors), raising=False)
    content = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "data").write_bytes(content)
    records = {"data": FileRecord(num_bytes, xxhash.xxh3_128(content).hexdigest())}
    assert records == measure([tmp_path / "data"])
    check_files(tmp_path, records, ["data"], verify="full", advice="")
