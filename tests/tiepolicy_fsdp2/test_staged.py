"""Stages of a real pipeline that own one half of a tie each, under torchrun with gloo; the reference is one process.

The model has two ties that cross its two stages: embedding and head, and a map of either layer.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tower import ROWS, Tower
from transformers import AutoModelForCausalLM

import tiepolicy_dcp
from torchrun import results_of

RANKS = Path(__file__).with_name("staged.py")
pytestmark = pytest.mark.dist

SCHEDULES = ["one_forward_one_backward", "all_forward_all_backward"]
OTHERS = [
    *("today_without_sync", "started_apart", "a_half_without_gradient"),
    *("a_stage_is_missing", "converted_apart", "two_halves_on_one_rank"),
    *("save_and_load", "resume", "save_a_drifted_pair", "save_one_stage_twice", "save_a_name_of_two_ranks"),
]
LLAMAS = ["tied_llama", "untied_llama"]
UNFIT_OPTIMIZERS = {
    "save_a_drifted_state": "TieConflictError: embed_tokens.weight on rank 0 and lm_head.weight on rank 1 are one "
    "tensor in the model, and hold different values of it (all of its exp_avg)",
    "save_with_other_hyperparameters": "CheckpointError: lr of parameter group 0 is 1.1 on rank 1, but 0.1 on a rank "
    "before it",
    "save_halves_in_two_groups": "CheckpointError: embed_tokens.weight is in parameter group 0 on one rank, and what "
    "is one tensor with it in group 1 on another",
    "save_halves_of_which_one_is_optimized": "CheckpointError: embed_tokens.weight on rank 0 and lm_head.weight on "
    "rank 1 are one tensor in the model, but sharded or optimized differently: the latter has all of its step, which "
    "the former has not.",
}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    cases = [*SCHEDULES, *OTHERS, *UNFIT_OPTIMIZERS, *LLAMAS]
    return results_of(RANKS, folder, cases, num_processes=2) | {"folder": folder}


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    cases = [*SCHEDULES, "a_stage_for_each_part", "save_and_load", "resume", *LLAMAS]
    return results_of(RANKS, folder, cases, num_processes=4) | {"folder": folder}


def check_synced(result):
    assert ["embed_tokens.weight", "layers.0.up.weight"] == result["shared"]
    assert result["equal"]
    assert 1e-12 > result["weights"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_synced_stages_train_as_one_process_does_and_stay_equal_to_the_bit(on_two, schedule):
    check_synced(on_two[schedule])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_that_are_sharded_train_as_one_process_does(on_four, schedule):
    check_synced(on_four[schedule])


@pytest.mark.slow
def test_stages_with_others_between_them_train_as_one_process_does(on_four):
    result = on_four["a_stage_for_each_part"]
    assert ["embed_tokens.weight", "layers.0.up.weight"] == result["shared"]
    assert 1e-12 > result["weights"]


def test_today_stages_drift_apart_without_a_word_and_are_found_here(on_two):
    result = on_two["today_without_sync"]
    assert result["drift"]
    assert result["agreed"]
    assert result["error"].startswith(
        "TieConflictError: embed_tokens.weight on rank 0 and lm_head.weight on rank 1 are one tensor in the model and "
        "hold different values after training. Call sync_tied_gradients"
    )


def test_stages_save_one_checkpoint_with_each_tie_once_and_load_their_halves_from_it(on_two):
    result = on_two["save_and_load"]
    assert [True] * 3 == [result[key] for key in ("same", "equal", "consolidated")]
    said = "were one tensor when saved; each gets its values"
    assert [
        f"layers.1.up.weight and layers.0.up.weight {said}",
        f"lm_head.weight and embed_tokens.weight {said}",
    ] == result["notes"]


@pytest.mark.slow
def test_stages_that_are_sharded_save_and_load(on_four):
    assert [True] * 3 == [on_four["save_and_load"][key] for key in ("same", "equal", "consolidated")]


def check_resumed(result):
    """Weights and optimizer state loaded into other stages, into the whole model, and from that into stages again."""
    assert [True] * 5 == [result[key] for key in ("loaded", "as_one", "groups", "resumed", "consolidated")]
    assert (
        "lm_head.weight and embed_tokens.weight were one parameter when saved; each gets its state" in result["notes"]
    )


def test_stages_resume_to_the_bit_with_their_optimizers_in_the_same_checkpoint(on_two):
    check_resumed(on_two["resume"])


@pytest.mark.slow
def test_stages_that_are_sharded_resume_to_the_bit(on_four):
    check_resumed(on_four["resume"])


def test_the_optimizer_states_of_stages_lie_on_disk_once_under_every_name_of_the_whole_model(on_two):
    model = Tower()
    optimizer = torch.optim.AdamW(model.parameters())
    named = tiepolicy_dcp.OptimizerState(model, optimizer).state_dict()
    places = dcp.FileSystemReader(on_two["folder"] / "run" / "stopped").read_metadata().storage_data
    records = {
        (place.relative_path, place.offset) for index, place in places.items() if index.fqn.startswith("optimizer.")
    }
    names = {index.fqn.removeprefix("optimizer.") for index in places if index.fqn.startswith("optimizer.")}
    aliases = {
        f"state.{name}.{key}"
        for name in ("lm_head.weight", "layers.1.up.weight")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert {*named, *aliases, "param_groups.1", "param_groups.2"} == names
    assert len(named) + 2 == len(records)


@pytest.mark.parametrize("case", UNFIT_OPTIMIZERS)
def test_optimizers_that_could_not_be_those_of_one_model_are_refused_on_every_rank(on_two, case):
    result = on_two[case]
    assert (True, []) == (result["agreed"], result["written"])
    assert result["error"].startswith(UNFIT_OPTIMIZERS[case])


def test_what_stages_saved_loads_into_the_whole_model_here_and_by_plain_dcp(on_two):
    folder = on_two["folder"] / "joint"
    model = Tower()
    tiepolicy_dcp.load(folder, model=model)
    assert model.lm_head.weight is model.embed_tokens.weight
    plain = {"model": {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}}
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load(plain, checkpoint_id=folder)
    assert [True] * len(plain["model"]) == [
        torch.equal(tensor, plain["model"][name]) for name, tensor in model.state_dict().items()
    ]
    places = dcp.FileSystemReader(folder).read_metadata().storage_data
    records = {(place.relative_path, place.offset) for place in places.values()}
    assert (len(list(model.parameters())), len(plain["model"])) == (len(records), len(places))


def test_a_drifted_pair_is_an_error_at_save_and_never_merged(on_two):
    result = on_two["save_a_drifted_pair"]
    assert (True, []) == (result["agreed"], result["written"])
    assert result["error"].startswith(
        "TieConflictError: embed_tokens.weight on rank 0 and lm_head.weight on rank 1 are one tensor in the model, and "
        "hold different values of it"
    )


def test_what_two_ranks_have_under_one_name_is_compared_and_written_once(on_two):
    result = on_two["save_a_name_of_two_ranks"]
    assert (True, True, []) == (result["consolidated"], result["agreed"], result["written"])
    assert result["error"].startswith(
        "TieConflictError: embed_tokens.weight on rank 0 and embed_tokens.weight on rank 1 are one tensor in the model"
    )


def check_one_file(results, case):
    """The file of the stages, as safetensors and transformers read it, against the stages and one process."""
    folder, tied = results["folder"], case == "tied_llama"
    assert (["model.embed_tokens.weight"] if tied else []) == results[case]["shared"]
    stages, found = load_file(folder / f"{case}_stages.safetensors"), load_file(folder / case / "model.safetensors")
    assert ({"lm_head.weight"} if tied else set()) == stages.keys() ^ found.keys()
    assert [True] * len(found) == [torch.equal(stages[name], tensor) for name, tensor in found.items()]

    alone = AutoModelForCausalLM.from_pretrained(folder / f"{case}_alone")
    alone.config.save_pretrained(folder / case)
    model, info = AutoModelForCausalLM.from_pretrained(folder / case, output_loading_info=True)
    assert [] == [key for key in info if info[key]]
    assert tied is (model.lm_head.weight is model.get_input_embeddings().weight)
    assert dict.fromkeys(stages, True) == {
        name: torch.equal(stages[name], tensor) for name, tensor in model.state_dict().items()
    }
    ids = torch.arange(ROWS)[None]
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits, model(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", LLAMAS)
def test_stages_write_one_file_that_transformers_reads_as_the_model_one_process_trains(on_two, case):
    check_one_file(on_two, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LLAMAS)
def test_stages_that_are_sharded_write_one_file_that_transformers_reads(on_four, case):
    check_one_file(on_four, case)


def test_stages_that_start_apart_are_an_error_or_get_the_canonical_value_by_choice(on_two):
    result = on_two["started_apart"]
    assert "hold different values after being cut into stages" in result["error"]
    assert (True, True) == (result["agreed"], result["kept"])


def test_a_half_without_a_gradient_gets_that_of_the_other(on_two):
    assert [True, True] == on_two["a_half_without_gradient"]["ones"]


def test_halves_on_one_rank_need_no_sync_and_must_be_one_parameter(on_two):
    result = on_two["two_halves_on_one_rank"]
    assert [] == result["shared"]
    assert result["agreed"]
    assert "as two parameters: assign one to the other where the stages are built" in result["error"]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (
            "a_stage_is_missing",
            "MissingTensorError: no stage has lm_head.weight of the tied embed_tokens.weight and lm_head.weight",
        ),
        ("save_one_stage_twice", "MissingTensorError: no rank holds layers.1.down.bias, which the plan says is stored"),
        ("converted_apart", "ShardingError: embed_tokens.weight on rank 0 and lm_head.weight on rank 1 are one tensor"),
    ],
)
def test_stages_that_do_not_fit_are_refused_on_every_rank(on_two, case, sentence):
    assert on_two[case]["agreed"]
    assert on_two[case]["error"].startswith(sentence)
