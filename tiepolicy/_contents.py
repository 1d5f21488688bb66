"""Step 23, contents: what a checkpoint on disk holds and which of its names are one tensor, from headers alone."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tiepolicy._external import ExternalTie
from tiepolicy._facts import TensorSpec
from tiepolicy._metadata import read_sharded_metadata
from tiepolicy._paths import MANIFEST, MANIFEST_KEY, METADATA, member, read_json
from tiepolicy._plan import TiePlan
from tiepolicy._safetensors import Header, Stored, read_header
from tiepolicy.errors import CheckpointError, ManifestError

FILE = "safetensors file"
HF = "Hugging Face folder"
DCP = "DCP folder"

#: What `tiepolicy_dcp` puts before the names of a model, beside `optimizer.`.
MODEL_PREFIX = "model."
_INDEX = ".safetensors.index.json"
_WEIGHTS = "model.safetensors"
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A checkpoint, as its headers, its index and its manifest describe it."""

    path: Path
    #: One of `FILE`, `HF`, `DCP`.
    form: str
    #: Every tensor that is stored, sorted by name.
    tensors: Mapping[str, Stored]
    #: Names that are not stored but recorded as the whole of another, in a file's own metadata.
    recorded: Mapping[str, str] = field(default_factory=dict)
    #: Entries that are pickled objects, which are never read.
    objects: tuple[str, ...] = ()
    #: The manifest's plan; None if there is no manifest.
    plan: TiePlan | None = None
    #: What stands before the plan's names in `tensors`.
    prefix: str = ""

    def aliases(self) -> dict[str, tuple[str, str]]:
        """Canonical name and reason of each name whose bytes are those of another, sorted by name."""
        found = {alias: (canonical, "recorded") for alias, canonical in self.recorded.items()}
        for group in () if self.plan is None else self.plan.groups:
            for alias in group.aliases:
                name, canonical = self.prefix + alias.name, self.prefix + group.canonical
                # A safetensors file may hold a tied name apart, or have names of its own (fused or split tensors).
                if self.form == DCP or (name not in self.tensors and canonical in self.tensors):
                    found[name] = (canonical, alias.reason.value)
        return dict(sorted(found.items()))

    def apart(self) -> set[str]:
        """The tied names of the manifest whose bytes are not those of another here."""
        groups = () if self.plan is None else self.plan.groups
        return {self.prefix + alias.name for group in groups for alias in group.aliases} - self.aliases().keys()

    def external(self) -> dict[str, ExternalTie]:
        """The names that the manifest gives to other models, sorted; those with a digest are not stored."""
        ties = () if self.plan is None else self.plan.external
        return {self.prefix + tie.name: tie for tie in ties}

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a stored tensor or an alias."""
        if name in self.tensors:
            return self.tensors[name].shape, self.tensors[name].dtype
        if self.plan is not None and name.removeprefix(self.prefix) in self.plan.tensors:
            return plain(self.plan.tensors[name.removeprefix(self.prefix)])
        return self.spec(self.recorded[name])

    @property
    def nbytes(self) -> int:
        """Size of all stored tensors in bytes; one that lies in the checkpoint under two names counts once."""
        aliases = self.aliases()
        return sum(stored.nbytes for name, stored in self.tensors.items() if name not in aliases)


def read_contents(path: Path) -> Contents:
    """What a safetensors file, a Hugging Face folder or a folder of torch.distributed.checkpoint holds.

    Reads headers, index, manifest and metadata; no tensor, and runs nothing.

    Raises:
        CheckpointError: If the path is no checkpoint, or what is read of it is damaged.
        UntrustedCheckpointError: If it asks for more than reading tensors.
        ManifestError: If its manifest cannot be trusted.
    """
    if path.is_file():
        header = read_header(path)
        return Contents(
            path=path,
            form=FILE,
            tensors=_sorted(header.tensors),
            recorded=recorded_aliases([header]),
            plan=read_noted_plan(path, [header]),
        )
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a folder")
    if (path / METADATA).exists():
        return _read_dcp(path)
    named_by = index_file(path)
    headers = {file: read_header(member(path, file, named_by=named_by)) for file in weight_files(path)}
    tensors: dict[str, Stored] = {}
    for file, header in headers.items():
        twice = min(tensors.keys() & header.tensors.keys(), default=None)
        if twice is not None:
            raise CheckpointError(
                f"{path} holds {twice} twice, in {tensors[twice].files[0]} and {file}: whichever is read last would "
                "win. Remove one of them",
                names=[twice],
            )
        tensors |= {name: stored._replace(files=(file,)) for name, stored in header.tensors.items()}
    return Contents(
        path=path,
        form=HF,
        tensors=_sorted(tensors),
        recorded=recorded_aliases(headers.values()),
        plan=read_plan(path) or read_noted_plan(path, headers.values()),
    )


def read_pieces(contents: Contents, name: str) -> Iterator[bytes]:
    """The bytes of a tensor, or of what it is an alias of, a few megabytes at a time.

    Args:
        contents: A safetensors file, or a Hugging Face folder.
        name: A name in it.

    Raises:
        CheckpointError: If it is a DCP folder, or the file cannot be read.
    """
    stored = contents.tensors[contents.aliases().get(name, (name, ""))[0]]
    if stored.start is None:
        raise CheckpointError(f"{contents.path} is a {contents.form}, of which no single tensor is read", names=[name])
    path = contents.path / stored.files[0] if contents.path.is_dir() else contents.path
    left = stored.nbytes
    try:
        with path.open("rb") as file:
            file.seek(stored.start)
            while left:
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise CheckpointError(f"{path} was cut while it was read", names=[name])
                left -= len(piece)
                yield piece
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def weight_files(folder: Path) -> list[str]:
    """The safetensors files of a Hugging Face folder: those of its index, or its only one.

    Raises:
        CheckpointError: If there are none, or it cannot be told which of several count.
    """
    index = index_file(folder)
    if index is not None:
        return sorted(set(read_index(member(folder, index)).values()))
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(".safetensors"))
    if _WEIGHTS in files or len(files) == 1:
        return [_WEIGHTS] if _WEIGHTS in files else files
    if files:
        raise CheckpointError(f"{folder} holds {', '.join(files)} and no index that says which belong together")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    held = f"; it holds {', '.join(pickles)}, pickles, which are never read" if pickles else ""
    raise CheckpointError(
        f"{folder} is no checkpoint: it has no safetensors file, no index of such files and no {METADATA}{held}"
    )


def index_file(folder: Path) -> str | None:
    """Name of the index of a folder's shards; None if it has none.

    Raises:
        CheckpointError: If it has several.
    """
    found = sorted(file.name for file in folder.iterdir() if file.name.endswith(_INDEX))
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds several indexes, {', '.join(found)}: keep one of them in a folder")
    return found[0] if found else None


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, as the index at `path` says.

    Raises:
        CheckpointError: If the index is damaged.
    """
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path} is damaged: its weight_map is no object of tensor names and file names")
    return files


def read_plan(folder: Path) -> TiePlan | None:
    """The plan in a folder's manifest; None if it has none.

    Raises:
        CheckpointError: If the manifest is no JSON object.
        ManifestError: If it cannot be trusted.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        return TiePlan.from_manifest(read_json(member(folder, MANIFEST)))
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}", names=error.names) from error


def read_noted_plan(path: Path, headers: Iterable[Header]) -> TiePlan | None:
    """The plan in the metadata of the safetensors files of a checkpoint; None if they have none.

    Raises:
        CheckpointError: If several of them have one.
        ManifestError: If it cannot be trusted.
    """
    noted = [header.metadata[MANIFEST_KEY] for header in headers if MANIFEST_KEY in header.metadata]
    if len(noted) > 1:
        raise CheckpointError(f"{path} holds files of several saves: {len(noted)} of them have a manifest")
    try:
        return TiePlan.from_manifest(noted[0]) if noted else None
    except ManifestError as error:
        raise ManifestError(f"the metadata of {path}: {error}", names=error.names) from error


def recorded_aliases(headers: Iterable[Header]) -> dict[str, str]:
    """Names that `safetensors.torch.save_model` left out, each with the stored name that it notes in the metadata."""
    return {
        alias: canonical
        for header in headers
        for alias, canonical in sorted(header.metadata.items())
        if canonical in header.tensors and alias not in header.tensors
    }


def plain(spec: TensorSpec) -> tuple[tuple[int, ...], str]:
    """Shape and dtype as headers have them."""
    return spec.shape, spec.dtype_name


def _read_dcp(folder: Path) -> Contents:
    found = read_sharded_metadata(folder)
    plan = read_plan(folder)
    files: dict[str, set[str]] = {}
    for place in found.places:
        files.setdefault(place.name, set()).add(place.file)
    tensors = {
        name: Stored(*plain(tensor.spec), tensor.spec.nbytes, tuple(sorted(files.get(name, ()))))
        for name, tensor in found.tensors.items()
    }
    return Contents(
        path=folder,
        form=DCP,
        tensors=_sorted(tensors),
        objects=tuple(sorted(found.objects)),
        plan=plan,
        prefix="" if plan is None else MODEL_PREFIX,
    )


def _sorted(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    return dict(sorted(tensors.items()))
