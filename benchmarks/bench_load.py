"""python benchmarks/bench_load.py --out load.json.

What grows when a model has many names or many bytes, a store many checkpoints, a policy many plugins, a job many ranks?
Peaks of memory are what the kernel counted in a process forked for the purpose, over what it held before. The ranks of
a job are made one after the other with torch's fake process group, each with its own shards; what they send is what
they would send, and is counted. `--parts ranks` runs one part; `--size 8` saves 8 GB (and needs 10 GB of memory).
"""

import argparse
import json
import multiprocessing
import pickle
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import tiepolicy
import tiepolicy_dcp
from tiepolicy.files import FileRecord
from tiepolicy_dcp._files import Written
from tiepolicy_dcp._reader import StoredTensors
from tiepolicy_dcp._writer import Share

Row = dict[str, Any]

NUM_TENSORS = 100


def forked(work: Callable[[], Row], *, prepare: Callable[[], object] = lambda: None) -> Row:
    """What some work returns, done in a child, with the memory that it took beyond what there was."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        prepare()
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        row = work()
        send.send(row | {"extra_mb": round((memory("VmHWM") - before) / 1e6)})

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    send.close()
    row: Row = receive.recv()
    child.join()
    return row


def memory(field: str) -> int:
    """Bytes of this process: in use (VmRSS), or at most since the reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def timed(work: Callable[[], Any]) -> float:
    """Seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def flat_model(num_names: int, num_elements: int, *, num_tied: int = 0) -> nn.Module:
    """Parameters in float32, the last of which are second names of the first."""
    model = nn.Module()
    for index in range(num_names - num_tied):
        model.register_parameter(f"p{index}", nn.Parameter(torch.full((num_elements,), float(index))))
    for index in range(num_tied):
        model.register_parameter(f"tied{index}", getattr(model, f"p{index}"))
    return model


def save_and_load(folder: Path, num_names: int, num_elements: int, *, num_tied: int = 0) -> list[Row]:
    """A save and a load of a flat model, each in a process of its own that has made the model first."""
    held = (num_names - num_tied) * num_elements * 4
    common = {"names": num_names, "state_mb": round(held / 1e6)}
    made: list[nn.Module] = []

    def make() -> None:
        made.append(flat_model(num_names, num_elements, num_tied=num_tied))

    def save() -> Row:
        plan_seconds = timed(lambda: tiepolicy.plan(made[0]))
        seconds = timed(lambda: tiepolicy_dcp.save(folder, model=made[0]))
        return {"what": "save", **common, "plan_s": round(plan_seconds, 2), "seconds": round(seconds, 2)}

    def load() -> Row:
        seconds = timed(lambda: tiepolicy_dcp.load(folder, model=made[0]))
        return {"what": "load", **common, "seconds": round(seconds, 2)}

    saved = forked(save, prepare=make)
    sizes = {name: (folder / name).stat().st_size for name in (".metadata", "manifest.json")}
    saved |= {"metadata_mb": round(sizes[".metadata"] / 1e6, 1), "manifest_mb": round(sizes["manifest.json"] / 1e6, 1)}
    return [saved, forked(load, prepare=make)]


def measure_names(folder: Path, _size: float) -> list[Row]:
    """100,000 names, one in a hundred tied."""
    counts = (1_000, 10_000, 100_000)
    of_counts = [save_and_load(folder / str(count), count, 2_000, num_tied=count // 100) for count in counts]
    return [row for rows in of_counts for row in rows]


def measure_bytes(folder: Path, size: float) -> list[Row]:
    """A state of some gigabytes in a hundred tensors."""
    return save_and_load(folder / "bytes", 100, round(size * 1e9 / 400))


def measure_checkpoints(folder: Path, _size: float) -> list[Row]:
    """1,000 checkpoints in one store, then their pruning."""
    model = flat_model(4, 64)
    root = folder / "store"
    with tiepolicy_dcp.CheckpointStore(root) as store:
        saves = [timed(lambda step=step: store.save(f"step_{step}", model=model)) for step in range(1_000)]
        loads = [timed(lambda: store.load("LATEST", model=model)) for _ in range(20)]
    spans = {f"save {first + 1} to {first + 50}": saves[first : first + 50] for first in (0, 450, 950)}
    spans["load LATEST of 1,000"] = loads
    with tiepolicy_dcp.CheckpointStore(root, keep_last=2) as store:
        spans["open the store, save, prune 999"] = [timed(lambda: store.save("last", model=model))]
        assert len(store.names()) == 2
        spans["the save after it"] = [timed(lambda: store.save("after", model=model))]
    return [{"what": what, "ms": round(1e3 * statistics.median(span), 1)} for what, span in spans.items()]


def measure_plugins(_folder: Path, _size: float) -> list[Row]:
    """500 plugins that look at every claim, on a model with 100 ties."""

    class Watches:
        @tiepolicy.hookimpl
        def tiepolicy_claims(self, model: Any, facts: Any) -> list[tiepolicy.Claim]:  # noqa: ARG002
            return []

        @tiepolicy.hookimpl
        def tiepolicy_decide(self, claim: Any, facts: Any) -> None:  # noqa: ARG002
            return None

    model = flat_model(1_000, 8, num_tied=100)
    rows = []
    for count in (0, 50, 500):
        policy = tiepolicy.Policy(plugins=[Watches() for _ in range(count)])
        seconds = statistics.median(timed(lambda policy=policy: policy.plan(model)) for _ in range(5))
        rows.append({"plugins": count, "plan_ms": round(1e3 * seconds, 1)})
    return rows


class Stopped(BaseException):
    """A simulated rank has sent what was asked of it."""


class Network:
    """Stands between ranks that exist one after the other: keeps what they send, counts it, and hands it to rank 0.

    Attributes:
        num_told: Bytes of what one rank tells all others in a save.
        plans: What each rank sends to rank 0 before it writes; a rank whose turn it is not ends there.
        results: What each rank sends to rank 0 when it has written.
        marks: When rank 0 had heard the first, had answered, and had heard the second.
    """

    def __init__(self) -> None:
        self.num_told = 0
        self.plans: list[bytes] = []
        self.results: list[bytes] = []
        self.marks: list[float] = []
        self.all_have_sent = False

    def all_gather(self, outcomes: list[Any], outcome: Any, group: Any = None) -> None:  # noqa: ARG002
        """All ranks say the same here."""
        message = pickle.dumps(outcome)
        self.num_told += 0 if self.all_have_sent else len(message)
        outcomes[:] = [pickle.loads(message) for _ in outcomes]

    def gather(self, outcome: Any, outcomes: list[Any] | None, group: Any = None) -> None:  # noqa: ARG002
        """Keep what a rank says; rank 0 goes on when all have sent."""
        if not self.all_have_sent:
            self.plans.append(pickle.dumps(outcome))
            raise Stopped
        assert outcomes is not None
        outcomes[1:] = [pickle.loads(message) for message in (self.results or self.plans)[1:]]
        self.marks.append(time.perf_counter())

    def scatter(self, answer: list[Any], answers: list[Any], group: Any = None) -> None:  # noqa: ARG002
        """Rank 0 answers; each rank then writes, and will say so."""
        answer[0] = answers[0]
        self.marks.append(time.perf_counter())
        if not self.results and answers[0][1] is None:
            outcomes = [([results_of(rank, plan)], None) for rank, ((plan,), _) in enumerate(answers)]
            self.results = [pickle.dumps(outcome) for outcome in outcomes]

    @contextmanager
    def between_ranks(self) -> Iterator[None]:
        """Let what `torch.distributed` sends go through here."""
        with (
            patch.object(dist, "all_gather_object", self.all_gather),
            patch.object(dist, "gather_object", self.gather),
            patch.object(dist, "scatter_object_list", self.scatter),
        ):
            yield


@contextmanager
def one_of(num_ranks: int, rank: int) -> Iterator[None]:
    """Be a rank of a job whose other ranks do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded_model(num_ranks: int, num_shards: int) -> nn.Module:
    """This rank's part of a model that is sharded over some ranks, and replicated over as many as there are then."""
    # torch keeps the first of equal meshes with the place of its rank in it; names tell those of two ranks apart.
    names = (f"replicas{dist.get_rank()}", f"shards{dist.get_rank()}")
    mesh = init_device_mesh("cpu", (num_ranks // num_shards, num_shards), mesh_dim_names=names)
    shape = torch.Size((num_shards, 4))
    model = nn.Module()
    for index in range(NUM_TENSORS - 1):
        local = DTensor.from_local(
            torch.ones(1, 4), mesh, (Replicate(), Shard(0)), run_check=False, shape=shape, stride=(4, 1)
        )
        model.register_parameter(f"p{index}", nn.Parameter(local))
    model.register_parameter("tied", model.p0)
    return model


def measure_job(folder: Path, num_ranks: int, num_shards: int) -> Row:
    """What a save of a job says, who hears it, and what of it ends in files."""
    folder = folder / f"ranks{num_ranks}of{num_shards}"

    begun = [begin_job(folder, rank, num_ranks, num_shards) for rank in range(num_ranks)]
    return finish_job(folder, num_ranks, num_shards, begun)


def begin_job(folder: Path, rank: int, num_ranks: int, num_shards: int) -> Row:
    """A rank until it has sent its plan."""
    network = Network()
    with one_of(num_ranks, rank), network.between_ranks():
        model = sharded_model(num_ranks, num_shards)
        start = time.perf_counter()
        with suppress(Stopped):
            tiepolicy_dcp.save(folder, model=model)
        return {"plan": network.plans[0], "told": network.num_told, "seconds": time.perf_counter() - start}


def finish_job(folder: Path, num_ranks: int, num_shards: int, begun: list[Row]) -> Row:
    """Rank 0 goes on where all ranks have sent their plans."""
    network = Network()
    network.plans = [row["plan"] for row in begun]
    network.num_told = begun[0]["told"]
    network.all_have_sent = True
    seconds = {"a rank until it has sent its plan": statistics.median(row["seconds"] for row in begun)}
    with one_of(num_ranks, 0), network.between_ranks():
        tiepolicy_dcp.save(folder, model=sharded_model(num_ranks, num_shards))
    heard_plans, answered, heard_results, done = network.marks
    seconds |= {"rank 0 divides": answered - heard_plans, "rank 0 finishes": done - heard_results}
    for rank in range(1, num_ranks):  # as long as they would be; nobody reads them
        with (folder / f"__{rank}_0.distcp").open("wb") as file:
            file.truncate(16 * NUM_TENSORS)
    start = time.perf_counter()
    StoredTensors(folder)
    seconds["each rank reads the metadata"] = time.perf_counter() - start
    return {
        "ranks": num_ranks,
        "shards": num_shards,
        "chunks": NUM_TENSORS * num_shards,
        "each rank tells all (bytes)": network.num_told,
        "each rank hears from all (kB)": round(network.num_told * num_ranks / 1e3, 1),
        "plan of a rank (kB)": round(max(map(len, network.plans)) / 1e3, 1),
        "results of a rank (kB)": round(max(map(len, network.results)) / 1e3, 1),
        "rank 0 hears (MB)": round(sum(map(len, network.plans + network.results)) / 1e6, 2),
        "metadata (MB)": round((folder / ".metadata").stat().st_size / 1e6, 2),
        "manifest (kB)": round((folder / "manifest.json").stat().st_size / 1e3, 1),
        "digests (kB)": round((folder / "digests.json").stat().st_size / 1e3, 1),
        "seconds": {what: round(value, 3) for what, value in seconds.items()},
    }


def results_of(rank: int, plan: Any) -> Any:
    """What a rank says when it has written a plan."""
    record = FileRecord(16 * len(plan.items), "0" * 32)
    share = Share(rank=rank, names={}, planner=None, plan=plan, metadata=None)  # type: ignore[arg-type] # not asked
    return share.results(Written([(16 * index, 16) for index, _ in enumerate(plan.items)], record)), record


def measure_ranks(folder: Path, _size: float) -> list[Row]:
    """Jobs of up to 1,024 ranks, sharded over all of them, and over 8 of them (HSDP)."""
    jobs = [(8, 8), (64, 64), (256, 256), (1024, 1024), (1024, 8)]
    return [forked(lambda job=job: measure_job(folder, *job)) for job in jobs]


PARTS = {
    "names": measure_names,
    "bytes": measure_bytes,
    "checkpoints": measure_checkpoints,
    "plugins": measure_plugins,
    "ranks": measure_ranks,
}


def main() -> None:
    """Measure, print, and keep the parts that were not measured in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", type=float, default=1.0, help="GB of the large state")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            rows = PARTS[part](Path(folder), options.size)
        where = {"torch": version("torch"), "python": platform.python_version(), "machine": platform.machine()}
        results[part] = {"question": PARTS[part].__doc__, **where, "rows": rows}
        print(part, *(json.dumps(row) for row in rows), sep="\n  ", flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
