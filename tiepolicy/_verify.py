"""Step 26, verifying: the files of a checkpoint held against each other; every problem found is one sentence."""

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from tiepolicy._contents import (
    MODEL_PREFIX,
    Contents,
    index_file,
    plain,
    read_contents,
    read_index,
    read_noted_plan,
    read_pieces,
    read_plan,
    weight_files,
)
from tiepolicy._digests import DIGESTS, Seen, digest_problems, read_digests, unrecorded_problems
from tiepolicy._facts import TensorSpec
from tiepolicy._metadata import ChunkedTensor, Place, ShardedMetadata, parse_sharded_metadata
from tiepolicy._paths import MANIFEST, METADATA, member, read_json
from tiepolicy._plan import TiePlan
from tiepolicy._safetensors import Header, read_header
from tiepolicy.errors import TiePolicyError

#: File of a DCP folder with the whole model as other tools read it.
_CONSOLIDATED = "model.safetensors"
#: Files of a DCP folder with what rides along.
_EXTRA, _EXTRA_TENSORS = "extra.json", "extra.safetensors"

#: Shape and dtype by name.
_Specs = Mapping[str, tuple[tuple[int, ...], str]]
_Offsets = tuple[int, ...]
#: Offsets in the tensor, file, first byte and length of each of its chunks.
_Records = set[tuple[_Offsets | None, str, int, int]]
_Value = TypeVar("_Value")


def find_problems(
    path: Path, *, owners: Mapping[str, Path] = MappingProxyType({}), seen: Seen = lambda _: None
) -> list[str]:
    """What is wrong with a checkpoint, as sentences; empty if nothing is.

    Holds headers against sizes of files, the index against the files, the manifest against the contents, every path
    against the folder, and every file against its digest if one was recorded. Without digests no tensor is read, and a
    flipped bit inside one is not found.

    Args:
        path: The checkpoint.
        owners: Checkpoints of other models, by the names under which the manifest knows them. What it says belongs to
            one of these is held against it.
        seen: Is told of the bytes that were read.
    """
    problems: list[str] = []
    if path.is_dir():
        _collect(problems, lambda: problems.extend(digest_problems(path, seen)))
    if not path.is_dir():
        _collect(problems, lambda: read_contents(path))
    elif (path / METADATA).exists():
        _collect(problems, lambda: problems.extend(_dcp_problems(path)))
    else:
        _collect(problems, lambda: problems.extend(_hf_problems(path)))
    for owner, place in owners.items():
        _collect(problems, functools.partial(_collect_owned, problems, path, owner, place, seen))
    return list(dict.fromkeys(problems))


def recorded_bytes(path: Path) -> int | None:
    """How many bytes of a checkpoint `find_problems` reads to check digests; None if there are none."""
    try:
        records = read_digests(path) if path.is_dir() else None
    except TiePolicyError:  # find_problems says it
        return None
    return None if records is None else sum(record.num_bytes for record in records.values() if record.digest)


def _collect_owned(problems: list[str], folder: Path, owner: str, place: Path, seen: Seen) -> None:
    problems.extend(_owner_problems(folder, owner, read_contents(place), seen))


def _owner_problems(folder: Path, owner: str, held: Contents, seen: Seen) -> Iterator[str]:
    """Where another model does not hold what the manifest says is its."""
    plan = read_plan(folder) if folder.is_dir() else None
    ties = [tie for tie in (() if plan is None else plan.external) if tie.owner == owner]
    if not ties:
        yield f"{folder} has no tensor that belongs to a model {owner!r}"
    for tie in ties:
        known = {*held.tensors, *held.aliases()}
        spec = TensorSpec(tie.shape, tie.dtype)
        if tie.owner_name not in known:
            yield f"{tie.name} belongs to {tie.source}, but {held.path} holds no {tie.owner_name}"
        elif held.spec(tie.owner_name) != plain(spec):
            yield (
                f"{tie.name} belongs to {tie.source}, which was {_show(plain(spec))} and is "
                f"{_show(held.spec(tie.owner_name))} in {held.path}"
            )
        elif tie.digest is None:
            yield f"{tie.name} belongs to {tie.source} without a digest, so {held.path} was not held against it"
        elif tie.view is not None:
            yield f"{tie.name} is a part of {tie.source}, whose digest cannot be checked against {held.path}"
        else:
            digest = hashlib.sha256()
            for piece in read_pieces(held, tie.owner_name):
                digest.update(piece)
                seen(len(piece))
            if digest.hexdigest() != tie.digest:
                yield (
                    f"{tie.name} belongs to {tie.source}, but {held.path} holds other values of it: expected SHA-256 "
                    f"{tie.digest[:12]}, found {digest.hexdigest()[:12]}"
                )


def _collect(problems: list[str], check: Callable[[], object]) -> None:
    """Run a check; the error that it raises is one more problem."""
    try:
        check()
    except TiePolicyError as error:
        problems.append(str(error))


def _hf_problems(folder: Path) -> list[str]:
    problems: list[str] = []
    headers: dict[str, Header] = {}
    index = index_file(folder)

    def read(file: str) -> None:
        headers[file] = read_header(member(folder, file, named_by=index))

    for file in weight_files(folder):
        _collect(problems, functools.partial(read, file))
    if index is not None:
        problems += _index_problems(member(folder, index), headers)
    stored = {name: (entry.shape, entry.dtype) for header in headers.values() for name, entry in header.tensors.items()}
    if not problems:
        _collect(problems, lambda: read_contents(folder))
        problems += _manifest_problems(folder, stored, source=folder)
    if not problems:
        problems += _noted_problems(folder, stored, headers.values())
    return problems


def _index_problems(path: Path, headers: Mapping[str, Header]) -> Iterator[str]:
    folder, files = path.parent, read_index(path)
    for name, file in files.items():
        if file in headers and name not in headers[file].tensors:
            yield f"{path} says that {name} is in {file}, which does not hold it"
    for file, header in headers.items():
        for name in header.tensors:
            if name not in files:
                yield f"{folder / file} holds {name}, which {path.name} does not list: no loader would read it"
            elif files[name] != file:
                yield f"{folder / file} holds {name}, which {path.name} expects in {files[name]}"
    present = {file.name for file in folder.iterdir() if file.name.endswith(".safetensors")}
    for file in sorted(present - set(files.values())):
        yield f"{folder / file} is not listed in {path.name}: it is left from another save, or the index is"


def _dcp_problems(folder: Path) -> list[str]:
    problems: list[str] = []
    found = parse_sharded_metadata(folder)
    sizes: dict[str, int] = {}

    def measure(file: str) -> None:
        sizes[file] = member(folder, file, named_by=METADATA).stat().st_size

    for file in sorted({place.file for place in found.places}):
        _collect(problems, functools.partial(measure, file))
    beside = (METADATA, MANIFEST, _CONSOLIDATED, _EXTRA, _EXTRA_TENSORS)
    _collect(problems, lambda: problems.extend(unrecorded_problems(folder, read_digests(folder), {*sizes, *beside})))
    places: dict[str, dict[_Offsets | None, Place]] = {}
    for place in found.places:
        places.setdefault(place.name, {})[place.offsets] = place
    problems += _place_problems(folder, found.places, sizes)
    for name, tensor in found.tensors.items():
        problems += _chunk_problems(folder / METADATA, name, tensor, places.get(name, {}))
    model = _strip({name: plain(tensor.spec) for name, tensor in found.tensors.items()})
    problems += _manifest_problems(folder, model, source=folder / METADATA, records=_records(found))
    if os.path.lexists(folder / _CONSOLIDATED):
        _collect(problems, lambda: problems.extend(_consolidated_problems(folder)))
    if os.path.lexists(folder / _EXTRA):
        _collect(problems, lambda: read_json(member(folder, _EXTRA), allow_nan=True))
    if os.path.lexists(folder / _EXTRA_TENSORS):
        _collect(problems, lambda: read_header(member(folder, _EXTRA_TENSORS)))
    if os.path.lexists(folder / MANIFEST) and not os.path.lexists(folder / DIGESTS):
        problems.append(f"{folder / DIGESTS} is missing: a part of the checkpoint was lost")
    return problems


def _place_problems(folder: Path, places: Iterable[Place], sizes: Mapping[str, int]) -> Iterator[str]:
    """Entries beyond the end of their file, and entries of which a part belongs to another too."""
    last: dict[str, Place] = {}
    for place in sorted(places, key=lambda place: (place.file, place.start, place.length, place.name)):
        end = place.start + place.length
        if end > sizes.get(place.file, end):
            yield (
                f"{folder / place.file} was cut: {place.name} ends at byte {end}, the file has {sizes[place.file]} "
                "bytes"
            )
        previous = last.get(place.file)
        same = previous is not None and (previous.start, previous.length) == (place.start, place.length)
        # One range under two names is a tied tensor, written once.
        if previous is not None and not same and place.start < previous.start + previous.length:
            yield f"{folder / METADATA} gives {previous.name} and {place.name} overlapping bytes of {place.file}"
        last[place.file] = place


def _chunk_problems(
    path: Path, name: str, tensor: ChunkedTensor, places: Mapping[_Offsets | None, Place]
) -> Iterator[str]:
    """Chunks without bytes, and tensors that their chunks do not make up."""
    shape = tensor.spec.shape
    for offsets, sizes in tensor.chunks:
        place = places.get(offsets)
        num_bytes = math.prod(sizes) * tensor.spec.dtype.itemsize
        if place is None:
            yield f"{path} names no bytes for the part of {name} {shape} at {offsets}"
        elif not place.transforms and place.length < num_bytes:
            yield f"{path} gives the part of {name} {shape} at {offsets} {place.length} bytes of its {num_bytes}"
    outside = any(
        offset + size > limit
        for offsets, sizes in tensor.chunks
        for offset, size, limit in zip(offsets, sizes, shape, strict=True)
    )
    volume = sum(math.prod(sizes) for _, sizes in tensor.chunks)
    if outside or volume != math.prod(shape) or _overlap(tensor.chunks):
        yield f"{path} describes {name} {shape} by parts that are not the whole of it: {list(tensor.chunks)}"


def _overlap(chunks: Iterable[tuple[_Offsets, _Offsets]]) -> bool:
    """Whether two boxes meet; a sweep along the first dimension, linear for a tensor sharded along one."""
    open_boxes: list[tuple[_Offsets, _Offsets]] = []
    for offsets, sizes in sorted(chunks):
        if not offsets or 0 in sizes:
            continue
        open_boxes = [box for box in open_boxes if box[0][0] + box[1][0] > offsets[0]]
        for other_offsets, other_sizes in open_boxes:
            sides = zip(offsets, sizes, other_offsets, other_sizes, strict=True)
            if all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in sides):
                return True
        open_boxes.append((offsets, sizes))
    return False


def _manifest_problems(
    folder: Path, stored: _Specs, *, source: Path, records: Mapping[str, _Records] | None = None
) -> list[str]:
    """Where the manifest and what is stored disagree.

    Args:
        folder: The checkpoint.
        stored: The model's tensors that it holds.
        source: The file or folder that says so.
        records: Where the bytes of each name are, if one place can have two names.
    """
    problems: list[str] = []
    plans: list[TiePlan | None] = []
    _collect(problems, lambda: plans.append(read_plan(folder)))
    plan = next(iter(plans), None)
    if plan is None:
        return problems
    for name, spec in plan.stored().items():
        if name not in stored:
            problems.append(f"{folder / MANIFEST} lists {name} {spec.shape}, which is not in {source}")
        elif stored[name] != plain(spec):
            problems.append(
                f"{folder / MANIFEST} and {source} disagree about {name}: {_show(plain(spec))} and "
                f"{_show(stored[name])}"
            )
    for name in sorted(set(stored) - set(plan.stored())):
        if name not in plan.tensors:
            problems.append(f"{source} holds {name}, which {folder / MANIFEST} does not know")
        elif plan.canonical(name) in plan.owned_elsewhere:
            owner = plan.owned_elsewhere[plan.canonical(name)]
            problems.append(f"{source} holds {name}, which {folder / MANIFEST} says belongs to {owner.source}")
        elif records is None or not _is_written_once(name, plan, records):
            problems.append(
                f"{source} stores {name} and {plan.canonical(name)} apart, which {folder / MANIFEST} calls one tensor"
            )
    return problems


def _noted_problems(folder: Path, stored: _Specs, headers: Iterable[Header]) -> Iterator[str]:
    """What the manifest in the metadata of the files stores and they do not hold.

    Files whose names are not those of the model (fused or split tensors) are not held against it.
    """
    plan = read_noted_plan(folder, headers)
    if plan is not None and stored.keys() <= plan.tensors.keys():
        for name, spec in plan.stored().items():
            if name not in stored:
                yield f"the manifest in the metadata of {folder} lists {name} {spec.shape}, which no file holds"


def _consolidated_problems(folder: Path) -> list[str]:
    path = member(folder, _CONSOLIDATED)
    stored = {name: (entry.shape, entry.dtype) for name, entry in read_header(path).tensors.items()}
    return _manifest_problems(folder, stored, source=path)


def _is_written_once(name: str, plan: TiePlan, records: Mapping[str, _Records]) -> bool:
    """Whether the bytes of an alias are those of the stored tensor, or of the rows that it is a view of."""
    canonical = plan.canonical(name)
    owner = records.get(canonical, set())
    alias = plan.alias(name)
    view = None if alias is None else alias.view
    if view is None:
        return records.get(name, set()) == owner
    first = view.offset // max(1, math.prod(plan.tensors[canonical].shape[1:]))
    return all(
        offsets is not None and ((offsets[0] + first, *offsets[1:]), *place) in owner
        for offsets, *place in records.get(name, ())
    )


def _records(found: ShardedMetadata) -> dict[str, _Records]:
    """Where the bytes of each tensor of the model are."""
    records: dict[str, _Records] = {}
    for place in found.places:
        records.setdefault(place.name, set()).add((place.offsets, place.file, place.start, place.length))
    return dict(_strip(records))


def _strip(by_name: Mapping[str, _Value]) -> dict[str, _Value]:
    return {name.removeprefix(MODEL_PREFIX): value for name, value in by_name.items() if name.startswith(MODEL_PREFIX)}


def _show(spec: tuple[tuple[int, ...], str]) -> str:
    return f"{spec[0]} {spec[1]}"
