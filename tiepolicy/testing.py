"""Step 32, for authors of plugins: models to test with, and a check of the laws. Needs `tiepolicy[testing]`.

from tiepolicy.testing import check_plugin

def test_the_plugin_keeps_the_laws():
    check_plugin(my_plugin)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from tiepolicy._claims import Claim, Source
from tiepolicy._laws import LAWS, Trial, tensors_of
from tiepolicy._observe import TensorSource
from tiepolicy.errors import BrokenLawError as BrokenLawError

try:
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("tiepolicy.testing needs hypothesis: pip install 'tiepolicy[testing]'") from error

#: Sizes of real vocabularies and of the drafts made for them.
FIELD_VOCAB_SIZES = [8192, 32000, 50257, 128256, 151936, 262144]


class Config:
    """A config with the one flag that claims, `tie_word_embeddings`."""

    def __init__(self, *, tie_word_embeddings: bool) -> None:
        self.tie_word_embeddings = tie_word_embeddings


class FlaggedPair(nn.Module):
    """An embedding and a head with a flag that says whether they are tied, and a tie that is there or is not.

    Args:
        flag: `config.tie_word_embeddings`.
        vocab_size: Rows of `embed_tokens.weight`.
        draft_vocab_size: Rows of `lm_head.weight`; equal to `vocab_size` if `tied`.
        hidden_size: Columns of both.
        tied: Whether the two are one parameter.
    """

    def __init__(
        self, *, flag: bool, vocab_size: int, draft_vocab_size: int, hidden_size: int, tied: bool = False
    ) -> None:
        super().__init__()
        self.config = Config(tie_word_embeddings=flag)
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.lm_head = nn.Linear(hidden_size, draft_vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head


class FusedProjections(nn.Module):
    """One fused weight (3 * `hidden_size`, `hidden_size`), and its thirds as buffers that share its memory."""

    def __init__(self, *, hidden_size: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        for part, name in zip(self.qkv.weight.data.chunk(3), "qkv", strict=True):
            self.register_buffer(f"{name}_weight", part)


def vocab_sizes() -> st.SearchStrategy[int]:
    """Any vocabulary size a model may have; only for tensors without data."""
    return st.integers(1, 300_000) | st.sampled_from(FIELD_VOCAB_SIZES)


def small_sizes() -> st.SearchStrategy[int]:
    """A size small enough for tensors with data, 1 included."""
    return st.integers(1, 9)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """A type that weights are stored in."""
    return st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def tied_models(draw: st.DrawFn) -> nn.Module:
    """An embedding and a head that are one parameter, under either flag."""
    vocab_size = draw(small_sizes())
    return FlaggedPair(
        flag=draw(st.booleans()),
        vocab_size=vocab_size,
        draft_vocab_size=vocab_size,
        hidden_size=draw(small_sizes()),
        tied=True,
    )


@st.composite
def untied_models(draw: st.DrawFn) -> nn.Module:
    """The same with two parameters of one shape, and the flag off."""
    vocab_size = draw(small_sizes())
    return FlaggedPair(flag=False, vocab_size=vocab_size, draft_vocab_size=vocab_size, hidden_size=draw(small_sizes()))


@st.composite
def flagged_models(draw: st.DrawFn, *, sizes: st.SearchStrategy[int] | None = None) -> nn.Module:
    """A flag that is on, and shapes of `sizes` that differ: the head of a draft with a vocabulary of its own."""
    first, second = draw(st.lists(sizes or small_sizes(), min_size=2, max_size=2, unique=True))
    return FlaggedPair(flag=True, vocab_size=first, draft_vocab_size=second, hidden_size=draw(small_sizes()))


@st.composite
def view_tied_models(draw: st.DrawFn) -> nn.Module:
    """A fused weight and its parts."""
    return FusedProjections(hidden_size=draw(small_sizes()))


@st.composite
def chain_tied_models(draw: st.DrawFn) -> nn.Module:
    """A sequence of three to five modules with one weight."""
    first = nn.Linear(draw(small_sizes()), draw(small_sizes()), bias=False)
    modules = [first]
    for _ in range(draw(st.integers(2, 4))):
        modules.append(nn.Linear(first.in_features, first.out_features, bias=False))
        modules[-1].weight = first.weight
    return nn.Sequential(*modules)


@st.composite
def nested_models(draw: st.DrawFn) -> nn.Module:
    """A model of models, some of them under two names."""
    parts = draw(st.lists(tied_models() | untied_models() | flagged_models(), min_size=1, max_size=3))
    if draw(st.booleans()):
        parts.append(parts[0])
    return nn.Sequential(*parts) if draw(st.booleans()) else nn.Sequential(nn.Sequential(*parts))


@st.composite
def meta_models(draw: st.DrawFn) -> nn.Module:
    """A model of any vocabulary size without data, tied or untied."""
    with torch.device("meta"):
        vocab_size, tied = draw(vocab_sizes()), draw(st.booleans())
        return FlaggedPair(
            flag=draw(st.booleans()),
            vocab_size=vocab_size,
            draft_vocab_size=vocab_size if tied else draw(vocab_sizes()),
            hidden_size=draw(small_sizes()),
            tied=tied,
        )


@st.composite
def external_models(draw: st.DrawFn) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A draft and the models to plan it with, of which one may own its embedding: `plan(draft, external=owners)`."""
    vocab_size, hidden_size = draw(small_sizes()), draw(small_sizes())
    target = FlaggedPair(
        flag=draw(st.booleans()),
        vocab_size=vocab_size,
        draft_vocab_size=vocab_size,
        hidden_size=hidden_size,
        tied=draw(st.booleans()),
    )
    draft = FlaggedPair(
        flag=draw(st.booleans()), vocab_size=vocab_size, draft_vocab_size=draw(small_sizes()), hidden_size=hidden_size
    )
    if draw(st.booleans()):
        draft.embed_tokens = target.embed_tokens
    return draft, {"target": target}


def models() -> st.SearchStrategy[nn.Module]:
    """All of them, small and simple ones first."""
    return st.one_of(
        untied_models(),
        flagged_models(),
        tied_models(),
        chain_tied_models(),
        view_tied_models(),
        nested_models(),
        meta_models(),
    )


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A mapping with tensors of their own, doubles, and views of every kind, in any order of names."""
    tensors: list[torch.Tensor] = []
    for _ in range(draw(st.integers(1, 3))):
        rows, columns = draw(small_sizes()), draw(small_sizes())
        base = torch.randn(rows, columns, dtype=draw(dtypes()))
        tensors.append(base)
        start = draw(st.integers(0, rows - 1))
        stop = draw(st.integers(start, rows))
        views = [base, base.detach(), base.t(), base[start:stop], base[:, : (columns + 1) // 2], base.view(-1)[start:]]
        tensors += draw(st.lists(st.sampled_from(views), max_size=4))
    names = draw(st.permutations([f"layer{index}.weight" for index in range(len(tensors))]))
    return dict(zip(names, tensors, strict=True))


@st.composite
def claims(draw: st.DrawFn, *, names: Sequence[str]) -> Claim:
    """A claim from any source about two or more of some `names` and one that may be absent."""
    candidates = [*sorted(names), "absent.weight"]
    chosen = draw(st.lists(st.sampled_from(candidates), min_size=2, max_size=4, unique=True))
    return Claim(tuple(chosen), draw(st.sampled_from(list(Source))), draw(st.sampled_from(["", "config.flag"])))


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
    broken: list[tuple[Trial, str]] = []

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
        problem = _problem(trial, check)
        if problem is not None:
            broken.append((trial, problem))
            raise BrokenLawError(problem, law=law)

    try:
        keeps_the_law()
    except Exception:
        # Hypothesis repeats the smallest failure last; a plugin that answers by chance may keep the law by then.
        if not broken:
            raise
    if broken:
        name = getattr(plugin, "__name__", None) or type(plugin).__name__
        smallest = _tell(*_without_idle_claims(*min(reversed(broken), key=_size), check))
        raise BrokenLawError(f"the plugin {name} breaks the law that {law}: {smallest}", law=law) from None


def _problem(trial: Trial, check: Callable[[Trial], str | None]) -> str | None:
    try:
        return check(trial)
    except Exception as error:  # noqa: BLE001,RUF100 - whatever a plugin raises is its answer
        return f"a hook raised {type(error).__name__}: {error}"


def _size(found: tuple[Trial, str]) -> tuple[int, int]:
    trial = found[0]
    return sum(tensor.numel() for tensor in tensors_of(trial.source).values()), len(trial.claims)


def _without_idle_claims(trial: Trial, problem: str, check: Callable[[Trial], str | None]) -> tuple[Trial, str]:
    """As few claims as still break the law: not every release of Hypothesis finds them."""
    for index in range(len(trial.claims)):
        fewer = replace(trial, claims=trial.claims[:index] + trial.claims[index + 1 :])
        found = _problem(fewer, check)
        if found is not None:
            return _without_idle_claims(fewer, found, check)
    return trial, problem


@st.composite
def _trials(draw: st.DrawFn, plugin: object, own: st.SearchStrategy[nn.Module] | None) -> Trial:
    alone: list[st.SearchStrategy[TensorSource]] = [models(), state_dicts()]
    sources = [case.map(lambda source: (source, None)) for case in ([own] if own is not None else []) + alone]
    source, external = draw(st.one_of(*sources, external_models()))
    names = sorted(tensors_of(source))
    any_claim = claims(names=names)
    if len(names) > 1:  # few of any claims are those of a wrong flag
        any_claim |= st.just(Claim(tuple(names[:4]), Source.DECLARED))
    drawn = draw(st.lists(any_claim, max_size=3))
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
