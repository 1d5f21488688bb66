"""Headers: what is accepted is what safetensors accepts, and damage is one clear error."""

import json

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from strategies import view_dicts
from tiepolicy._safetensors import DTYPES, read_header
from tiepolicy.errors import CheckpointError

# The folder of a test is shared by its examples, and each writes its file anew.
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def framed(header, data=b""):
    """A file of a header, given as text or values, and the bytes of the tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape=(2,), dtype="U8", start=0, end=2):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def read(folder, data):
    path = folder / "x.safetensors"
    path.write_bytes(data)
    return read_header(path)


@in_one_folder
@given(state_dict=view_dicts())
def test_a_header_says_what_was_saved(tmp_path, state_dict):
    tensors = {name: tensor.contiguous().clone() for name, tensor in state_dict.items()}
    header = read(tmp_path, save(tensors, metadata={"format": "pt"}))
    assert {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes)
        for name, tensor in tensors.items()
    } == {name: (stored.shape, stored.dtype, stored.nbytes) for name, stored in header.tensors.items()}
    assert {"format": "pt"} == header.metadata


def test_every_dtype_that_safetensors_writes_has_its_name_in_torch():
    for name, bits in DTYPES.values():
        dtype = getattr(torch, name, None)
        # Torch packs two numbers of four bits into an element and has no numbers of six.
        assert dtype is None or bits in (4, 8 * dtype.itemsize)
    assert {"float6_e2m3", "float6_e3m2"} == {name for name, _ in DTYPES.values() if not hasattr(torch, name)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is cut or no safetensors file: it has 0 bytes"),
        (b"\x08\0\0\0\0\0\0\0{", "it has 9 bytes, and a header of 8 was announced"),
        (b"\xff" * 8, "a header of 18446744073709551615 was announced"),
        (framed(b"[]"), "its header does not begin with an object"),
        (framed(b"{"), "is damaged: Expecting property name"),
        (framed(b'{"a": \xff}'), "is damaged: 'utf-8' codec"),
        (framed(b'{"a": NaN}'), "is damaged: NaN is not JSON"),
        (framed(b'{"a": ' + b"[" * 100_000), "is damaged: maximum recursion depth"),
        (framed({"a": 3}), "is damaged at a: it does not consist of dtype, shape and data_offsets"),
        (framed({"a": entry() | {"more": 1}}, b"12"), "at a: it does not consist of"),
        (framed({"a": entry(dtype="F7")}, b"12"), "at a: its dtype 'F7' is not known"),
        (framed({"a": entry(dtype=[])}, b"12"), r"at a: its dtype \[\] is not known"),
        (framed({"a": entry(shape=(-2,))}, b"12"), r"at a: its shape \[-2\] is no list of sizes"),
        (framed({"a": entry(shape=(True, 2))}, b"12"), "is no list of sizes"),
        (framed({"a": entry(shape=(2**62, 2**62, 0), end=0)}), "is larger than any memory"),
        (framed({"a": entry(shape=(3,))}, b"12"), r"at a: \[3\] of U8 are not the 2 bytes it takes"),
        (framed({"a": entry(start=2, end=0)}, b"12"), r"its data_offsets \[2, 0\] are no start and end"),
        (framed({"a": entry()}, b"1"), "at a: it ends at byte 2 of 1: the file was cut"),
        (framed({"a": entry()}, b"123"), "its last 1 bytes belong to no tensor"),
        (framed({"a": entry(), "b": entry(start=1, end=3)}, b"123"), "at b: its bytes overlap those of a"),
        (framed({"a": entry(), "b": entry(start=3, end=5)}, b"12345"), "1 bytes between a and it belong to no tensor"),
        (framed(b'{"a": {}, "b": {}, "a": {}}'), "the key 'a' occurs twice"),
        (framed({"__metadata__": {"a": 3}}), "the __metadata__ of its header is no object of strings"),
    ],
)
def test_a_damaged_header_is_refused_with_its_cause(tmp_path, data, message):
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, data)


def test_a_header_too_long_to_read_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_009)  # a sparse file
    with pytest.raises(CheckpointError, match="announces a header of 100000001 bytes, more than the 100000000"):
        read_header(path)


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="gone.safetensors cannot be read"):
        read_header(tmp_path / "gone.safetensors")


def check_against_safetensors(folder, data):
    """What is accepted, safetensors accepts with the same shapes; all else is a `CheckpointError`."""
    try:
        header = read(folder, data)
    except CheckpointError:
        return
    with safetensors.safe_open(folder / "x.safetensors", "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert expected == {name: stored.shape for name, stored in header.tensors.items()}


@in_one_folder
@given(data=st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(tmp_path, data):
    check_against_safetensors(tmp_path, data)


sizes = st.integers(-1, 3)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BOOL", "F16", "F4", "F99"]),
        "shape": st.lists(sizes, max_size=2),
        "data_offsets": st.lists(st.integers(0, 6), min_size=2, max_size=2),
    }
)


@in_one_folder
@given(header=st.dictionaries(st.sampled_from("abc"), entries, max_size=3), data=st.binary(max_size=6))
def test_any_header_is_read_as_safetensors_reads_it_or_refused(tmp_path, header, data):
    check_against_safetensors(tmp_path, framed(header, data))


@in_one_folder
@given(state_dict=view_dicts(), place=st.integers(0), byte=st.integers(0, 255), cut=st.integers(0, 9))
def test_a_changed_or_cut_file_is_read_as_safetensors_reads_it_or_refused(tmp_path, state_dict, place, byte, cut):
    data = bytearray(save({name: tensor.contiguous().clone() for name, tensor in state_dict.items()}))
    data[place % len(data)] = byte
    check_against_safetensors(tmp_path, bytes(data[: len(data) - cut]))
