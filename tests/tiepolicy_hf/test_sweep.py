"""Every class of transformers that can be built small comes back as it was saved: values, ties and outputs."""

import pytest
from transformers.utils import logging

from hf_sweep import built_classes, sweep, table
from hf_zoo import MAPPINGS, entries

# A plain tie, one of other module names, one of four names, one of three, fused experts whose names change on disk,
# no attention, and two that see: one whose checkpoints keep an older layout, one with a flag in each part of a config.
USUAL = {
    # A head that two embeddings could fill, of which one is bound to it.
    "EncoderDecoderModel",
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "MixtralForCausalLM",
    "MambaForCausalLM",
    "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
}

#: Kinds of classes that take about as long as the others, for two cores, and how many of them are built at least.
HALVES = {("causal",): 120, ("seq2seq", "vision-language"): 70}


@pytest.fixture(autouse=True)
def quiet():
    """Transformers reports each weight that a class leaves out; a sweep reports in a table."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def test_usual_models_come_back_tied_untied_and_with_a_small_head():
    rows = sweep([entry for entry in entries() if entry.name in USUAL])
    # Before transformers 5.23, the config of an encoder and a decoder cannot be made without those of the two.
    unbuilt = {row.entry.name for row in rows if "sub-configurations are passed" in row.reason}
    assert unbuilt <= {"EncoderDecoderModel"}
    assert USUAL == built_classes(rows) | unbuilt
    fine = ("passed", "no head", *(["not built"] if unbuilt else []))
    assert [] == [row for row in rows if row.outcome not in fine], table(rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kinds", "least"), HALVES.items())
def test_every_class_of_the_auto_mappings_that_can_be_built_small_comes_back(kinds, least):
    """`pytest -s` shows the table."""
    rows = sweep([entry for entry in entries() if entry.kind in kinds])
    print(f"\n{table(rows)}")
    assert [] == [row for row in rows if row.outcome == "differs"], table(rows)
    assert least <= len(built_classes(rows))


def test_the_halves_of_the_sweep_are_all_of_it():
    assert set(MAPPINGS) == {kind for kinds in HALVES for kind in kinds}
    assert 150 <= sum(HALVES.values())
