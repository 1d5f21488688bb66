"""Decides which weights of a PyTorch model are one tensor, and keeps it true through every save and load."""

from torch import nn

from tiepolicy._claims import Claim as Claim
from tiepolicy._claims import Decision as Decision
from tiepolicy._claims import Reason as Reason
from tiepolicy._claims import Source as Source
from tiepolicy._claims import Verdict as Verdict
from tiepolicy._conflict import Conflict as Conflict
from tiepolicy._conflict import Missing as Missing
from tiepolicy._conflict import Moment as Moment
from tiepolicy._conflict import Resolution as Resolution
from tiepolicy._conflict import Way as Way
from tiepolicy._conflict import settle as settle
from tiepolicy._display import format_bytes as format_bytes
from tiepolicy._evidence import View as View
from tiepolicy._external import ExternalTie as ExternalTie
from tiepolicy._external import Owners as Owners
from tiepolicy._external import take as take
from tiepolicy._facts import TensorFact as TensorFact
from tiepolicy._facts import TensorSpec as TensorSpec
from tiepolicy._groups import Alias as Alias
from tiepolicy._groups import Companion as Companion
from tiepolicy._groups import RefusedClaim as RefusedClaim
from tiepolicy._groups import TieGroup as TieGroup
from tiepolicy._observe import Facts as Facts
from tiepolicy._observe import TensorSource
from tiepolicy._observe import named_modules as named_modules
from tiepolicy._observe import observe as observe
from tiepolicy._plan import TiePlan as TiePlan
from tiepolicy._plugins import Plugin as Plugin
from tiepolicy._policy import Policy as Policy
from tiepolicy._policy import default_policy
from tiepolicy._reconcile import Action as Action
from tiepolicy._reconcile import ActionKind as ActionKind
from tiepolicy._reconcile import reconcile as reconcile
from tiepolicy._retie import Keep as Keep
from tiepolicy._values import content_digest as content_digest
from tiepolicy._values import first_difference as first_difference
from tiepolicy._values import view_of as view_of
from tiepolicy.hookspecs import hookimpl as hookimpl


def plan(source: TensorSource, *, external: Owners | None = None, digests: bool = False) -> TiePlan:
    """Decide which names of a module, or of a mapping of tensors, are one tensor.

    Uses the built-in rules and every installed plugin; `Policy` makes the same decision with plugins of your choice.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"embed": nn.Embedding(6, 2), "head": nn.Linear(2, 6, bias=False)})
        >>> model["head"].weight = model["embed"].weight
        >>> print(plan(model))
        2 tensors, 1 tied group (48 B saved), 0 claims refused
        <BLANKLINE>
        stored        also named   shape   dtype    saved  because
        embed.weight  head.weight  (6, 2)  float32  48 B   same-object

    Args:
        source: A module, or a mapping of tensors.
        external: Other models, by the names to know them under: `plan(draft, external={"target": model})` recognises
            the tensors of the draft that are the target's.
        digests: Whether to read those tensors and record their digests, so that `TiePlan.compact` may leave them out.

    Returns:
        The plan, which keeps none of the tensors.

    Raises:
        ObservationError: If the source holds something that is no named tensor.
        PluginError: If a plugin raises or answers with a wrong type.
        UnsafeVerdictError: If a plugin calls names one tensor that are not.
    """
    return default_policy().plan(source, external=external, digests=digests)


def tie(model: nn.Module, *, keep: Keep | None = None) -> TiePlan:
    """Make the ties of a model real that are declared and possible but not there; changes the module.

    Call it where a model is built: before it is sharded, and before its optimizer is made.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"embed": nn.Embedding(6, 2), "head": nn.Linear(2, 6, bias=False)})
        >>> model.config = type("Config", (), {"tie_word_embeddings": True})
        >>> model.get_input_embeddings = lambda: model["embed"]
        >>> model.get_output_embeddings = lambda: model["head"]
        >>> tied = tie(model, keep="canonical")
        >>> model["head"].weight is model["embed"].weight, tied.canonical("head.weight")
        (True, 'embed.weight')

    Args:
        model: The module to change.
        keep: "canonical" to give all names of a tie the value of the one that is stored. By default equal values need
            no choice, and different ones are an error.

    Returns:
        The plan of the model as it is now.

    Raises:
        TieConflictError: If values differ and nobody says which to keep. Nothing was changed then.
    """
    return default_policy().tie(model, keep=keep)
