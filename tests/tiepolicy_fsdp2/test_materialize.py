"""Memory for models from the meta device: ties stay, every tensor gets its first value once, and none is forgotten."""

import pytest
import torch
from hypothesis import given
from torch import nn

from models import HeadFirst, TiedPair, tiny_llama
from strategies import tied_modules
from tiepolicy.errors import MissingTensorError
from tiepolicy_fsdp2 import keep_plan, materialize, verify

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def on_meta(build, **options):
    with torch.device("meta"):
        return build(**options)


def reset(module):
    module.reset_parameters()


def test_a_tie_survives_and_is_initialised_once_by_the_module_of_its_canonical_name():
    """The head's own initialisation is another one; it works on scratch memory."""
    model = on_meta(TiedPair, vocab_size=64, hidden_size=16)
    torch.manual_seed(0)
    materialize(model, "cpu", init=reset)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert 1.0 == pytest.approx(model.lm_head.weight.std().item(), abs=0.1)  # an Embedding's; a Linear's is 0.14


@pytest.mark.parametrize("model", [TiedPair, HeadFirst])
def test_the_order_of_registration_does_not_decide_who_initialises(model):
    model = on_meta(model)

    def mark(module):
        nn.init.constant_(module.weight, 1.0 if isinstance(module, nn.Embedding) else 2.0)

    materialize(model, "cpu", init=mark)
    assert {1.0} == set(model.lm_head.weight.flatten().tolist())


def test_each_module_is_asked_once_and_only_if_it_has_something_to_fill():
    model = on_meta(TiedPair)
    model.extra = nn.Linear(2, 2)
    kept = model.extra.weight.detach().clone()
    asked = []

    def init(module):
        asked.append(type(module).__name__)
        reset(module)

    materialize(model, "cpu", init=init)
    assert ["Embedding"] == asked
    assert torch.equal(kept, model.extra.weight)


def test_a_head_with_a_bias_of_its_own_fills_the_bias_only():
    model = on_meta(TiedPair)
    model.lm_head.bias = nn.Parameter(torch.empty(12, device="meta"))

    def init(module):
        for value, parameter in enumerate(module.parameters(recurse=False)):
            nn.init.constant_(parameter, value + (10 if isinstance(module, nn.Linear) else 0))

    materialize(model, "cpu", init=init)
    assert {0.0} == set(model.lm_head.weight.flatten().tolist())
    assert {11.0} == set(model.lm_head.bias.tolist())


def test_what_init_forgets_is_an_error():
    model = on_meta(TiedPair)
    model.register_buffer("inv_freq", torch.empty(3, device="meta"), persistent=False)
    model.register_buffer("count", torch.empty((), dtype=torch.int64, device="meta"))

    def init(module):
        if module is not model:
            reset(module)

    with pytest.raises(MissingTensorError, match="init left count, inv_freq unwritten, wholly or in part"):
        materialize(model, "cpu", init=init)


def test_a_row_that_init_forgets_is_an_error():
    def all_but_a_row(module):
        nn.init.zeros_(module.weight[1:])

    with pytest.raises(MissingTensorError, match=f"init left {EMBED} unwritten"):
        materialize(on_meta(TiedPair), "cpu", init=all_but_a_row)


def test_an_init_that_replaces_or_writes_through_data_is_followed():
    model = on_meta(TiedPair)
    model.norm = nn.LayerNorm(4, device="meta")

    def init(module):
        if isinstance(module, nn.LayerNorm):
            module.weight = nn.Parameter(torch.full((4,), 3.0))
            module.bias.data.zero_()
        else:
            module.weight.data.normal_()

    materialize(model, "cpu", init=init)
    assert [3.0] * 4 == model.norm.weight.tolist()
    assert model.lm_head.weight is model.embed_tokens.weight


def test_without_init_the_memory_cannot_pass_for_weights():
    model = on_meta(TiedPair)
    materialize(model, "cpu")
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.lm_head.weight.isnan().all()


def test_without_init_a_buffer_that_no_checkpoint_holds_is_an_error():
    model = on_meta(TiedPair)
    model.register_buffer("inv_freq", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(MissingTensorError, match="inv_freq had no data and is in no state dict"):
        materialize(model, "cpu")


def test_what_has_data_keeps_it():
    """Plain `to_empty` would throw it away."""
    model = on_meta(TiedPair)
    model.register_buffer("inv_freq", torch.arange(3.0), persistent=False)
    materialize(model, "cpu", init=lambda module: nn.init.zeros_(module.weight) if module is not model else None)
    assert [0.0, 1.0, 2.0] == model.inv_freq.tolist()


def test_shared_buffers_stay_shared_persistent_or_not():
    model = on_meta(TiedPair)
    table = torch.empty(3, device="meta")
    for name, module in model.named_children():
        module.register_buffer("table", table, persistent=False)
        module.register_buffer("kept", table, persistent=name == "lm_head")

    def init(module):
        reset(module)
        nn.init.ones_(module.table)

    materialize(model, "cpu", init=init)
    buffers = [module.get_buffer(name) for module in model.children() for name in ("table", "kept")]
    assert [True] * 4 == [buffer is buffers[0] for buffer in buffers]
    assert [1.0] * 3 == buffers[0].tolist()


@given(tied_modules())
def test_every_tie_of_any_model_survives(model):
    keep_plan(model)
    model.to("meta")
    for parameter in model.parameters():
        assert parameter.is_meta
    materialize(model, "cpu")
    verify(model)


def test_a_transformers_model_is_initialised_by_its_own_rule():
    model = on_meta(tiny_llama, tie_word_embeddings=True)
    materialize(model, "cpu", init=model._init_weights)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(tensor.isnan().any() for tensor in [*model.parameters(), *model.buffers()])
    assert 0.02 == pytest.approx(model.lm_head.weight.std().item(), rel=0.1)
