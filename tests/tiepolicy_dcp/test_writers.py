"""One writer on one root: the second is refused, and a dead one is no writer."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from models import TiedPair
from tiepolicy_dcp import CheckpointError, CheckpointStore
from torchrun import torchrun

WRITER = """
import sys, time
from models import TiedPair
from tiepolicy_dcp import CheckpointStore

store = CheckpointStore(sys.argv[1])
store.save("theirs", model=TiedPair())
print("saved", flush=True)
time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that has saved under the root and lives on."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, env=environment)
    try:
        assert b"saved\n" == process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, writer):
    store = CheckpointStore(tmp_path)
    left = tmp_path / ".theirs_2.0123abcd.unfinished"
    left.mkdir()
    with pytest.raises(CheckpointError) as refused:
        store.save("ours", model=TiedPair())
    assert (
        f"{tmp_path} is written by process {writer.pid} on host {socket.gethostname()}, and two writers would destroy "
        "each other's checkpoints: end that one first, or choose another folder"
    ) == str(refused.value)
    assert (["theirs"], True) == (store.names(), left.exists())
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    store.save("ours", model=TiedPair())
    assert (["ours", "theirs"], False) == (store.names(), left.exists())


@pytest.mark.slow
@pytest.mark.dist
def test_all_ranks_of_a_second_run_are_refused_with_one_sentence(tmp_path, writer):
    script = tmp_path / "second.py"
    script.write_text(
        "import sys\nimport torch.distributed as dist\nfrom models import TiedPair\n"
        "from tiepolicy_dcp import CheckpointError, CheckpointStore\n"
        "from torchrun import process_group\n"
        "with process_group():\n"
        "    try:\n        CheckpointStore(sys.argv[1]).save('ours', model=TiedPair())\n"
        "    except CheckpointError as error:\n"
        "        print(f'rank {dist.get_rank()}: {error}\\n', end='', flush=True)\n"
    )
    output = torchrun(script, tmp_path, num_processes=2).stdout
    sentence = f"{tmp_path} is written by process {writer.pid} on host {socket.gethostname()}"
    assert [True, True] == [f"rank {rank}: {sentence}" in output for rank in (0, 1)]
    assert ["theirs"] == CheckpointStore(tmp_path).names()


@pytest.mark.slow
def test_a_closed_store_lets_another_process_write(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save("ours", model=TiedPair())
    code = WRITER.replace("time.sleep(600)", "")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=True, capture_output=True)
    assert ["ours", "theirs"] == store.names()
