"""Step 13, keeping: a plan as versioned JSON, written into a checkpoint and read back without trust.

A name in a manifest may become part of a path or a line in a log, so it holds no path separator and no control
character; a plan with such names works, but has no manifest. A key that this version does not know is refused: what it
means cannot be kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tiepolicy._claims import Claim, Decision, Reason, Verdict
from tiepolicy._evidence import View
from tiepolicy._external import ExternalTie
from tiepolicy._facts import TensorSpec
from tiepolicy._groups import Alias, Companion, RefusedClaim, TieGroup
from tiepolicy._paths import parse_json
from tiepolicy.errors import CheckpointError, ManifestError, TiePolicyError

FORMAT = "tiepolicy"
VERSION = 1

# Far above any model; what is larger was made to exhaust memory.
MAX_TENSORS = 1_000_000
MAX_TEXT = 4096
MAX_DIMS = 64
_MAX_SIZE = 2**63 - 1
#: What a manifest lists; the last two only if there are any.
_LISTS = ("tensors", "groups", "refused", "external", "companions")

Parts = tuple[
    dict[str, TensorSpec],
    tuple[TieGroup, ...],
    tuple[RefusedClaim, ...],
    tuple[ExternalTie, ...],
    tuple[Companion, ...],
]


def write(
    tensors: Mapping[str, TensorSpec],
    groups: Sequence[TieGroup],
    refused: Sequence[RefusedClaim],
    external: Sequence[ExternalTie],
    companions: Sequence[Companion],
) -> dict[str, Any]:
    """The parts of a plan as JSON-ready values."""
    written: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": {name: [list(spec.shape), spec.dtype_name] for name, spec in tensors.items()},
        "groups": [
            {"canonical": group.canonical, "aliases": [_write_alias(alias) for alias in group.aliases]}
            for group in groups
        ],
        "refused": [_write_refused(refusal) for refusal in refused],
    }
    if external:
        written["external"] = [_write_external(tie) for tie in external]
    if companions:
        written["companions"] = [{"name": companion.name, "of": list(companion.of)} for companion in companions]
    return written


def read(manifest: Mapping[str, Any] | str | bytes) -> Parts:
    """The parts of the plan that `write` wrote, from JSON text or from the values in it.

    Raises:
        ManifestError: If the manifest is malformed, contradicts itself, or is of a newer version.
    """
    values = _parse(manifest) if isinstance(manifest, str | bytes) else manifest
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise ManifestError(f"this is no manifest of tie groups: its format is not {FORMAT!r}")
    version = values.get("version")
    if type(version) is not int or version != VERSION:
        raise ManifestError(
            f"the manifest has version {version!r}, this library reads version {VERSION}: update tiepolicy to read it"
        )
    try:
        parts = _read_parts(values)
        _check_groups(parts[0], parts[1])
        _check_external(parts)
        _check_companions(parts[0], parts[4])
    except ManifestError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"the manifest is malformed: {type(error).__name__}: {error}") from error
    return parts


def check(tensors: Iterable[str], refused: Sequence[RefusedClaim], external: Sequence[ExternalTie]) -> None:
    """Refuse a plan whose manifest could not be read again.

    Raises:
        ManifestError: If it holds a name as `check_names` says, or a sentence that is too long.
    """
    check_names(tensors)
    for refusal in refused:
        check_names(refusal.claim.names)
        _text(refusal.claim.detail)
        _text(refusal.verdict.detail)
    for tie in external:
        check_names((tie.owner, tie.owner_name))


def check_names(names: Iterable[str]) -> None:
    """Refuse names that cannot stand in a manifest.

    Raises:
        ManifestError: If a name is empty, too long, or holds a path separator or a control character.
    """
    for name in names:
        if not isinstance(name, str) or not name or len(name) > MAX_TEXT:
            raise ManifestError(f"{str(name)[:80]!r} is no name of 1 to {MAX_TEXT} characters")
        if "/" in name or "\\" in name or not name.isprintable():
            raise ManifestError(
                f"the name {name!r} holds a path separator or a control character and cannot stand in a manifest; "
                "give it another",
                names=[name],
            )


def _parse(text: str | bytes) -> Any:
    try:
        data = text.encode() if isinstance(text, str) else text
        return parse_json(data, source="the manifest")
    except (CheckpointError, UnicodeError) as error:
        raise ManifestError(str(error)) from error


def _read_parts(values: Mapping[str, Any]) -> Parts:
    _check_keys(values, ("format", "version", *_LISTS[:3]), optional=_LISTS[3:])
    if max(len(values.get(key, ())) for key in _LISTS) > MAX_TENSORS:
        raise ManifestError(f"the manifest lists more than {MAX_TENSORS} tensors, groups or refused claims")
    check_names(values["tensors"])
    tensors = {name: _read_spec(spec) for name, spec in values["tensors"].items()}
    groups = tuple(_read_group(group) for group in values["groups"])
    refused = tuple(_read_refused(refusal) for refusal in values["refused"])
    external = tuple(_read_external(tie) for tie in values.get("external", ()))
    companions = tuple(_read_companion(entry) for entry in values.get("companions", ()))
    return tensors, groups, refused, external, companions


def _read_group(entry: Mapping[str, Any]) -> TieGroup:
    _check_keys(entry, ("canonical", "aliases"))
    if not entry["aliases"]:
        raise ManifestError(f"the manifest has a group of {entry['canonical']!r} alone")
    return TieGroup(canonical=entry["canonical"], aliases=tuple(_read_alias(alias) for alias in entry["aliases"]))


def _write_alias(alias: Alias) -> dict[str, Any]:
    return {"name": alias.name, "reason": alias.reason.value, "view": _write_view(alias.view)}


def _read_alias(entry: Mapping[str, Any]) -> Alias:
    _check_keys(entry, ("name", "reason", "view"))
    alias = Alias(name=entry["name"], reason=Reason(entry["reason"]), view=_read_view(entry["view"]))
    if not alias.reason.proves_alias or (alias.view is None) is (alias.reason is Reason.VIEW_OF):
        raise ManifestError(f"the manifest calls {alias.name!r} an alias for the reason {alias.reason.value!r}")
    return alias


def _write_view(view: View | None) -> list[Any] | None:
    return None if view is None else [list(view.shape), list(view.stride), view.offset]


def _read_view(entry: Any) -> View | None:
    if entry is None:
        return None
    shape, stride, offset = entry
    view = View(shape=_sizes(shape), stride=_sizes(stride), offset=_size(offset))
    if len(view.shape) != len(view.stride):
        raise ManifestError(f"the manifest has a view of shape {view.shape} with the strides {view.stride}")
    return view


def _write_refused(refusal: RefusedClaim) -> dict[str, Any]:
    return {
        "names": list(refusal.claim.names),
        "source": str(refusal.claim.source),
        "claimed_by": refusal.claim.detail,
        "reason": refusal.verdict.reason.value,
        "detail": refusal.verdict.detail,
        "shapes": [None if shape is None else list(shape) for shape in refusal.shapes],
    }


def _read_refused(entry: Mapping[str, Any]) -> RefusedClaim:
    _check_keys(entry, ("names", "source", "claimed_by", "reason", "detail", "shapes"))
    check_names(entry["names"])
    shapes = tuple(None if shape is None else _sizes(shape) for shape in entry["shapes"])
    if not len(entry["names"]) == len(shapes) == 2:
        raise ManifestError(f"the manifest refuses a claim of {len(entry['names'])} names and {len(shapes)} shapes")
    detail, claimed_by = _text(entry["detail"]), _text(entry["claimed_by"])
    return RefusedClaim(
        claim=Claim(tuple(entry["names"]), entry["source"], claimed_by),
        verdict=Verdict(decision=Decision.INDEPENDENT, reason=Reason(entry["reason"]), detail=detail),
        shapes=shapes,
    )


def _write_external(tie: ExternalTie) -> dict[str, Any]:
    return {
        "name": tie.name,
        "owner": tie.owner,
        "owner_name": tie.owner_name,
        "shape": list(tie.shape),
        "dtype": TensorSpec(tie.shape, tie.dtype).dtype_name,
        "view": _write_view(tie.view),
        "sha256": tie.digest,
    }


def _read_external(entry: Mapping[str, Any]) -> ExternalTie:
    _check_keys(entry, ("name", "owner", "owner_name", "shape", "dtype", "view", "sha256"))
    check_names([entry["name"], entry["owner"], entry["owner_name"]])
    spec = _read_spec([entry["shape"], entry["dtype"]])
    digest = entry["sha256"]
    if digest is not None and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
        raise ManifestError(f"the manifest has {str(digest)[:80]!r} for the SHA-256 of {entry['name']}")
    return ExternalTie(
        name=entry["name"],
        owner=entry["owner"],
        owner_name=entry["owner_name"],
        shape=spec.shape,
        dtype=spec.dtype,
        view=_read_view(entry["view"]),
        digest=digest,
    )


def _read_companion(entry: Mapping[str, Any]) -> Companion:
    _check_keys(entry, ("name", "of"))
    if not isinstance(entry["of"], list) or not entry["of"]:
        raise ManifestError(f"the manifest has {entry['name']!r} for the companion of no tensor")
    return Companion(entry["name"], tuple(entry["of"]))


def _read_spec(entry: Sequence[Any]) -> TensorSpec:
    shape, dtype_name = entry
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise ManifestError(f"the manifest names a dtype {dtype_name!r} that this torch does not have")
    return TensorSpec(_sizes(shape), dtype)


def _check_keys(entry: Mapping[str, Any], required: Sequence[str], *, optional: Sequence[str] = ()) -> None:
    missing = [key for key in required if key not in entry]
    if missing:
        raise KeyError(missing[0])
    unknown = sorted(str(key) for key in set(entry) - {*required, *optional})
    if unknown:
        raise ManifestError(f"the manifest holds {unknown[0]!r}, which version {VERSION} does not know")


def _check_groups(tensors: Mapping[str, TensorSpec], groups: Sequence[TieGroup]) -> None:
    seen: set[str] = set()
    for group in groups:
        for name in group.names:
            if name not in tensors:
                raise ManifestError(f"the manifest ties {name!r}, which is none of its tensors", names=[str(name)])
            if name in seen:
                raise ManifestError(f"the manifest ties {name!r} twice", names=[name])
            seen.add(name)
        owner = tensors[group.canonical]
        for alias in group.aliases:
            _check_fits(f"an alias of {group.canonical}", alias.name, owner, alias.view, tensors[alias.name])


def _check_external(parts: Parts) -> None:
    tensors, groups, _, external, _ = parts
    stored = set(tensors) - {alias.name for group in groups for alias in group.aliases}
    for tie in external:
        if tie.name not in stored:
            raise ManifestError(
                f"the manifest gives {tie.name!r} to {tie.source}, which is none of its stored tensors, or not once",
                names=[tie.name],
            )
        stored.discard(tie.name)
        spec = TensorSpec(tie.shape, tie.dtype)
        _check_fits(f"a tensor of {tie.source}", tie.name, spec, tie.view, tensors[tie.name])


def _check_companions(tensors: Mapping[str, TensorSpec], companions: Sequence[Companion]) -> None:
    seen: set[str] = set()
    for companion in companions:
        for name in (companion.name, *companion.of):
            if name not in tensors:
                raise ManifestError(
                    f"the manifest makes {name!r} a companion or gives it one, which is none of its tensors",
                    names=[str(name)],
                )
        if companion.name in seen:
            raise ManifestError(f"the manifest names the companion {companion.name!r} twice", names=[companion.name])
        seen.add(companion.name)


def _check_fits(what: str, name: str, owner: TensorSpec, view: View | None, spec: TensorSpec) -> None:
    """What is not stored must be rebuildable: the whole of another tensor, or a view that stays inside it."""
    fits = spec == owner if view is None else view.shape == spec.shape and spec.dtype == owner.dtype
    inside = view is None or view.end * owner.dtype.itemsize <= owner.nbytes
    if not (fits and inside):
        raise ManifestError(
            f"the manifest calls {name} {spec.shape} {what} {owner.shape}, but it cannot be rebuilt from it: the "
            "manifest was damaged or edited",
            names=[name],
        )


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ManifestError(f"{str(value)[:80]!r} is no text of at most {MAX_TEXT} characters, as manifests hold")
    return value


def _sizes(values: Sequence[Any]) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) > MAX_DIMS:
        raise TiePolicyError(f"{str(values)[:80]} is no list of at most {MAX_DIMS} sizes")
    return tuple(_size(value) for value in values)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_SIZE:
        raise TiePolicyError(f"{value!r} is no size")
    return value
