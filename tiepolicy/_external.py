"""Step 9, owners: tensors of a model that belong to another model, and how they are taken from there."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter

import torch

from tiepolicy._claims import Reason
from tiepolicy._evidence import View, relate, view_within
from tiepolicy._memory import sharing
from tiepolicy._observe import Facts, TensorSource, observe
from tiepolicy._values import content_digest, fingerprint, view_of
from tiepolicy.errors import ExternalOwnerError, MissingTensorError, ObservationError, ShapeMismatchError

#: Models, mappings of tensors, or the facts of one of these, by the name under which a plan knows them.
Owners = Mapping[str, TensorSource | Facts]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalTie:
    """A stored name whose tensor is, or lies within, a tensor of another model."""

    name: str
    #: What the other model is called: the key in `external`.
    owner: str
    #: The name of the tensor there.
    owner_name: str
    #: Of the tensor in the other model.
    shape: tuple[int, ...]
    dtype: torch.dtype
    #: How the tensor lies within the owner's; None if it is the whole of it.
    view: View | None = None
    #: SHA-256 of the elements under `name`, as hexadecimal; None if nobody asked for it. Without it `compact` keeps
    #: the tensor, as nothing could prove later that the owner still has it.
    digest: str | None = None
    #: Of the same elements, for `check_digest` in the process that made the plan; no part of what the tie says.
    fingerprint: int | None = field(default=None, compare=False, repr=False)

    @property
    def source(self) -> str:
        """Owner and name there: `target:embed_tokens.weight`."""
        return f"{self.owner}:{self.owner_name}"


def find_external(names: tuple[str, ...], facts: Facts, external: Owners, *, digests: bool) -> list[ExternalTie]:
    """The names whose tensors other models own, by object and memory; linear in the names of all models."""
    owners = sorted(observe_owners(external).items(), key=itemgetter(0))
    wanted = set(names)
    places = [("", facts, name) for name in names]
    places += [(owner, theirs, name) for owner, theirs in owners for name in sorted(theirs)]
    found: dict[str, ExternalTie] = {}
    for positions in sharing([held.tensor(name) for _, held, name in places]):
        members = [places[position] for position in positions]
        theirs = sorted((member for member in members if member[0]), key=lambda member: (member[0], member[2]))
        for owner, held, name in members:
            if not owner and name in wanted:
                tie = _tie(name, held, theirs)
                if tie is not None:
                    found[name] = tie
    if digests:
        found = {name: _with_digest(tie, facts.tensor(name)) for name, tie in found.items()}
    return [found[name] for name in sorted(found)]


def observe_owners(external: Owners) -> dict[str, Facts]:
    """The facts of some other models; with these, `take` looks at none of them again.

    Raises:
        ObservationError: If it is no mapping of names to models.
    """
    if not isinstance(external, Mapping) or not all(isinstance(name, str) for name in external):
        raise ObservationError(
            f"external is a {type(external).__name__} of no named models; hand over each by its name: "
            'external={"target": model}'
        )
    return {owner: observe(model) for owner, model in external.items()}


def take(tie: ExternalTie, external: Owners) -> torch.Tensor:
    """The tensor that a `tie` is about, itself or a view of it, from the `external` models.

    Raises:
        MissingTensorError: If the model is not given, or has no such tensor.
        ShapeMismatchError: If the tensor there has another shape or dtype than was recorded.
        ExternalOwnerError: If its elements are not those that were recorded.
    """
    if tie.owner not in external:
        raise MissingTensorError(
            f"{tie.name} is not stored, as it belongs to the model {tie.owner!r} ({tie.source}); give that model: "
            f"external={{{tie.owner!r}: ...}}",
            names=[tie.name],
        )
    held = observe(external[tie.owner])
    if tie.owner_name not in held:
        raise MissingTensorError(
            f"{tie.name} belongs to {tie.source}, but the model given as {tie.owner!r} has no {tie.owner_name}; give "
            "the model that the plan was made with",
            names=[tie.name],
        )
    tensor = held.tensor(tie.owner_name)
    if (tuple(tensor.shape), tensor.dtype) != (tie.shape, tie.dtype):
        raise ShapeMismatchError(
            f"{tie.name} belongs to {tie.source}, which was {tie.shape} {tie.dtype} and is {tuple(tensor.shape)} "
            f"{tensor.dtype} in the model given; give the model that the plan was made with",
            names=[tie.name],
        )
    taken = view_of(tensor, tie.view)
    check_digest(tie, taken)
    return taken


def check_digest(tie: ExternalTie, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose elements are not those of the owner when the plan was made.

    Raises:
        ExternalOwnerError: If the digests differ.
    """
    if tie.fingerprint is not None and fingerprint(tensor) == tie.fingerprint:
        return  # each save comes by here, and a digest takes a second per gigabyte
    if tie.digest is not None and content_digest(tensor) != tie.digest:
        raise ExternalOwnerError(
            f"{tie.name} {tuple(tensor.shape)} belongs to {tie.source}, but its elements are not those of the plan: "
            f"expected SHA-256 {tie.digest[:12]}, found {content_digest(tensor)[:12]}. Give the model that the plan "
            "was made with, or plan anew if it was trained since",
            names=[tie.name],
        )


def _tie(name: str, facts: Facts, candidates: list[tuple[str, Facts, str]]) -> ExternalTie | None:
    """The first tensor of another model that is the whole of one of ours, else the first that contains it."""
    fact, part = facts[name], None
    for owner, theirs, owner_name in candidates:
        whole = theirs[owner_name]
        reason = relate(whole, fact)
        view = view_within(whole, fact) if reason is Reason.VIEW_OF else None
        tie = ExternalTie(
            name=name, owner=owner, owner_name=owner_name, shape=whole.shape, dtype=whole.dtype, view=view
        )
        if reason in (Reason.SAME_OBJECT, Reason.SAME_STORAGE):
            return tie
        if reason is Reason.VIEW_OF:
            part = part or tie
    return part


def _with_digest(tie: ExternalTie, tensor: torch.Tensor) -> ExternalTie:
    return replace(tie, digest=content_digest(tensor), fingerprint=fingerprint(tensor))
