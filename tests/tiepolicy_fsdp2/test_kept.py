"""The plan that stays with a model: what was one tensor is known after every later step."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import tiepolicy
from models import HeadFirst, TiedPair, tiny_llama
from tiepolicy.errors import BrokenTieError, MissingTensorError, TieConflictError
from tiepolicy_fsdp2 import ShardingError, keep_plan, kept_plan, retie, verified, verify

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def watched(**options):
    model = TiedPair(**options)
    keep_plan(model)
    return model


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def test_the_plan_is_found_through_wrappers_and_goes_into_copies():
    model = watched()
    assert kept_plan(model) is kept_plan(torch.compile(model)) is kept_plan(checkpoint_wrapper(model))
    assert kept_plan(model) == kept_plan(copy.deepcopy(model))
    assert kept_plan(model.lm_head) is None


def test_the_plan_is_in_no_state_dict():
    assert [EMBED, HEAD] == list(watched().state_dict())


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_wrapping_a_model_or_a_part_keeps_the_tie(wrap):
    model = watched()
    verify(wrap(model), step="wrapping")
    model.lm_head = wrap(model.lm_head)
    verify(model, step="wrapping the head")
    assert model.lm_head.weight is model.embed_tokens.weight


STEPS = {
    "to_empty()": lambda model: model.to_empty(device="cpu"),
    "to('meta')": lambda model: model.to("meta"),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(model.state_dict(), assign=True),
    "loading copies": lambda model: model.load_state_dict(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True
    ),
}


@pytest.mark.survey("T37")
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_unties_is_named_with_the_pair_and_undone(step):
    """`to_empty()` is the row of the survey: torch gives each name memory of its own."""
    with torch.device("meta" if step == "to_empty()" else "cpu"):
        model = watched()
    with (
        pytest.raises(BrokenTieError, match=f"{HEAD} and {EMBED} .*(before|after) ") as caught,
        verified(model, step=step),
    ):
        STEPS[step](model)
    assert (HEAD, EMBED) == caught.value.names
    assert step in str(caught.value)
    assert model.lm_head.weight is not model.embed_tokens.weight
    retie(model, keep="canonical")
    assert model.lm_head.weight is model.embed_tokens.weight
    verify(model)


def test_steps_that_keep_the_tie_pass():
    model = watched()
    for step, change in {"to(float64)": lambda: model.to(torch.float64), "half()": model.half}.items():
        with verified(model, step=step) as plan:
            change()
        assert [(EMBED, HEAD)] == [group.names for group in plan.groups]


def test_a_block_that_fails_shows_its_own_error():
    model = watched()

    def fail():
        with verified(model, step="nothing"):
            untied(model)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()


@pytest.mark.survey("T72")
def test_a_lost_tie_is_told_from_a_healthy_one_after_a_load_that_is_not_strict():
    """Both report the same missing key."""
    healthy = watched()
    with torch.device("meta"):
        lost = watched()
    lost.to_empty(device="cpu")
    stored = {EMBED: torch.ones(12, 4)}
    assert [HEAD] == lost.load_state_dict(stored, strict=False).missing_keys
    assert [HEAD] == healthy.load_state_dict(stored, strict=False).missing_keys
    verify(healthy, step="loading")
    with pytest.raises(BrokenTieError, match="before loading"):
        verify(lost, step="loading")


def test_values_that_differ_are_not_tied_again_without_a_choice():
    model = untied(watched())
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(TieConflictError, match="first at"):
        retie(model)
    assert model.lm_head.weight is not model.embed_tokens.weight


@pytest.mark.survey("T47")
def test_two_parameters_over_one_memory_are_no_tie_for_an_optimizer():
    """Each would be stepped, and decayed, for itself."""
    model = TiedPair(tied=False)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data)
    nn.init.ones_(model.embed_tokens.weight)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1).step()
    assert 0.95**2 == pytest.approx(model.embed_tokens.weight[0, 0].item())
    keep_plan(model)
    with pytest.raises(BrokenTieError, match="share memory but are two parameters: FSDP2 would give each a shard"):
        verify(model)
    retie(model)
    model.embed_tokens.weight.grad = torch.zeros_like(model.embed_tokens.weight)
    before = model.embed_tokens.weight[0, 0].item()
    torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1).step()
    assert 0.95 * before == pytest.approx(model.lm_head.weight[0, 0].item())


@pytest.mark.survey("T48")
def test_an_optimizer_that_holds_a_tied_parameter_twice_is_refused():
    model = watched()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        doubled = torch.optim.SGD([model.embed_tokens.weight, model.lm_head.weight], lr=0.5)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = model.lm_head.weight[0, 0].item()
    doubled.step()
    assert before - 1.0 == pytest.approx(model.lm_head.weight[0, 0].item())  # two steps of 0.5
    with pytest.raises(BrokenTieError, match=f"the optimizer holds {EMBED} and {HEAD} twice"):
        verify(model, optimizer=doubled)
    verify(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5))


@pytest.mark.survey("T49")
@pytest.mark.parametrize(("model", "first"), [(TiedPair, EMBED), (HeadFirst, HEAD)])
def test_groups_of_an_optimizer_by_canonical_name_do_not_depend_on_the_order_of_registration(model, first):
    """PyTorch names a tied parameter after whichever module came first, and so decays it or not."""
    model = model()
    plan = keep_plan(model)
    assert [first] == [name for name, _ in model.named_parameters()]
    assert [EMBED] == [plan.canonical(name) for name, _ in model.named_parameters()]


def test_a_model_without_a_plan_says_what_to_do():
    with pytest.raises(ShardingError, match="nobody kept a plan with this TiedPair.*call keep_plan"):
        verify(TiedPair())


def test_a_tied_name_that_is_gone_is_missed():
    model = watched()
    del model.lm_head
    with pytest.raises(MissingTensorError, match=HEAD):
        verify(model)


def test_a_plan_made_by_another_policy_can_be_kept():
    model = TiedPair()
    plan = tiepolicy.Policy().plan(model)
    assert keep_plan(model, plan=plan) is plan is kept_plan(model)


def test_a_transformers_model_is_followed_through_a_compile():
    model = tiny_llama(tie_word_embeddings=True)
    keep_plan(model)
    compiled = torch.compile(model)
    verify(compiled, step="torch.compile")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(BrokenTieError, match="were one tensor before tie surgery"):
        verify(compiled, step="tie surgery")
