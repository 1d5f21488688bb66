"""What a disk is asked for comes into memory, whoever asks, and nothing else happens."""

import ctypes
import mmap
import multiprocessing
import os
import platform
import sys
import time

import numpy as np
import pytest

from tiepolicy._digests import _fill, _is_in_memory
from tiepolicy.files import read_soon, spare_processors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages in memory are counted by Linux's mincore")
SIZE = 3 << 22


@pytest.fixture
def cold(tmp_path):
    """Descriptor of a file of `SIZE` that is on the disk only."""
    path = tmp_path / "cold"
    path.write_bytes(os.urandom(SIZE))
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(descriptor).any():
        pytest.skip("the file system of temporary files keeps them in memory")
    yield descriptor
    os.close(descriptor)


def in_memory(descriptor):
    """Which pages of a file are."""
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as whole:
        found = (ctypes.c_ubyte * (len(whole) // mmap.PAGESIZE))()
        address = np.frombuffer(whole, np.uint8).ctypes.data
        assert 0 == ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(whole)), found)
    return np.frombuffer(found, np.uint8) & 1 == 1


def wait_for(descriptor, pages):
    end = time.monotonic() + 30
    while not in_memory(descriptor)[pages].all():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_asked_for_comes_into_memory(cold):
    read_soon(cold, 0, SIZE)
    wait_for(cold, slice(None))


def test_little_more_than_a_short_end_comes(cold):
    read_soon(cold, SIZE - 100, 100)
    wait_for(cold, slice(-1, None))
    assert not in_memory(cold)[: 2 * SIZE // 3 // mmap.PAGESIZE].any()


def test_what_is_in_memory_is_not_asked_for(cold, monkeypatch):
    if tuple(map(int, platform.release().split(".")[:2])) < (6, 5):
        pytest.skip("Linux tells what is in memory since 6.5")
    page = 4 * mmap.PAGESIZE
    os.pread(cold, 1, page)
    for start, num_bytes in [(page, mmap.PAGESIZE), (page + 10, 5), (SIZE - 10, 10), (0, SIZE), (page - 1, 2)]:
        pages = slice(start // mmap.PAGESIZE, (start + num_bytes - 1) // mmap.PAGESIZE + 1)
        assert in_memory(cold)[pages].all() == _is_in_memory(cold, start, num_bytes)
    os.pread(cold, SIZE, 0)
    assert _is_in_memory(cold, 0, SIZE)
    monkeypatch.setattr(mmap, "mmap", None)
    read_soon(cold, 100, SIZE - 100)


@pytest.mark.parametrize("num_bytes", [0, -5])
def test_nothing_comes_if_nothing_is_asked_for(cold, num_bytes):
    read_soon(cold, 1, num_bytes)
    time.sleep(0.05)
    assert not in_memory(cold).any()


def test_a_child_can_ask_too_though_it_has_none_of_the_threads(cold):
    read_soon(cold, 0, 1 << 22)
    wait_for(cold, slice(0, 1))
    os.posix_fadvise(cold, 0, 0, os.POSIX_FADV_DONTNEED)
    child = multiprocessing.get_context("fork").Process(target=read_soon, args=(cold, 1 << 23, 1 << 22))
    child.start()
    wait_for(cold, slice(-1, None))
    child.join()
    assert 0 == child.exitcode


def test_a_file_that_ends_early_harms_nobody(cold):
    """To touch what is mapped of it would end the process."""
    region = mmap.mmap(cold, SIZE, prot=mmap.PROT_READ)
    os.ftruncate(cold, 5000)
    read_soon(cold, 0, SIZE)
    read_soon(cold, SIZE // 2, SIZE)
    _fill(region)
    read_soon(cold, 0, 4096)
    wait_for(cold, slice(0, 1))


@pytest.mark.parametrize(("processors", "processes", "spare"), [(1, None, 0), (8, None, 7), (8, 3, 1), (2, 4, 0)])
def test_processors_are_shared_with_the_other_processes_of_this_machine(processors, processes, spare, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(processors))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert spare == spare_processors()
