"""Step 31, laws: what holds for every plugin, as checks of one plugin on one model."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pluggy
import torch
from torch import nn

from tiepolicy import hookspecs
from tiepolicy._claims import Claim, Verdict
from tiepolicy._evidence import relate
from tiepolicy._external import Owners
from tiepolicy._observe import Facts, TensorSource, observe
from tiepolicy._plan import TiePlan
from tiepolicy._policy import Policy
from tiepolicy._rules import tiepolicy_claims as storage_claims
from tiepolicy._values import first_difference
from tiepolicy.errors import PluginError, TiePolicyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One plugin, one model, and claims of others about it."""

    plugin: object
    source: TensorSource
    claims: tuple[Claim, ...]
    #: Other models that the model is planned with.
    external: Owners | None = None

    @property
    def model(self) -> nn.Module | None:
        """The model as hooks get it."""
        return self.source if isinstance(self.source, nn.Module) else None

    def hooks(self) -> pluggy.HookRelay:
        """The plugin's hooks, without the built-in ones."""
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        manager.register(self.plugin)
        manager.check_pending()
        return manager.hook

    def all_pairs(self, facts: Facts) -> list[Claim]:
        """The claims of two names that the plugin may be asked to decide."""
        answers = self.hooks().tiepolicy_claims(model=self.model, facts=facts)
        return [
            pair
            for claims in [*answers, self.claims, storage_claims(facts)]
            for claim in claims
            for pair in claim.pairs()
        ]

    def plan(self) -> TiePlan:
        """The plan of a policy with the plugin and with the claims of others."""
        policy = Policy(plugins=[self.plugin, _Claimant(self.claims)])
        return policy.plan(self.source, external=self.external, digests=self.external is not None)


class _Claimant:
    def __init__(self, claims: Iterable[Claim]) -> None:
        self.claims = list(claims)

    @hookspecs.hookimpl
    def tiepolicy_claims(self) -> list[Claim]:
        return self.claims


def _implements_hooks(trial: Trial) -> str | None:
    try:
        Policy(plugins=[trial.plugin])
    except PluginError as error:
        return str(error)
    return None


def _answers_fit(trial: Trial) -> str | None:
    try:
        trial.plan()
    except PluginError as error:
        return str(error)
    except TiePolicyError:
        pass  # other laws say why
    return None


def _changes_nothing(trial: Trial) -> str | None:
    facts = observe(trial.source)
    before, facts_before = _snapshot(trial.source), dict(facts)
    hooks = trial.hooks()
    hooks.tiepolicy_claims(model=trial.model, facts=facts)
    for pair in [*trial.claims, *storage_claims(facts)]:
        for two in pair.pairs():
            hooks.tiepolicy_decide(claim=two, facts=facts)
    plan = Policy().plan(trial.source, external=trial.external)
    for group in plan.groups:
        hooks.tiepolicy_canonical(group=tuple(sorted(group.names)), claims=(), facts=facts)
    manifest = plan.to_manifest()
    hooks.tiepolicy_planned(plan=plan)
    if plan.to_manifest() != manifest:
        return "tiepolicy_planned changed the plan"
    if dict(facts) != facts_before:
        return "a hook changed the facts"
    after = _snapshot(trial.source)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return f"a hook changed {changed[0]} of the model" if changed else None


def _ignores_order(trial: Trial) -> str | None:
    first = trial.plan()
    if trial.plan() != first:
        return "planning one model twice gave two plans"
    with _reversed(trial.source) as source:
        turned = replace(trial, source=source, claims=tuple(reversed(trial.claims)))
        again = turned.plan()
    if again != first:
        return f"with the names in another order the plan is another:\n{first}\nand\n{again}"
    return None


def _keeps_absent_names_out(trial: Trial) -> str | None:
    facts = observe(trial.source)
    for pair, _ in _aliases(trial, facts):
        absent = [name for name in pair.names if name not in facts]
        if absent:
            return (
                f"tiepolicy_decide calls {pair.names[1]} and {pair.names[0]} one tensor, and {absent[0]} is not there"
            )
    return None


def _keeps_unequal_shapes_apart(trial: Trial) -> str | None:
    facts = observe(trial.source)
    for pair, verdict in _aliases(trial, facts, present=True):
        a, b = (facts[name] for name in pair.names)
        if a.shape != b.shape and (a.storage is None or a.storage != b.storage):
            return f"tiepolicy_decide calls {b} and {a} one tensor ({verdict.reason}), and their shapes differ"
    return None


def _has_evidence(trial: Trial) -> str | None:
    facts = observe(trial.source)
    for pair, verdict in _aliases(trial, facts, present=True):
        a, b = (facts[name] for name in pair.names)
        if not (relate(a, b).proves_alias or relate(b, a).proves_alias):
            return f"tiepolicy_decide calls {b} and {a} one tensor ({verdict.reason}), and neither can be rebuilt"
    return None


def _loses_nothing(trial: Trial) -> str | None:
    try:
        plan = trial.plan()
    except TiePolicyError as error:
        return str(error)
    tensors = tensors_of(trial.source)
    expanded = plan.expand(plan.compact(tensors), external=trial.external)
    for name, tensor in tensors.items():
        if name not in expanded:
            return f"{name} is not rebuilt from the compact state"
        difference = None if tensor.is_meta else first_difference(tensor, expanded[name])
        if difference is not None or tensor.shape != expanded[name].shape:
            return f"{name} is rebuilt with other values: {difference or tuple(expanded[name].shape)}"
    return None


#: Every law as a sentence, with the check that says how a trial breaks it, or None; in the order they are checked.
LAWS: tuple[tuple[str, Callable[[Trial], str | None]], ...] = (
    ("a plugin implements hooks of tiepolicy, with their arguments", _implements_hooks),
    ("hooks answer with the right types", _answers_fit),
    ("planning changes neither the model nor the facts nor the plan", _changes_nothing),
    ("a tensor that is not there is one with nothing", _keeps_absent_names_out),
    ("tensors of unequal shapes in separate storages are never one", _keeps_unequal_shapes_apart),
    ("nothing is called one tensor without evidence", _has_evidence),
    ("no byte is lost", _loses_nothing),
    ("the plan does not depend on the order of names", _ignores_order),
)


def tensors_of(source: TensorSource) -> dict[str, torch.Tensor]:
    """Every name of a case with its tensor, doubles included."""
    return dict(source.state_dict(keep_vars=True)) if isinstance(source, nn.Module) else dict(source)


def _aliases(trial: Trial, facts: Facts, *, present: bool = False) -> Iterator[tuple[Claim, Verdict]]:
    """What the plugin calls one tensor; if asked for, of names that are there only."""
    hooks = trial.hooks()
    for pair in trial.all_pairs(facts):
        if not present or facts.keys() >= set(pair.names):
            verdict = hooks.tiepolicy_decide(claim=pair, facts=facts)
            if verdict is not None and verdict.is_alias:
                yield pair, verdict


def _snapshot(source: TensorSource) -> dict[str, object]:
    """What a plugin must leave alone: objects, places, values, and what modules hold."""
    seen: dict[str, object] = {}
    for name, tensor in tensors_of(source).items():
        bits = None if tensor.is_meta else tensor.detach().clone().contiguous().view(-1).view(torch.uint8).tolist()
        seen[name] = (id(tensor), tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad, bits)
    if isinstance(source, nn.Module):
        for name, module in source.named_modules(remove_duplicate=False):
            seen[f"the module {name or 'itself'}"] = (id(module), module.training, tuple(vars(module)))
            config = vars(module).get("config")
            if hasattr(config, "__dict__"):
                seen[f"the config of {name or 'the model'}"] = dict(vars(config))
    return seen


@contextlib.contextmanager
def _reversed(source: TensorSource) -> Iterator[TensorSource]:
    """The source with its names in reverse: another mapping, or the same module until the block ends."""
    if not isinstance(source, nn.Module):
        yield dict(reversed(list(source.items())))
        return
    registries: list[dict[str, Any]] = [
        registry
        for module in list(source.modules())
        for registry in (module._modules, module._parameters, module._buffers)  # noqa: SLF001 - no public way
    ]
    for registry in registries:
        _reverse_(registry)
    try:
        yield source
    finally:
        for registry in registries:
            _reverse_(registry)


def _reverse_(registry: dict[str, Any]) -> None:
    items = list(registry.items())
    registry.clear()
    registry.update(reversed(items))
