"""Ranks shard, materialise, load and train tied models, under torchrun with gloo; the reference is one process.

A test whose name says `today` pins what torch alone does; when it fails, torch was fixed.
"""

from pathlib import Path

import pytest
import torch
from tower import ROWS, Tower, digests

import tiepolicy_dcp
import tiepolicy_fsdp2
from models import TiedPair
from torchrun import results_of

RANKS = Path(__file__).with_name("sharded.py")
pytestmark = pytest.mark.dist

TODAY = [
    *("today_two_groups", "today_one_in_the_root", "today_one_group", "today_to_empty", "today_load_full_from_meta"),
    *("today_tied_by_data", "today_tensor_parallel", "today_copies_under_ddp"),
]
TRAINED = [
    *("shard_every_module", "shard_nested", "shard_with_one_in_the_root", "shard_checkpointed", "shard_tied_by_data"),
    *("load_full_from_meta", "materialize", "tensor_parallel", "verify_under_ddp"),
]
REFUSED = [
    *("tensor_parallel_cut_differently", "other_ties_on_a_rank", "other_blocks_on_a_rank", "bad_block_on_a_rank"),
    *("sharded_twice", "optimizer_built_too_early", "shard_and_ignore"),
]
ON_A_GRID = ["hybrid", "tensor_parallel_and_sharded", "materialize_on_a_grid"]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    cases = [*TODAY, *TRAINED, *REFUSED, "save_trained", "save_tensor_parallel"]
    return results_of(RANKS, folder, cases, num_processes=2) | {"folder": folder}


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    cases = [*TRAINED, *ON_A_GRID, "save_trained", "save_hybrid"]
    return results_of(RANKS, folder, cases, num_processes=4) | {"folder": folder}


def check_trained(result):
    """One parameter, one gradient and one optimizer state, the same as in one process."""
    assert {"names": True, "num_states": True} == {key: result[key] for key in ("names", "num_states")}
    assert 1e-12 > max(result[key] for key in ("gradients", "weights", "states"))


def loaded_alone(folder, device="cpu", make=Tower):
    """The digests of a checkpoint in a model of this process, which gets its memory only then."""
    with torch.device("meta"):
        model = make()
    tiepolicy_fsdp2.materialize(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    tiepolicy_dcp.load(folder, model=model, optimizer=optimizer)
    tiepolicy_fsdp2.verify(model, step="load", optimizer=optimizer)
    return digests(model, optimizer)


# What torch does alone

#: At the first forward; torch 2.11 says nothing, and trains two tensors.
NOTICED = "is shared with a parameter already managed by another FSDP group"


@pytest.mark.survey("T26", "T28")
def test_today_tied_modules_in_two_groups_are_saved_and_optimized_apart_until_the_first_forward(on_two):
    result = on_two["today_two_groups"]
    assert (2, "", False) == (result["held"], result["saved"], result["reached"])
    assert (torch.__version__ >= "2.12") == (NOTICED in result["forward"])


@pytest.mark.survey("T27")
def test_today_a_tied_module_in_the_models_group_is_no_better(on_two):
    result = on_two["today_one_in_the_root"]
    assert 2 == result["held"]
    assert (torch.__version__ >= "2.12") == (NOTICED in result["forward"])


@pytest.mark.survey("T29")
def test_today_one_group_keeps_the_tie_and_its_gathered_state_has_two_copies(on_two):
    result = on_two["today_one_group"]
    both = ["embed_tokens.weight", "lm_head.weight"]
    assert (True, both, False) == (result["tied"], result["names"], result["aliased"])
    assert both[:1] == result["compacted"]


@pytest.mark.survey("T30")
def test_today_to_empty_keeps_a_sharded_tie(on_two):
    assert on_two["today_to_empty"]["tied"]


@pytest.mark.survey("T31")
def test_today_loading_a_full_state_from_meta_unties_and_the_optimizer_holds_an_orphan(on_two):
    result = on_two["today_load_full_from_meta"]
    assert (True, 2, "KeyError: 1") == (result["untied"], result["held"], result["state"])


@pytest.mark.survey("T32")
def test_today_a_tie_through_data_becomes_two_shards_that_drift(on_two):
    assert on_two["today_tied_by_data"]["drift"]


@pytest.mark.survey("T34")
def test_today_tensor_parallelism_unties_and_the_copies_drift(on_two):
    assert {"untied": True, "drift": True} == {key: on_two["today_tensor_parallel"][key] for key in ("untied", "drift")}


@pytest.mark.survey("T25")
def test_today_copies_drift_under_ddp(on_two):
    assert on_two["today_copies_under_ddp"]["drift"]


# What becomes of it here


@pytest.mark.parametrize("case", TRAINED)
def test_two_ranks_train_a_tied_model_as_one_process_does(on_two, case):
    check_trained(on_two[case])
    assert on_two[case].get("tied", True)


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINED)
def test_four_ranks_train_a_tied_model_as_one_process_does(on_four, case):
    check_trained(on_four[case])
    assert on_four[case].get("tied", True)


@pytest.mark.slow
def test_a_compiled_model_trains_as_one_process_does(tmp_path):
    """By inductor, before sharding and after."""
    for result in results_of(RANKS, tmp_path, ["shard_and_compile", "compile_and_shard"], num_processes=2).values():
        check_trained(result)
        assert (True, True) == (result["tied"], result["graphs"] > 0)


@pytest.mark.slow
def test_replicas_of_shards_train_as_one_process_does(on_four):
    check_trained(on_four["hybrid"])


@pytest.mark.slow
def test_tensor_parallel_shards_train_as_one_process_does(on_four):
    result = on_four["tensor_parallel_and_sharded"]
    assert (True, True) == (result["tied"], result["num_states"])
    assert 1e-12 > result["weights"]


@pytest.mark.slow
def test_a_grid_starts_with_the_values_of_one_process(on_four):
    assert (True, True) == (on_four["materialize_on_a_grid"]["same"], on_four["materialize_on_a_grid"]["tied"])


def test_one_process_loads_what_shards_saved_bit_for_bit(on_two):
    assert on_two["save_trained"]["saved"] == loaded_alone(on_two["folder"] / "trained")


def test_one_process_loads_what_tensor_parallel_ranks_saved_bit_for_bit(on_two):
    loaded = loaded_alone(on_two["folder"] / "parallel", make=lambda: TiedPair(vocab_size=ROWS).double())
    assert on_two["save_tensor_parallel"]["saved"] == loaded


@pytest.mark.slow
def test_one_process_loads_what_replicas_of_shards_saved_bit_for_bit(on_four):
    assert on_four["save_hybrid"]["saved"] == loaded_alone(on_four["folder"] / "hybrid")


@pytest.mark.slow
@pytest.mark.parametrize(("saved_on", "num_processes"), [("on_two", 4), ("on_four", 2)])
def test_other_numbers_of_ranks_load_it_into_meta_and_real_models_bit_for_bit(saved_on, num_processes, request):
    saved = request.getfixturevalue(saved_on)
    loaded = results_of(RANKS, saved["folder"], ["load_trained"], num_processes=num_processes)["load_trained"]
    assert [saved["save_trained"]["saved"]] * 2 == loaded["loaded"]
    assert loaded["tied"]


def test_materialised_weights_are_those_of_one_process(on_two):
    assert on_two["materialize"]["same"]


def test_a_tie_through_data_is_one_parameter_before_it_is_sharded(on_two):
    assert (True, 1) == (on_two["shard_tied_by_data"]["tied"], on_two["shard_tied_by_data"]["held"])


def test_ignored_parameters_stay_ignored_when_they_become_one(on_two):
    result = on_two["shard_and_ignore"]
    assert (True, False) == (result["tied"], result["sharded"])


def test_what_a_full_load_untied_is_named_with_the_step_and_tied_again(on_two):
    result = on_two["load_full_from_meta"]
    assert result["found"].startswith(
        "BrokenTieError: lm_head.weight and embed_tokens.weight were one tensor before set_model_state_dict"
    )
    assert (True, ["embed_tokens.weight"]) == (result["tied"], result["states_named"])


def test_an_optimizer_that_was_built_before_the_weights_is_found(on_two):
    found = on_two["optimizer_built_too_early"]["found"]
    assert found.startswith(
        "BrokenTieError: the optimizer holds a parameter (13, 4) in group 0 that is not in the model"
    )


def test_a_tie_that_is_lost_under_ddp_is_named_with_the_step(on_two):
    assert "were one tensor before surgery and no longer are" in on_two["verify_under_ddp"]["found"]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (
            "tensor_parallel_cut_differently",
            "ShardingError: embed_tokens.weight and lm_head.weight are one tensor, but the plan cuts them differently",
        ),
        ("other_ties_on_a_rank", "PlanMismatchError: rank 0 and rank 1 decided differently what is one tensor"),
        ("other_blocks_on_a_rank", "PlanMismatchError: rank 0 and rank 1 decided differently what is one tensor"),
        ("bad_block_on_a_rank", "ShardingError: the block 'nowhere' is no module of Tower"),
        ("sharded_twice", "ShardingError: a FSDPLinear in the TiedPair is sharded already"),
    ],
)
def test_what_cannot_be_sharded_is_refused_on_every_rank_with_one_sentence(on_two, case, sentence):
    assert on_two[case]["agreed"]
    assert on_two[case]["error"].startswith(sentence)


def test_a_rank_with_other_ties_stops_all_before_anything_is_sharded(on_two):
    assert not on_two["other_ties_on_a_rank"]["sharded"]
