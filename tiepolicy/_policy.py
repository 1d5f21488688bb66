"""Step 18, planning: a policy asks its plugins about the facts of a model and turns the verdicts into one plan."""

import functools
from collections.abc import Callable, Iterable
from operator import attrgetter

from torch import nn

from tiepolicy import _rules
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
from tiepolicy._observe import Facts, TensorSource, check_module, observe
from tiepolicy._plan import TiePlan
from tiepolicy._plugins import Plugin, Plugins
from tiepolicy._retie import Keep, share
from tiepolicy.errors import PluginError, TiePolicyError, UnsafeVerdictError


class Policy:
    """Decides which names of a model are one tensor, with the built-in rules and the plugins it is given.

    Instances share nothing. The built-in rules are asked last, so a plugin may claim, refuse, and choose names; it may
    not call one tensor what cannot be rebuilt.

    Example:
        >>> import tiepolicy, torch
        >>> class Framework:
        ...     @tiepolicy.hookimpl
        ...     def tiepolicy_canonical(self, group):
        ...         return next((name for name in group if name.startswith("decoder.")), None)
        >>> weight = torch.zeros(6, 2)
        >>> plan = Policy(plugins=[Framework()]).plan({"embed": weight, "decoder.out": weight})
        >>> plan.canonical("embed")
        'decoder.out'

    Args:
        plugins: Objects or modules that implement hooks of `tiepolicy.hookspecs`. No others are asked: installed ones
            belong to `Policy.from_entry_points()`, which is the default policy.

    Raises:
        PluginError: If one implements no hook, one that does not exist, or one with arguments that it has not.
    """

    def __init__(self, plugins: Iterable[object] = ()) -> None:
        self._plugins = Plugins(plugins)

    @staticmethod
    def from_entry_points() -> "Policy":
        """A policy with every installed plugin that is published in the entry point group `tiepolicy`.

        Raises:
            PluginError: If one cannot be loaded.
        """
        policy = Policy()
        policy._plugins.load_installed()
        return policy

    def plugins(self) -> list[Plugin]:
        """The plugins of this policy, sorted by name; the built-in rules are one."""
        return self._plugins.described()

    def plan(self, source: TensorSource, *, external: Owners | None = None, digests: bool = False) -> TiePlan:
        """Decide as `tiepolicy.plan`, with the plugins of this policy.

        Reads no tensor data, except for `digests`. The plan depends on the model alone: not on the order of names, the
        rank or the device.

        Args:
            source: A module, its parameters and persistent buffers, or a mapping of tensors.
            external: As there; a tensor that is theirs is an external tie.
            digests: As there; without, external tensors are recognised and stored.

        Returns:
            The plan, which keeps none of the tensors.

        Raises:
            ObservationError: As there.
            PluginError: As there.
            UnsafeVerdictError: As there.
        """
        facts = observe(source)
        specs = facts.specs()  # before all else: it refuses what has no shape
        model = source if isinstance(source, nn.Module) else None
        claims = self._plugins.each("tiepolicy_claims", Claim, model=model, facts=facts)
        settled, unsettled = self._settle(claims, facts)
        accepted, refused = self._judge(pairs_of([*claims, *_rules.claims_of(unsettled, facts)]), facts)
        groups = tuple(sorted([*settled, *self._groups(accepted, facts)], key=attrgetter("canonical")))
        plan = TiePlan(
            tensors=specs,
            groups=groups,
            refused=without_accepted(refused, groups),
            companions=self._companions(model, facts),
            external=_external(facts, groups, external, digests=digests),
            resolver=self.resolve if self._plugins.answer("tiepolicy_resolve") else unresolved,
        )
        self._plugins.ask("tiepolicy_planned", plan=plan)
        return plan

    def tie(self, model: nn.Module, *, keep: Keep | None = None) -> TiePlan:
        """Make the ties real that are declared and possible but not there; changes the module.

        Possible means equal shape, dtype and placement. Parameters that only share their memory become one object too,
        declared or not, unless one is frozen and another is not. Call it where a model is built: before it is sharded,
        and before its optimizer is made.

        Args:
            model: The module to change.
            keep: As for `tiepolicy.tie`.

        Returns:
            The plan of the model as it is now.

        Raises:
            TieConflictError: As there.
            TiePolicyError: If one of the names is a view of a part of a third tensor.
        """
        check_module(model)
        facts = observe(model)
        claims = [
            *self._plugins.each("tiepolicy_claims", Claim, model=model, facts=facts),
            *_rules.tiepolicy_claims(facts),
        ]
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
        answer = self._plugins.ask("tiepolicy_resolve", conflict=conflict)
        return None if answer is None else self._plugins.checked("tiepolicy_resolve", answer, Resolution)

    def _wished(self, names: tuple[str, ...], claims: tuple[Claim, ...], facts: Facts) -> TieGroup:
        """A group of names that are to be one tensor, though they are not yet."""
        if len({(facts[name].spec, facts[name].placement, facts[name].device) for name in names}) > 1:
            raise TiePolicyError(
                f"{list(names)} are declared to be one tensor, but some are views of a part of another; tie them where "
                "the model is built",
                names=names,
            )
        canonical = self._plugins.first("tiepolicy_canonical", str, group=names, claims=claims, facts=facts)
        if canonical not in names:
            raise PluginError(
                f"{self._plugins.culprit('tiepolicy_canonical')} wants {canonical!r} kept for {list(names)}, which is "
                "none of them"
            )
        aliases = tuple(Alias(name=name, reason=Reason.SAME_OBJECT) for name in names if name != canonical)
        return TieGroup(canonical=canonical, aliases=aliases)

    def _companions(self, model: nn.Module | None, facts: Facts) -> tuple[Companion, ...]:
        """What the built-in rule and the plugins call the companion of a tensor."""
        answered = self._plugins.each("tiepolicy_companions", Companion, model=model, facts=facts)
        for companion in answered:
            absent = [name for name in (companion.name, *companion.of) if name not in facts]
            if absent or not companion.of:
                raise PluginError(
                    f"{self._plugins.culprit('tiepolicy_companions')} answered tiepolicy_companions with {companion}, "
                    "but " + (f"{absent[0]} is not in the model" if absent else "it belongs to nothing")
                )
        return join_companions([*_rules.companions_by_shape(facts), *answered])

    def _settle(self, claims: list[Claim], facts: Facts) -> tuple[list[TieGroup], list[tuple[str, ...]]]:
        """The groups that memory alone settles, and the sets of names that meet in memory and have to be judged.

        A set is judged if a claim is about one of its names, or if a plugin decides claims or chooses names.
        """
        sets = facts.sharing()
        if self._plugins.are_asked("tiepolicy_decide") or self._plugins.are_asked("tiepolicy_canonical"):
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
        asks_plugins = self._plugins.are_asked("tiepolicy_decide")
        for claim in claims:
            verdict = self._verdict(claim, facts) if asks_plugins else _rules.tiepolicy_decide(claim, facts)
            if verdict.is_alias:
                accepted.append(claim)
            else:
                refused.append(RefusedClaim(claim=claim, verdict=verdict, shapes=_shapes(claim, facts)))
        return accepted, refused

    def _verdict(self, claim: Claim, facts: Facts) -> Verdict:
        """The first answer to a claim, which may be a plugin's and is held against the evidence."""
        verdict = self._plugins.first("tiepolicy_decide", Verdict, claim=claim, facts=facts)
        if verdict.is_alias:
            _check_evidence(claim, verdict, facts, self._plugins.culprit)
        return verdict

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
        canonical = self._plugins.first("tiepolicy_canonical", str, group=owners, claims=claims, facts=facts)
        if canonical not in owners:
            raise UnsafeVerdictError(
                f"{self._plugins.culprit('tiepolicy_canonical')} wants {canonical!r} stored for the tied names "
                f"{list(names)}, but the others cannot be rebuilt from it; the names that contain all others are "
                f"{list(owners)}",
                names=names,
            )
        return canonical


@functools.cache
def default_policy() -> Policy:
    """The policy of the module-level functions: built-in rules and installed plugins, loaded once."""
    return Policy.from_entry_points()


def _check_evidence(claim: Claim, verdict: Verdict, facts: Facts, culprit: Callable[[str], str]) -> None:
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
        f"{culprit('tiepolicy_decide')} calls {b} and {a} one tensor ({verdict.reason}; claimed by "
        f"{claim.detail or claim.source}), but {problem}. Saving would lose {b}; nothing was written. Remove the "
        "plugin's verdict, or tie the two first",
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
