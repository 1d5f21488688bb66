"""Step 15, the questions a plugin may answer: implement them with `tiepolicy.hookimpl`, naming only what you need.

A plugin is any object or module with functions of these names:

    import tiepolicy

    @tiepolicy.hookimpl
    def tiepolicy_claims(model, facts):
        return [tiepolicy.Claim(("decoder.embed.weight", "decoder.out.weight"), "declared", "decoder.share_embedding")]

Hand it to `tiepolicy.Policy(plugins=[...])`, or publish it under the entry point group `tiepolicy`, where the default
policy finds it.
"""

from collections.abc import Iterable

import pluggy
from torch import nn

from tiepolicy._claims import Claim, Verdict
from tiepolicy._conflict import Conflict, Missing, Resolution
from tiepolicy._groups import Companion
from tiepolicy._observe import Facts
from tiepolicy._plan import TiePlan

#: Name of the pluggy project and of the entry point group.
PROJECT = "tiepolicy"

hookspec = pluggy.HookspecMarker(PROJECT)
#: Marks a function of a plugin as its answer to the question of the same name.
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def tiepolicy_claims(model: nn.Module | None, facts: Facts) -> Iterable[Claim] | None:
    """State which names may be one tensor. All plugins are asked and all claims are judged.

    Args:
        model: The module that is planned, or None if a mapping of tensors is.
        facts: What was seen of each tensor, by name.

    Returns:
        Claims, or None for none. A claim may name a tensor that is absent; it is then refused as `partner-absent`.
    """


@hookspec(firstresult=True)
def tiepolicy_decide(claim: Claim, facts: Facts) -> Verdict | None:
    """Accept or refuse a claim of two names. The first answer that is not None counts; the built-in rule is last.

    Calling two names one tensor without evidence (one object, one storage, a view) stops the planning with
    `UnsafeVerdictError`: no plugin can make a checkpoint lose a tensor.

    Args:
        claim: The claim, of exactly two names.
        facts: What was seen of each tensor, by name.

    Returns:
        A verdict, or None to leave the decision to others.
    """


@hookspec
def tiepolicy_companions(model: nn.Module | None, facts: Facts) -> Iterable[Companion] | None:
    """State which tensors others cannot be used without. All answers count; none can take one back.

    The built-in rule knows persistent buffers of integers or truth values with one entry for each row of parameters in
    their module. Nothing may be loaded into a model that has the others and not their companion.

    Args:
        model: The module that is planned, or None if a mapping of tensors is.
        facts: What was seen of each tensor, by name.

    Returns:
        Companions of names that are in the model, or None for none.
    """


@hookspec(firstresult=True)
def tiepolicy_canonical(group: tuple[str, ...], claims: tuple[Claim, ...], facts: Facts) -> str | None:
    """Choose the name under which a group of tied names is stored. The first answer that is not None counts.

    Args:
        group: The tied names, sorted.
        claims: The accepted claims about them.
        facts: What was seen of each tensor, by name.

    Returns:
        A name of the group from which all others can be rebuilt, or None to leave the choice to others.
    """


@hookspec(firstresult=True)
def tiepolicy_resolve(conflict: Conflict | Missing) -> Resolution | None:
    """Choose what becomes of two values of one tensor, or of a missing one. The first answer that is not None counts.

    Asked where `TieConflictError` would be raised: by `TiePlan.compact`, `expand` and `retie`, by `tiepolicy.tie`, and
    by loaders that find two values in a checkpoint; and by `tiepolicy.reconcile` where `MissingTensorError` would be.

    Args:
        conflict: The two names, and where their values differ; or the name that is missing, and what is stored.

    Returns:
        About a `Conflict`, `Resolution.keep(name)` with one of the two names, or `Resolution.untie()` to keep both
        values apart. About a `Missing`, `Resolution.take(name)` with the name of a stored tensor of its shape and
        dtype, or `Resolution.leave()` to keep what the model has. Or None to leave the decision to others, and the
        error if nobody decides.
    """


@hookspec
def tiepolicy_planned(plan: TiePlan) -> None:
    """Hear of a finished plan, for metrics and logs.

    Args:
        plan: The plan.
    """
