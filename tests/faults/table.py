"""python tests/faults/table.py: what each fault does to each way to save, as the table of docs/reliability.md.

Every cell is run, in a process of its own: a model is saved, then saved anew with other weights, or damaged, and what a
load then finds is compared with both. `--write docs/reliability.md` puts the table there.
"""

import argparse
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from runs import fast_folder, forked
from transformers import LlamaConfig, LlamaForCausalLM

from tiepolicy_dcp import CheckpointStore

OLD, NEW = 1.0, 2.0
BEGIN, END = "<!-- printed by tests/faults/table.py -->\n", "<!-- end -->\n"


def model_of(value):
    """A tied model, the largest of whose tensors are not the first, and all of whose weights are one value."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


class Ours:
    """`CheckpointStore`, to save as `LATEST`."""

    title = "`CheckpointStore`"

    def save(self, root, value):
        with CheckpointStore(root) as store:
            store.save(f"value_{value}", model=model_of(value))

    def load(self, root):
        model = model_of(0.0)
        CheckpointStore(root).load("LATEST", model=model)
        return model.state_dict()

    def files(self, root):
        return CheckpointStore(root).resolve("LATEST")

    def plant(self, folder, payload):
        (folder / ".metadata").write_bytes(payload)


class TorchSave:
    """One file, written again."""

    title = "`torch.save`"

    def save(self, root, value):
        torch.save(model_of(value).state_dict(), root / "model.pt")

    def load(self, root):
        model = model_of(0.0)
        model.load_state_dict(torch.load(root / "model.pt"))
        return model.state_dict()

    def files(self, root):
        return root

    def plant(self, folder, payload):
        (folder / "model.pt").write_bytes(payload)


class PlainDCP:
    """One folder, written again."""

    title = "plain DCP"

    def save(self, root, value):
        dcp.save(model_of(value).state_dict(), checkpoint_id=root)

    def load(self, root):
        state = model_of(0.0).state_dict()
        dcp.load(state, checkpoint_id=root)
        return state

    def files(self, root):
        return root

    def plant(self, folder, payload):
        (folder / ".metadata").write_bytes(payload)


class SavePretrained:
    """One folder of shards, written again."""

    title = "`save_pretrained`"

    def save(self, root, value):
        model_of(value).save_pretrained(root, max_shard_size="34KB")

    def load(self, root):
        return LlamaForCausalLM.from_pretrained(root).state_dict()

    def files(self, root):
        return root

    def plant(self, folder, payload):
        for path in folder.glob("model*"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(payload)


PATHS = [Ours(), TorchSave(), PlainDCP(), SavePretrained()]


def largest(folder):
    """The file with most of the weights."""
    return max((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.stat().st_size)


def killed_in_the_middle(path, root):
    """The kernel ends the process at the first byte past half of the largest file."""
    path.save(root, OLD)
    limit = largest(path.files(root)).stat().st_size // 2

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        path.save(root, NEW)

    child = forked(save)
    child.join()
    assert -signal.SIGXFSZ == child.exitcode


def failed_in_the_middle(path, root):
    """The kernel refuses to write past half of the largest file, and goes on refusing."""
    path.save(root, OLD)
    limit = largest(path.files(root)).stat().st_size // 2
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        path.save(root, NEW)
    except BaseException as error:  # of DCP, too
        return f"{type(error).__name__}; "
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "no error; "


def cut_short(path, root):
    path.save(root, OLD)
    file = largest(path.files(root))
    os.truncate(file, file.stat().st_size // 2)


def one_bit_flipped(path, root):
    path.save(root, OLD)
    file = largest(path.files(root))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


def file_of_an_older_one(path, root):
    with fast_folder() as older:
        path.save(older, OLD)
        path.save(root, NEW)
        shutil.copy(largest(path.files(older)), largest(path.files(root)))


def one_file_missing(path, root):
    path.save(root, OLD)
    largest(path.files(root)).unlink()


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def pickle_that_runs_code(path, root):
    path.save(root, OLD)
    path.plant(path.files(root), pickle.dumps(Payload(root / "ran")))


FAULTS = {
    "killed in the middle of a save": killed_in_the_middle,
    "a write that fails in the middle of a save": failed_in_the_middle,
    "a file cut short": cut_short,
    "one bit flipped in the weights": one_bit_flipped,
    "the data file of an older checkpoint": file_of_an_older_one,
    "a file missing": one_file_missing,
    "a pickle that runs code": pickle_that_runs_code,
}


def outcome(fault, path, root):
    """What happens, in words."""
    said = FAULTS[fault](path, root) or ""
    damaged = "of a save" not in fault
    try:
        state = path.load(root)
    except BaseException as error:  # CheckpointException is no Exception
        found = type(error).__name__ if damaged else f"**old one lost** ({type(error).__name__})"
    else:
        values = {value for tensor in state.values() for value in tensor.unique().tolist()}
        known = {(OLD,): "old one whole", (NEW,): "new one whole"}
        found = known.get(tuple(values), "**wrong weights, no error**")
        if damaged and "older" in fault and values == {OLD}:
            found = "**older weights, no error**"
    return said + found + ("; **the code ran**" if (root / "ran").exists() else "")


def cell(fault, path):
    """The outcome, found in a process of its own."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def run():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        warnings.simplefilter("ignore")
        send.send(outcome(fault, path, root))

    with fast_folder() as root:
        child = forked(run)
        send.close()
        found = receive.recv()
        child.join()
    return found


def table():
    """The table in Markdown, a fault a row."""
    rows = [["fault", *(path.title for path in PATHS)], ["---"] * (1 + len(PATHS))]
    rows += [[fault, *(cell(fault, path) for path in PATHS)] for fault in FAULTS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="a page that holds the table")
    page = parser.parse_args().write
    torch.set_num_threads(1)
    printed = table()
    sys.stdout.write(printed)
    if page is not None:
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(before + BEGIN + printed + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
