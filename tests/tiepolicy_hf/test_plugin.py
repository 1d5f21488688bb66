"""What transformers models declare becomes claims."""

import pytest
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import tiepolicy
from models import FlaggedPair, TiedPair, tiny_llama
from tiepolicy import Policy, Reason
from tiepolicy_hf import _plugin


def test_the_default_policy_finds_the_plugin_by_its_entry_point():
    model = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=8, hidden_size=4)
    assert (1, 0) == (len(tiepolicy.plan(model).refused), len(Policy().plan(model).refused))


def test_a_tied_llama_stores_the_embedding_that_its_class_derives_the_head_from():
    plan = tiepolicy.plan(tiny_llama(tie_word_embeddings=True))
    assert [("model.embed_tokens.weight", "lm_head.weight")] == [group.names for group in plan.groups]
    assert () == plan.refused


def test_an_untied_llama_claims_nothing():
    plan = tiepolicy.plan(tiny_llama(tie_word_embeddings=False))
    assert ((), ()) == (plan.groups, plan.refused)


def test_a_llama_whose_head_was_replaced_keeps_it_and_says_why():
    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head = nn.Linear(16, 32, bias=False)
    expected = (
        "lm_head.weight (32, 16) and model.embed_tokens.weight (96, 16) cannot be one tensor: shapes differ; "
        "claimed by config.tie_word_embeddings and LlamaForCausalLM._tied_weights_keys"
    )
    plan = tiepolicy.plan(model)
    assert ((), [expected]) == (plan.groups, [str(refusal) for refusal in plan.refused])


def test_an_encoder_decoder_is_one_group_under_its_shared_name():
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, tie_word_embeddings=True)
    plan = tiepolicy.plan(T5ForConditionalGeneration(config))
    expected = ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight")
    assert [expected] == [group.names for group in plan.groups]


def test_a_list_of_declared_aliases_means_aliases_of_the_input_embedding():
    """The form before transformers 5."""
    model = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=12, hidden_size=4)
    model._tied_weights_keys = ["lm_head.weight"]
    refused = Policy(plugins=[_plugin]).plan(model).refused
    assert [("embed_tokens.weight", "lm_head.weight")] == [refusal.claim.names for refusal in refused]


def test_a_declared_name_is_matched_in_full():
    """`re.search` would tie every name that contains the declared one."""
    model = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=12, hidden_size=4)
    model.extra_lm_head = nn.Linear(4, 12, bias=False)
    model._tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    refused = Policy(plugins=[_plugin]).plan(model).refused
    assert [("embed_tokens.weight", "lm_head.weight")] == [refusal.claim.names for refusal in refused]


@pytest.mark.parametrize("where", ["first", "second"])
def test_a_flagged_submodel_claims_within_itself(where):
    model = nn.ModuleDict({"first": TiedPair(tied=False), "second": TiedPair(tied=False)})
    model[where] = FlaggedPair(flag=True, vocab_size=12, draft_vocab_size=8, hidden_size=4)
    expected = (f"{where}.embed_tokens.weight", f"{where}.lm_head.weight")
    refused = Policy(plugins=[_plugin]).plan(model).refused
    assert [(expected, Reason.SHAPE_MISMATCH)] == [(r.claim.names, r.verdict.reason) for r in refused]


def test_the_flag_of_a_text_config_counts():
    model = FlaggedPair(flag=False, vocab_size=12, draft_vocab_size=8, hidden_size=4)
    model.config.text_config = type(model.config)(tie_word_embeddings=True)
    refused = Policy(plugins=[_plugin]).plan(model).refused
    assert ["config.text_config.tie_word_embeddings"] == [refusal.claim.detail for refusal in refused]
