"""The readers of untrusted bytes, and what holds of any bytes: a value that survives a round trip, or our error."""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save

import tiepolicy
import tiepolicy_dcp
from models import FlaggedPair, TiedPair
from tiepolicy import ActionKind, TiePlan
from tiepolicy._contents import read_index
from tiepolicy._metadata import parse_sharded_metadata
from tiepolicy._safetensors import read_header
from tiepolicy.errors import TiePolicyError
from tiepolicy_dcp._archives import check_archive, find_tensor

#: Where the files lie that are read by their names.
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
EXAMPLES = Path(__file__).with_name("fuzz_examples")

LIVE = [
    tiepolicy.plan(TiedPair()),
    tiepolicy.plan(TiedPair(tied=False)),
    tiepolicy.plan(FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=8, hidden_size=4)),
]


def written(name, data):
    (FOLDER / name).write_bytes(data)
    return FOLDER / name


def manifest(data):
    """A plan that its own manifest gives back."""
    plan = TiePlan.from_manifest(data)
    assert plan == TiePlan.from_manifest(json.dumps(plan.to_manifest()))


def header(data):
    """A header as safetensors itself reads it."""
    path = written("x.safetensors", data)
    found = read_header(path)
    with safetensors.safe_open(path, "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert expected == {name: stored.shape for name, stored in found.tensors.items()}


def index(data):
    """Names and files, as JSON gives them back."""
    files = read_index(written("model.safetensors.index.json", data))
    again = json.dumps({"weight_map": files}).encode()
    assert files == read_index(written("model.safetensors.index.json", again))


def metadata(data):
    """Records of tensors with sizes of this machine."""
    written(".metadata", data)
    found = parse_sharded_metadata(FOLDER)
    assert all(
        len(offsets) == len(tensor.spec.shape) for tensor in found.tensors.values() for offsets, _ in tensor.chunks
    )
    assert all(place.start >= 0 and place.length >= 0 for place in found.places)


def archive(data):
    """A tensor whose bytes lie in the file, as `torch.load` reads them; all else is refused or at least no harm."""
    found = find_tensor(io.BytesIO(data), 0, len(data))
    if found is None:
        check_archive(io.BytesIO(data), 0, len(data), name="a")
    else:
        num_bytes = torch.Size(found.shape).numel() * found.dtype.itemsize
        assert 0 <= found.start <= found.start + num_bytes <= len(data)


def reconcile(data):
    """One action for each tensor of the live model, or an error; from a manifest and from bare names and shapes."""
    saved = TiePlan.from_manifest(data)
    for live in LIVE:
        for table in (saved, saved.tensors):
            try:
                actions = tiepolicy.reconcile(live, table)
            except TiePolicyError:
                continue
            assert set(live.stored()) == {action.name for action in actions if action.kind is not ActionKind.COMPARE}


TARGETS = {target.__name__: target for target in (manifest, header, index, metadata, archive, reconcile)}


def run(name, data):
    """Give bytes to a target; an error of ours is an answer, anything else is a find."""
    with contextlib.suppress(TiePolicyError):
        TARGETS[name](data)


def seeds(name):
    """Bytes that a target accepts, and those that once went wrong."""
    kept = [path.read_bytes() for path in sorted((EXAMPLES / name).glob("*"))]
    return [*_VALID[name](), *kept]


def _manifests():
    return [json.dumps(plan.to_manifest()).encode() for plan in LIVE]


def _metadata():
    with tempfile.TemporaryDirectory() as place:
        model = TiedPair()
        optimizer = torch.optim.AdamW(model.parameters())
        folder = tiepolicy_dcp.save(Path(place) / "c", model=model, optimizer=optimizer)
        return [(folder / ".metadata").read_bytes()]


def _archives():
    files = []
    for tensor in (torch.arange(6.0), torch.arange(6.0).reshape(2, 3).T, torch.ones(2).to(torch.float8_e4m3fn)):
        files.append(io.BytesIO())
        torch.save(tensor, files[-1])
    return [file.getvalue() for file in files]


_VALID = {
    "manifest": _manifests,
    "reconcile": _manifests,
    "header": lambda: [save({"a": torch.zeros(2, 3), "b": torch.ones(1)}, metadata={"format": "pt"})],
    "index": lambda: [b'{"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'],
    "metadata": _metadata,
    "archive": _archives,
}
