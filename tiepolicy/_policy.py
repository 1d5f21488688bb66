"""Step 19, planning: a policy asks its plugins about the facts of a model and turns the verdicts into one plan."""

import functools
import itertools
import traceback
from collections.abc import Iterable
from types import FrameType
from typing import Any

import pluggy
from torch import nn

from tiepolicy import _rules, _trace, hookspecs
from tiepolicy._claims import Claim, Reason, Source, Verdict
from tiepolicy._conflict import Conflict, Missing, Moment, Resolution, unresolved
from tiepolicy._evidence import relate
from tiepolicy._external import ExternalTie, Owners, find_external
from tiepolicy._groups import (
    Alias,
    Companion,
    RefusedClaim,
    TieGroup,
    group_by_memory,
    group_of,
    is_one,
    join,
    join_companions,
    owners_of,
    pairs_of,
    without_accepted,
)
from tiepolicy._observe import Facts, TensorSource, observe
from tiepolicy._plan import TiePlan
from tiepolicy._retie import Keep, share
from tiepolicy.errors import PluginError, TiePolicyError, UnsafeVerdictError


class Policy:
    """Decides which names of a model are one tensor, with the built-in rules and the plugins it is given.

    Instances share nothing. The built-in rules are asked last, so a plugin may claim, refuse, and choose names; it may
    not call one tensor what cannot be rebuilt.

    Example:
        >>> import torch
        >>> class Framework:
        ...     @hookspecs.hookimpl
        ...     def tiepolicy_canonical(self, group):
        ...         return next((name for name in group if name.startswith("decoder.")), None)
        >>> weight = torch.zeros(6, 2)
        >>> plan = Policy(plugins=[Framework()]).plan({"embed": weight, "decoder.out": weight})
        >>> plan.canonical("embed")
        'decoder.out'

    Args:
        plugins: Objects or modules that implement hooks of `tiepolicy.hookspecs`.
    """

    def __init__(self, plugins: Iterable[object] = ()) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._is_traced = _trace.is_wanted()
        if self._is_traced:
            _trace.trace(self._manager)
        self._manager.register(_rules, name="built-in rules")
        for plugin in plugins:
            self._manager.register(plugin, name=self._free_name(plugin))

    @staticmethod
    def from_entry_points() -> "Policy":
        """A policy with every installed plugin that is published in the entry point group `tiepolicy`."""
        policy = Policy()
        policy._manager.load_setuptools_entrypoints(hookspecs.PROJECT)
        return policy

    def plan(self, source: TensorSource, *, external: Owners | None = None, digests: bool = False) -> TiePlan:
        """Decide which parameters and persistent buffers of a module, or tensors of a mapping, are one tensor.

        Reads no tensor data, except for `digests`. The plan depends on the model alone: not on the order of names, the
        rank or the device.

        Args:
            source: A module, or a mapping of tensors.
            external: Other models, by the names to know them under. A tensor that is theirs is an external tie.
            digests: Whether to read the external tensors and record their digests, so that `TiePlan.compact` may
                leave them out. Without, they are recognised and stored.

        Returns:
            The plan, which keeps none of the tensors.

        Raises:
            ObservationError: If the source holds something that is no named tensor.
            PluginError: If a plugin raises or answers with a wrong type.
            UnsafeVerdictError: If a plugin calls names one tensor that are not.
        """
        facts = observe(source)
        claims = self._plugin_claims(source if isinstance(source, nn.Module) else None, facts)
        settled, unsettled = self._settle(claims, facts)
        accepted, refused = self._judge(pairs_of([*claims, *_rules.claims_of(unsettled, facts)]), facts)
        groups = tuple(sorted([*settled, *self._groups(accepted, facts)], key=_name_of))
        plan = TiePlan(
            tensors=facts.specs(),
            groups=groups,
            refused=without_accepted(refused, groups),
            companions=self._companions(source, facts),
            external=_external(facts, groups, external, digests=digests),
            resolver=self.resolve if self._plugins_answer("tiepolicy_resolve") else unresolved,
        )
        self._ask("tiepolicy_planned", plan=plan)
        return plan

    def tie(self, model: nn.Module, *, keep: Keep | None = None) -> TiePlan:
        """Make the ties real that are declared and possible but not there; changes the module.

        Possible means equal shape, dtype and placement. Parameters that only share their memory become one object too,
        declared or not, unless one is frozen and another is not. Call it where a model is built: before it is sharded,
        and before its optimizer is made.

        Args:
            model: The module to change.
            keep: "canonical" to give all names of a tie the value of the one that is stored. By default equal values
                need no choice, and different ones are an error.

        Returns:
            The plan of the model as it is now.

        Raises:
            TieConflictError: If values differ and nobody says which to keep. Nothing was changed then.
            TiePolicyError: If one of the names is a view of a part of a third tensor.
        """
        facts = observe(model)
        claims = [*self._plugin_claims(model, facts), *_rules.tiepolicy_claims(facts)]
        accepted, refused = self._judge(pairs_of(claims), facts)
        possible = [refusal.claim for refusal in refused if _is_possible(refusal, facts)]
        wanted = {name for claim in possible for name in claim.names}
        groups: list[TieGroup] = []
        for names, connecting in join([*accepted, *possible]):
            if not wanted.isdisjoint(names):
                groups.append(self._wished(names, connecting, facts))
            else:
                groups += [group for group in self._groups(list(connecting), facts) if _trains_alike(group, facts)]
        share(
            model,
            groups,
            holds=lambda group, alias: is_one(group, alias, facts),
            keep=keep,
            moment=Moment.TIE,
            resolver=self.resolve,
        )
        return self.plan(model)

    def resolve(self, conflict: Conflict | Missing) -> Resolution | None:
        """What the plugins want done about a `conflict` or a missing tensor; None if they leave it an error.

        Raises:
            PluginError: If a plugin raises or answers with a wrong type.
        """
        resolution = self._ask("tiepolicy_resolve", conflict=conflict)
        if resolution is not None:
            self._check_type("tiepolicy_resolve", resolution, Resolution)
        return resolution  # type: ignore[no-any-return]  # checked above

    def _wished(self, names: tuple[str, ...], claims: tuple[Claim, ...], facts: Facts) -> TieGroup:
        """A group of names that are to be one tensor, though they are not yet."""
        if len({(facts[name].spec, facts[name].placement, facts[name].device) for name in names}) > 1:
            raise TiePolicyError(
                f"{list(names)} are declared to be one tensor, but some are views of a part of another; tie them where "
                "the model is built",
                names=names,
            )
        canonical = self._ask("tiepolicy_canonical", group=names, claims=claims, facts=facts)
        self._check_type("tiepolicy_canonical", canonical, str)
        if canonical not in names:
            raise PluginError(f"a plugin wants {canonical!r} kept for {list(names)}, which is none of them")
        aliases = tuple(Alias(name=name, reason=Reason.SAME_OBJECT) for name in names if name != canonical)
        return TieGroup(canonical=canonical, aliases=aliases)

    def _plugin_claims(self, model: nn.Module | None, facts: Facts) -> list[Claim]:
        """What the plugins claim; the built-in rules are not among them."""
        hook = self._manager.subset_hook_caller("tiepolicy_claims", remove_plugins=[_rules])
        answers = self._call(hook, model=model, facts=facts)
        claims = [claim for answer in answers for claim in answer]
        for claim in claims:
            self._check_type("tiepolicy_claims", claim, Claim)
        return claims

    def _companions(self, source: TensorSource, facts: Facts) -> tuple[Companion, ...]:
        """What the built-in rule and the plugins call the companion of a tensor."""
        model = source if isinstance(source, nn.Module) else None
        companions = _rules.companions_by_shape(facts)
        for answer in self._ask("tiepolicy_companions", model=model, facts=facts):
            for companion in answer:
                self._check_type("tiepolicy_companions", companion, Companion)
                absent = [name for name in (companion.name, *companion.of) if name not in facts]
                if absent or not companion.of:
                    raise PluginError(
                        f"a plugin answered tiepolicy_companions with {companion}, but "
                        + (f"{absent[0]} is not in the model" if absent else "it belongs to nothing")
                    )
                companions.append(companion)
        return join_companions(companions)

    def _settle(self, claims: list[Claim], facts: Facts) -> tuple[list[TieGroup], list[tuple[str, ...]]]:
        """The groups that memory alone settles, and the sets of names that meet in memory and have to be judged.

        A set is judged if a claim is about one of its names, or if a plugin decides claims or chooses names.
        """
        sets = facts.sharing()
        if self._asks_plugins("tiepolicy_decide") or self._asks_plugins("tiepolicy_canonical"):
            return [], sets
        claimed = {name for claim in claims for name in claim.names}
        groups, unsettled = [], []
        for names in sets:
            group = group_by_memory(names, facts) if claimed.isdisjoint(names) else None
            if group is None:
                unsettled.append(names)
            else:
                groups.append(group)
        return groups, unsettled

    def _judge(self, claims: list[Claim], facts: Facts) -> tuple[list[Claim], list[RefusedClaim]]:
        accepted, refused = [], []
        asks_plugins = self._asks_plugins("tiepolicy_decide")
        for claim in claims:
            verdict = self._verdict(claim, facts) if asks_plugins else _rules.tiepolicy_decide(claim, facts)
            if verdict.is_alias:
                accepted.append(claim)
            else:
                refused.append(RefusedClaim(claim=claim, verdict=verdict, shapes=_shapes(claim, facts)))
        return accepted, refused

    def _verdict(self, claim: Claim, facts: Facts) -> Verdict:
        """The first answer to a claim, which may be a plugin's and is held against the evidence."""
        verdict = self._ask("tiepolicy_decide", claim=claim, facts=facts)
        self._check_type("tiepolicy_decide", verdict, Verdict)
        if verdict.is_alias:
            _check_evidence(claim, verdict, facts)
        return verdict  # type: ignore[no-any-return]  # checked above

    def _groups(self, accepted: list[Claim], facts: Facts) -> list[TieGroup]:
        """What accepted claims connect, each set of names with one that contains all others."""
        groups = []
        for names, claims in join(accepted):
            owners, relations = owners_of(names, facts)
            # A part of two tensors that only overlap may truly be claimed of both; its storage claim settles whose.
            settled = [claim for claim in claims if claim.source is Source.STORAGE]
            if owners:
                canonical = self._canonical(names, owners, claims, facts)
                groups.append(group_of(canonical, names, relations if canonical == owners[0] else {}, facts))
            elif len(settled) < len(claims):
                groups += self._groups(settled, facts)
            else:
                raise UnsafeVerdictError(
                    f"accepted claims connect {list(names)}, but none of them contains all the others", names=names
                )
        return groups

    def _canonical(
        self, names: tuple[str, ...], owners: tuple[str, ...], claims: tuple[Claim, ...], facts: Facts
    ) -> str:
        """The name to store for tied names, one of those that contain all others."""
        canonical = self._ask("tiepolicy_canonical", group=owners, claims=claims, facts=facts)
        self._check_type("tiepolicy_canonical", canonical, str)
        if canonical not in owners:
            raise UnsafeVerdictError(
                f"a plugin wants {canonical!r} stored for the tied names {list(names)}, but the others cannot be "
                f"rebuilt from it; the names that contain all others are {list(owners)}",
                names=names,
            )
        return canonical  # type: ignore[no-any-return]  # checked above

    def _ask(self, hook_name: str, **arguments: Any) -> Any:
        return self._call(getattr(self._manager.hook, hook_name), **arguments)

    def _call(self, hook: pluggy.HookCaller, **arguments: Any) -> Any:
        try:
            return hook(**arguments)
        except Exception as error:
            plugin = self._culprit(hook, error)
            if plugin is None:
                raise
            raise PluginError(f"{hook.name} of the plugin {plugin} raised {type(error).__name__}: {error}") from error

    def _plugins_answer(self, hook_name: str) -> bool:
        """Whether anybody but the built-in rules implements a hook."""
        implementations = getattr(self._manager.hook, hook_name).get_hookimpls()
        return any(implementation.plugin is not _rules for implementation in implementations)

    def _free_name(self, plugin: object) -> str:
        """What errors and traces call a plugin: pluggy's own name for an object is a number."""
        name = getattr(plugin, "__name__", None) or type(plugin).__name__
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(free for free in names if not self._manager.has_plugin(free))

    def _asks_plugins(self, hook_name: str) -> bool:
        """Whether a question goes through pluggy: a trace wants to see it even where only the built-in rules answer."""
        return self._is_traced or self._plugins_answer(hook_name)

    def _culprit(self, hook: pluggy.HookCaller, error: Exception) -> str | None:
        """The name of the plugin whose implementation is on the error's traceback."""
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for implementation in hook.get_hookimpls():
                if _runs(frame, implementation.function):
                    return implementation.plugin_name
        return None

    def _check_type(self, hook_name: str, answer: object, expected: type) -> None:
        if not isinstance(answer, expected):
            plugins = [
                implementation.plugin_name for implementation in getattr(self._manager.hook, hook_name).get_hookimpls()
            ]
            raise PluginError(
                f"a plugin answered {hook_name} with {answer!r}, a {type(answer).__name__}; expected a "
                f"{expected.__name__}. The plugins that answer this hook are {plugins}"
            )


@functools.cache
def default_policy() -> Policy:
    """The policy of the module-level functions: built-in rules and installed plugins, loaded once."""
    return Policy.from_entry_points()


def _runs(frame: FrameType, function: object) -> bool:
    """Whether a frame is a call of a function, or of a method of its very object: two plugins may be of one class."""
    owner = getattr(function, "__self__", None)
    called = frame.f_code is getattr(function, "__code__", None)
    return called and (owner is None or any(value is owner for value in frame.f_locals.values()))


def _check_evidence(claim: Claim, verdict: Verdict, facts: Facts) -> None:
    a, b = claim.names
    missing = [name for name in claim.names if name not in facts]
    if missing:
        problem = f"{' and '.join(missing)} is not in the model"
    elif relate(facts[a], facts[b]).proves_alias or relate(facts[b], facts[a]).proves_alias:
        return
    else:
        own = _rules.tiepolicy_decide(claim, facts)
        problem = f"{facts[b]} cannot be rebuilt from {facts[a]}: {own.detail}"
    raise UnsafeVerdictError(
        f"a plugin calls {b} and {a} one tensor ({verdict.reason}; claimed by {claim.detail or claim.source}), but "
        f"{problem}. Saving would lose {b}; nothing was written. Remove the plugin's verdict, or tie the two first",
        names=claim.names,
    )


def _is_possible(refusal: RefusedClaim, facts: Facts) -> bool:
    """Whether nothing but separate memory is in the way of a claim, by the verdict and by the facts."""
    own = _rules.tiepolicy_decide(refusal.claim, facts)
    return Reason.DECLARED_NOT_TIED is refusal.verdict.reason is own.reason


def _trains_alike(group: TieGroup, facts: Facts) -> bool:
    """Whether all parameters that are the whole tensor are frozen, or none is; a frozen double may be on purpose."""
    whole = (group.canonical, *(alias.name for alias in group.aliases if alias.view is None))
    return len({facts.tensor(name).requires_grad for name in whole if facts[name].kind == "parameter"}) <= 1


def _external(
    facts: Facts, groups: tuple[TieGroup, ...], external: Owners | None, *, digests: bool
) -> tuple[ExternalTie, ...]:
    if not external:
        return ()
    aliases = {alias.name for group in groups for alias in group.aliases}
    stored = tuple(sorted(name for name in facts if name not in aliases))
    return tuple(find_external(stored, facts, external, digests=digests))


def _shapes(claim: Claim, facts: Facts) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(facts[name].shape if name in facts else None for name in claim.names)


def _name_of(group: TieGroup) -> str:
    return group.canonical
