"""A disk that is full, read-only, forbidden or broken: a sentence with file and cause, and the checkpoint before."""

import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from disks import compiled_shim, make_read_only, mount_small_disk, why_nothing_can_be_mounted
from runs import Training, fast_folder, forked, latest, leftovers

from tiepolicy_dcp import CheckpointError, CheckpointStore

PAGE = os.sysconf("SC_PAGE_SIZE")
MOUNTLESS = why_nothing_can_be_mounted()
needs_mounts = pytest.mark.skipif(MOUNTLESS is not None, reason=str(MOUNTLESS))


def refused(store, step, cause):
    """The file that a save names, after it was found to fail for that cause with a sentence."""
    training = Training(step)
    with pytest.raises(CheckpointError) as caught:
        training.save(store, consolidated=True)
    sentence = str(caught.value)
    assert cause in sentence
    assert "\n" not in sentence
    return Path(re.findall(rf"{store.root}[^'\s:,]*", sentence)[-1])


def outcome_of(child):
    child.join()
    return child.exitcode


@needs_mounts
def test_a_disk_with_too_few_pages_left_keeps_the_old_checkpoint_whatever_the_number():
    """Ten of all numbers of pages that are too few; all of them with `make slow`."""
    with fast_folder() as root:
        assert 0 == outcome_of(forked(fill_by_pages, root, 10))


@needs_mounts
@pytest.mark.slow
def test_a_disk_with_any_number_of_pages_too_few_keeps_the_old_checkpoint():
    with fast_folder() as root:
        assert 0 == outcome_of(forked(fill_by_pages, root, None))


def fill_by_pages(root, num_tries):
    """Save on a disk with 0, 1, 2, ... pages left, or some of these numbers, until there are enough."""
    mount_small_disk(root, 64 * PAGE)
    ballast = root / "ballast"
    with CheckpointStore(root, keep_last=1) as store:
        Training(0).save(store, consolidated=True)
        free = os.statvfs(root).f_bavail
        needed = next(number for number in range(free) if fits(store, ballast, free, number))
        tries = range(needed) if num_tries is None else range(0, needed, -(-needed // num_tries))
        assert len(tries) > 5
        files = set()
        for number in tries:
            before = latest(root)
            ballast.write_bytes(bytes((os.statvfs(root).f_bavail - number) * PAGE))
            files.add(refused(store, before + 1, "No space left on device").name)
            assert before == latest(root)
            ballast.unlink()
            Training(before + 1).save(store, consolidated=True)  # the next save finds room, and its name free
            assert before + 1 == latest(root)
            assert set() == leftovers(root, checkpoints=[f"step_{before + 1}"])
    print(f"{len(tries)} disks of 0 to {needed - 1} free pages; the errors name {', '.join(sorted(files))}")


def fits(store, ballast, free, number):
    """Whether a save goes through with that many pages left."""
    step = latest(store.root) + 1
    ballast.write_bytes(bytes((os.statvfs(store.root).f_bavail - number) * PAGE))
    try:
        Training(step).save(store, consolidated=True)
    except CheckpointError:
        return False
    finally:
        ballast.unlink()
    return True


@needs_mounts
def test_a_disk_that_becomes_read_only_is_named_and_still_read():
    with fast_folder() as root:
        assert 0 == outcome_of(forked(save_read_only, root))


def save_read_only(root):
    mount_small_disk(root, 256 * PAGE)
    with CheckpointStore(root) as store:
        Training(0).save(store)
    make_read_only(root)
    with CheckpointStore(root) as store:
        refused(store, 1, "Read-only file system")
        assert 0 == latest(root)


def test_a_folder_without_permission_is_named_and_still_read():
    with fast_folder() as root:
        root.chmod(0o755)
        with CheckpointStore(root) as store:
            Training(0).save(store)
        assert 0 == latest(root)  # what reading imports may be forbidden to the child
        root.chmod(0o555)
        assert 0 == outcome_of(forked(save_as_nobody, root))
        root.chmod(0o755)


def save_as_nobody(root):
    if os.geteuid() == 0:  # whom nothing is forbidden
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    with CheckpointStore(root) as store:
        refused(store, 1, "Permission denied")
        assert 0 == latest(root)


def test_a_write_that_fails_in_the_middle_of_a_shard_is_named_and_leaves_nothing():
    with fast_folder() as root:
        assert 0 == outcome_of(forked(save_to_a_limit, root))


def save_to_a_limit(root):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointStore(root, keep_last=1) as store:
        Training(0).save(store)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # of a shard of 8 kB
        assert "__0_0.distcp" == refused(store, 1, "File too large").name
        assert 0 == latest(root)
        assert set() == leftovers(root, checkpoints=["step_0"])
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        Training(1).save(store)
        assert 1 == latest(root)


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = compiled_shim(tmp_path_factory.mktemp("shim"))
    if library is None:
        pytest.skip("needs Linux and a C compiler: the library that makes fsync fail is compiled here")
    return library


def run_with(shim, function, root):
    """Run a function of this module in a new process in which `fsync` can be made to fail."""
    code = f"from pathlib import Path; import test_disk; test_disk.{function.__name__}(Path({str(root)!r}))"
    environment = os.environ | {
        "LD_PRELOAD": str(shim),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    assert 0 == result.returncode, result.stdout
    print(result.stdout)


@pytest.mark.slow
def test_any_flush_that_fails_is_named_and_keeps_a_whole_checkpoint(shim, tmp_path):
    run_with(shim, fail_every_flush, tmp_path / "root")


def fail_every_flush(root):
    """The first flush of a save fails, then that of the next one the second, and so on through all of them."""
    controls = ctypes.CDLL(None)
    with CheckpointStore(root, keep_last=1) as store:
        Training(0).save(store, consolidated=True)
        controls.fault_fail(-1)
        Training(1).save(store, consolidated=True)
        num_flushes = controls.fault_calls()
        files = set()
        for call in range(1, num_flushes):  # the last belongs to the deletion of the old one, see below
            before = latest(root)
            controls.fault_fail(call)
            files.add(refused(store, before + 1, "Input/output error").name)
            controls.fault_fail(-1)
            assert latest(root) in (before, before + 1)
            Training(before + 2).save(store, consolidated=True)
            assert before + 2 == latest(root)
            assert set() == leftovers(root, checkpoints=[f"step_{before + 2}"])
        before = latest(root)
        controls.fault_fail(num_flushes)
        Training(before + 1).save(store, consolidated=True)
        assert before + 1 == latest(root)
    print(f"{num_flushes} flushes; the errors name {', '.join(sorted(files))}")
    assert {"__0_0.distcp", ".metadata", "manifest.json", "model.safetensors", "digests.json"} <= files


@pytest.mark.slow
def test_a_disk_that_hangs_holds_no_training_up_and_moves_no_pointer(shim, tmp_path):
    run_with(shim, train_beside_a_hanging_disk, tmp_path / "root")


def train_beside_a_hanging_disk(root):
    controls = ctypes.CDLL(None)
    with CheckpointStore(root) as store:
        Training(0).save(store)
        hold = root / "hold"
        hold.touch()
        held = os.fsencode(hold)
        controls.fault_hold(held)
        training = Training(1)
        pending = training.async_save(store, "thread")
        (weight,) = training.model.parameters()
        weight.data.zero_()  # training goes on
        assert (False, 0) == (pending.done(), latest(root))
        hold.unlink()
        pending.result()
        assert 1 == latest(root)
