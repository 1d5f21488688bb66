"""Step 5, ties: which names of a model become one parameter while it is read, decided by what was read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

import tiepolicy
from tiepolicy import Conflict, Moment, Policy, TiePlan, first_difference, settle
from tiepolicy.errors import CheckpointError, TieConflictError
from tiepolicy_hf._folder import Weights
from tiepolicy_hf._plugin import Declaration, declarations

#: What becomes of two stored values for what the config calls one tensor.
OnConflict = Literal["error", "untie", "canonical"]


@dataclass(slots=True, kw_only=True)
class Evidence:
    """What is known before a model is read, and what is learnt while it is."""

    policy: Policy
    on_conflict: OnConflict
    weights: Weights
    #: The plan of the model that was saved; None where another tool wrote the folder.
    recorded: TiePlan | None
    #: Whether the file of the config says that nothing is tied; the flag of the config that was made of it may not.
    denied: bool
    #: What the class made one tensor while it was built, before reading took it apart.
    built: TiePlan | None = None
    #: Tensors that were in no file.
    missing: set[str] = field(default_factory=set)
    #: Two stored values of one tensor. Raised when it is known that no shape was wrong either.
    conflict: TieConflictError | None = None


def check_places(model: PreTrainedModel, places: Mapping[str, object], evidence: Evidence) -> None:
    """Refuse places, which are devices of modules by the beginning of their names, if they split a tie."""
    if evidence.on_conflict == "untie":
        return
    names = _Names(model, set())
    for (source, alias), force in _pairs(model, evidence).items():
        here, there = (_place(name, places) for name in (source, alias))
        if here != there and force is _Force.BINDING and names.could_be_one(source, alias):
            raise CheckpointError(
                f"device_map puts {source} on {here} and {alias} on {there}, but they are one tensor by the model's "
                'config: give both modules one place, or keep them apart by on_conflict="untie". Nothing was loaded',
                names=[source, alias],
            )


def _place(name: str, places: Mapping[str, object]) -> object:
    """What a device map says of a tensor: the entry of the innermost module around it."""
    around = [module for module in places if not module or f"{name}.".startswith(f"{module}.")]
    return places[max(around, key=len)] if around else "no device"


def tie_what_was_read_(model: PreTrainedModel, missing: set[str], evidence: Evidence) -> None:
    """Tie what is declared, was built so or was recorded, as far as what was read allows.

    Args:
        model: What was read into.
        missing: Names that were in no file. Those that get the value of another name are taken out.
        evidence: Gets the first conflict, and what is missing still.
    """
    pairs = _pairs(model, evidence)
    names = _Names(model, missing)
    # A name that was missing may be the source of the next one.
    while any(names.fill_(pair) for pair in pairs):
        pass
    for (source, alias), force in pairs.items():
        difference = names.difference(source, alias) if force is _Force.BINDING else None
        if difference is not None:
            kept = _kept(Conflict(canonical=source, alias=alias, difference=difference, moment=Moment.LOAD), evidence)
            if kept is not None:
                names.share_(alias if kept == source else source, kept)
    for (source, alias), force in pairs.items():
        ties = force is not _Force.IF_MISSING and names.could_be_one(source, alias)
        if ties and names.difference(source, alias) is None:
            names.share_(alias, source)
    evidence.missing = set(missing)


class _Force(IntEnum):
    """How far a declared tie goes; the stronger counts."""

    #: One name is filled with the other's value where it is in no file.
    IF_MISSING = 1
    #: And equal values are one tensor, different ones are apart.
    IF_EQUAL = 2
    #: And different values are a conflict.
    BINDING = 3


def _pairs(model: PreTrainedModel, evidence: Evidence) -> dict[tuple[str, str], _Force]:
    """Source and alias of the ties that were recorded, built or declared, the most certain first.

    Of names that the plan in the folder knows, it alone says whether they are one tensor.
    """
    found = dict.fromkeys(_whole(evidence.built), _Force.BINDING)
    for declared in declarations(model, tiepolicy.observe(model)):
        for pair in declared.pairs if declared.value else ():
            found[pair] = max(_force(declared, model, evidence), found.get(pair, _Force.IF_MISSING))
    known = set() if evidence.recorded is None else set(evidence.recorded.tensors)
    found = {pair: force for pair, force in found.items() if not known.issuperset(pair)}
    noted = dict.fromkeys(((name, alias) for alias, name in evidence.weights.noted.items()), _Force.IF_MISSING)
    pairs = noted | found | dict.fromkeys(_whole(evidence.recorded), _Force.BINDING)
    # Of two names that could fill a third, the one that it is bound to comes before the one that merely could; then the
    # alphabet decides, as the order in which a class declares its keys changes between releases.
    return dict(sorted(pairs.items(), key=lambda item: (item[0] not in noted, -item[1], item[0])))


def _whole(plan: TiePlan | None) -> list[tuple[str, str]]:
    """Canonical name and alias of what a plan calls one tensor."""
    groups = () if plan is None else plan.groups
    return [(group.canonical, alias.name) for group in groups for alias in group.aliases if alias.view is None]


def _force(declared: Declaration, model: PreTrainedModel, evidence: Evidence) -> _Force:
    if not declared.binding:
        return _Force.IF_MISSING
    # T5's config, for one, makes its flag true whatever the file says.
    return _Force.IF_EQUAL if declared.config is model.config and evidence.denied else _Force.BINDING


class _Names:
    """The tensors of a model by name, as they become one."""

    def __init__(self, model: PreTrainedModel, missing: set[str]) -> None:
        self._facts = tiepolicy.observe(model)
        self._tensors = {name: self._facts.tensor(name) for name in self._facts}
        self._model = model
        self._missing = missing

    def could_be_one(self, source: str, alias: str) -> bool:
        """Whether two names can be one parameter."""
        a, b = (self._tensors.get(name) for name in (source, alias))
        if not (isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter) and type(a) is type(b)):
            # One may be quantized.
            return False
        # What was in no file may still be on the meta device.
        somewhere = a.device == b.device or not self._missing.isdisjoint((source, alias))
        return a.shape == b.shape and a.dtype == b.dtype and somewhere

    def fill_(self, pair: tuple[str, str]) -> bool:
        """Give a name that was missing the tensor of its partner; whether it did."""
        there = [name for name in pair if name not in self._missing]
        if len(there) != 1 or not self.could_be_one(*pair):
            return False
        gone = next(name for name in pair if name in self._missing)
        self.share_(gone, there[0])
        self._missing.discard(gone)
        return True

    def difference(self, source: str, alias: str) -> str | None:
        """Where two names that could be one and were both read differ; None if they do not."""
        if not self.could_be_one(source, alias) or not self._missing.isdisjoint((source, alias)):
            return None
        first, second = self._tensors[source], self._tensors[alias]
        return None if first is second or first.is_meta else first_difference(first, second)

    def share_(self, name: str, owner: str) -> None:
        """Make a name, and all that are one with it, the parameter of another name."""
        replaced, tensor = self._tensors[name], self._tensors[owner]
        if replaced is tensor:
            return
        for other in [other for other, held in self._tensors.items() if held is replaced]:
            path, _, attribute = other.rpartition(".")
            setattr(self._model.get_submodule(path), attribute, tensor)
            self._tensors[other] = tensor


def _kept(conflict: Conflict, evidence: Evidence) -> str | None:
    """The name whose value both get; None to leave them apart."""
    try:
        return settle(conflict, evidence.policy.resolve)
    except TieConflictError as error:
        if evidence.on_conflict == "canonical":
            return conflict.canonical
        if evidence.on_conflict == "error" and evidence.conflict is None:
            evidence.conflict = TieConflictError(
                f"{conflict.alias} and {conflict.canonical} are one tensor by the model's config, but both are stored, "
                f'and differ: {conflict.difference}. Nothing was loaded. Choose: on_conflict="untie" keeps both apart '
                f'and sets the flag right, on_conflict="canonical" gives both the value of {conflict.canonical}',
                names=error.names,
            )
        return None
