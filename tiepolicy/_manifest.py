"""Step 9, keeping: a plan as versioned JSON, written into a checkpoint and read back without trust."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tiepolicy._claims import Claim
from tiepolicy._evidence import View
from tiepolicy._facts import TensorSpec
from tiepolicy._groups import Alias, RefusedClaim, TieGroup
from tiepolicy._verdicts import Decision, Reason, Verdict
from tiepolicy.errors import ManifestError, TiePolicyError

FORMAT = "tiepolicy"
VERSION = 1

Parts = tuple[dict[str, TensorSpec], tuple[TieGroup, ...], tuple[RefusedClaim, ...]]


def write(
    tensors: Mapping[str, TensorSpec], groups: Sequence[TieGroup], refused: Sequence[RefusedClaim]
) -> dict[str, Any]:
    """The parts of a plan as JSON-ready values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "tensors": {name: [list(spec.shape), str(spec.dtype).removeprefix("torch.")] for name, spec in tensors.items()},
        "groups": [
            {"canonical": group.canonical, "aliases": [_write_alias(alias) for alias in group.aliases]}
            for group in groups
        ],
        "refused": [_write_refused(refusal) for refusal in refused],
    }


def read(manifest: Mapping[str, Any]) -> Parts:
    """The parts of the plan that `write` wrote.

    Raises:
        ManifestError: If the manifest is malformed, contradicts itself, or is of a newer version.
    """
    if not isinstance(manifest, Mapping) or manifest.get("format") != FORMAT:
        raise ManifestError(f"this is no manifest of tie groups: its format is not {FORMAT!r}")
    version = manifest.get("version")
    if version != VERSION:
        raise ManifestError(
            f"the manifest has version {version!r}, this library reads version {VERSION}: update tiepolicy to read it"
        )
    try:
        tensors = {str(name): _read_spec(spec) for name, spec in manifest["tensors"].items()}
        groups = tuple(
            TieGroup(canonical=group["canonical"], aliases=tuple(_read_alias(alias) for alias in group["aliases"]))
            for group in manifest["groups"]
        )
        refused = tuple(_read_refused(refusal) for refusal in manifest["refused"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"the manifest is malformed: {type(error).__name__}: {error}") from error
    _check_groups(tensors, groups)
    return tensors, groups, refused


def _write_alias(alias: Alias) -> dict[str, Any]:
    view = alias.view
    return {
        "name": alias.name,
        "reason": alias.reason.value,
        "view": None if view is None else [list(view.shape), list(view.stride), view.offset],
    }


def _read_alias(entry: Mapping[str, Any]) -> Alias:
    view = None
    if entry["view"] is not None:
        shape, stride, offset = entry["view"]
        view = View(shape=_sizes(shape), stride=_sizes(stride), offset=_size(offset))
    return Alias(name=entry["name"], reason=Reason(entry["reason"]), view=view)


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
    return RefusedClaim(
        claim=Claim(tuple(entry["names"]), entry["source"], entry["claimed_by"]),
        verdict=Verdict(decision=Decision.INDEPENDENT, reason=Reason(entry["reason"]), detail=entry["detail"]),
        shapes=tuple(None if shape is None else _sizes(shape) for shape in entry["shapes"]),
    )


def _read_spec(entry: Sequence[Any]) -> TensorSpec:
    shape, dtype_name = entry
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise ManifestError(f"the manifest names a dtype {dtype_name!r} that this torch does not have")
    return TensorSpec(_sizes(shape), dtype)


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
            _check_alias(group.canonical, owner, alias, tensors[alias.name])


def _check_alias(canonical: str, owner: TensorSpec, alias: Alias, spec: TensorSpec) -> None:
    """An alias must be rebuildable: the whole of the canonical tensor, or a view that stays inside it."""
    view = alias.view
    fits = spec == owner if view is None else view.shape == spec.shape and spec.dtype == owner.dtype
    inside = view is None or view.end * owner.dtype.itemsize <= owner.nbytes
    if not (fits and inside):
        raise ManifestError(
            f"the manifest calls {alias.name} {spec.shape} an alias of {canonical} {owner.shape}, but it cannot be "
            "rebuilt from it: the manifest was damaged or edited",
            names=[alias.name, canonical],
        )


def _sizes(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(_size(value) for value in values)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TiePolicyError(f"{value!r} is no size")
    return value
