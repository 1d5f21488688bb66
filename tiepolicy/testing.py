"""Step 39, for authors of plugins: models to test with, and a check of the laws. Needs `tiepolicy[testing]`.

from tiepolicy.testing import check_plugin

def test_the_plugin_keeps_the_laws():
    check_plugin(my_plugin)
"""

from collections.abc import Callable, Mapping

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from torch import nn

from tiepolicy._cases import FIELD_VOCAB_SIZES as FIELD_VOCAB_SIZES
from tiepolicy._cases import Config as Config
from tiepolicy._cases import FlaggedPair as FlaggedPair
from tiepolicy._cases import chain_tied_models as chain_tied_models
from tiepolicy._cases import claims as claims
from tiepolicy._cases import dtypes as dtypes
from tiepolicy._cases import external_models as external_models
from tiepolicy._cases import flagged_models as flagged_models
from tiepolicy._cases import meta_models as meta_models
from tiepolicy._cases import models as models
from tiepolicy._cases import nested_models as nested_models
from tiepolicy._cases import small_sizes as small_sizes
from tiepolicy._cases import state_dicts as state_dicts
from tiepolicy._cases import tensors_of
from tiepolicy._cases import tied_models as tied_models
from tiepolicy._cases import untied_models as untied_models
from tiepolicy._cases import view_tied_models as view_tied_models
from tiepolicy._cases import vocab_sizes as vocab_sizes
from tiepolicy._laws import LAWS, Trial
from tiepolicy.errors import BrokenLawError as BrokenLawError


def check_plugin(
    plugin: object,
    *,
    models: st.SearchStrategy[nn.Module] | None = None,
    max_examples: int = 50,
) -> None:
    """Run every law against a plugin, on models of all kinds and on claims that others make about them.

    The same examples are tried each time.

    Args:
        plugin: An object or module with hooks.
        models: Models of the plugin's own framework, tried beside those of this module. Without them a plugin that
            looks for attributes of its framework is not asked for much.
        max_examples: How many models to try for each law.

    Raises:
        BrokenLawError: For the first law that the plugin breaks, with the smallest model that was found to break it.
    """
    for law, check in LAWS:
        _check_law(plugin, law, check, models=models, max_examples=max_examples)


def _check_law(
    plugin: object,
    law: str,
    check: Callable[[Trial], str | None],
    *,
    models: st.SearchStrategy[nn.Module] | None,
    max_examples: int,
) -> None:
    broken: list[tuple[int, str]] = []

    @settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
        verbosity=Verbosity.quiet,
    )
    @given(_trials(plugin, models))
    def keeps_the_law(trial: Trial) -> None:
        try:
            problem = check(trial)
        except Exception as error:  # noqa: BLE001,RUF100 - whatever a plugin raises is its answer
            problem = f"a hook raised {type(error).__name__}: {error}"
        if problem is not None:
            broken.append((sum(tensor.numel() for tensor in tensors_of(trial.source).values()), _tell(trial, problem)))
            raise BrokenLawError(problem, law=law)

    try:
        keeps_the_law()
    except Exception:
        # Hypothesis repeats the smallest failure last; a plugin that answers by chance may keep the law by then.
        if not broken:
            raise
    if broken:
        name = getattr(plugin, "__name__", None) or type(plugin).__name__
        smallest = min(reversed(broken), key=lambda found: found[0])[1]
        raise BrokenLawError(f"the plugin {name} breaks the law that {law}: {smallest}", law=law) from None


@st.composite
def _trials(draw: st.DrawFn, plugin: object, own: st.SearchStrategy[nn.Module] | None) -> Trial:
    alone: list[st.SearchStrategy[nn.Module | Mapping[str, torch.Tensor]]] = [models(), state_dicts()]
    sources = [case.map(lambda source: (source, None)) for case in ([own] if own is not None else []) + alone]
    source, external = draw(st.one_of(*sources, external_models()))
    names = sorted(tensors_of(source))
    drawn = draw(st.lists(claims(names=names), max_size=3))
    return Trial(plugin=plugin, source=source, claims=tuple(drawn), external=external)


def _tell(trial: Trial, problem: str) -> str:
    """The problem and the model, for a person."""
    lines = [f"  {name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors_of(trial.source).items()]
    kind = type(trial.source).__name__ if isinstance(trial.source, nn.Module) else "a mapping"
    claimed = [f"  {' and '.join(claim.names)} ({claim.detail or claim.source})" for claim in trial.claims]
    parts = [f"{problem}", f"the smallest model found is {kind}:", *lines]
    if trial.external is not None:
        parts.append(f"planned with the model {' and '.join(trial.external)}, which may own some of these")
    return "\n".join([*parts, *(["with the claims of others:", *claimed] if claimed else [])])
