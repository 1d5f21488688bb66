"""What `test_sharded.py` and `test_staged.py` show under gloo, under NCCL: two ranks with a GPU for each, or on one."""

import pytest
from test_sharded import RANKS, TRAINED, check_trained, loaded_alone
from test_staged import RANKS as STAGES
from test_staged import SCHEDULES, check_resumed, check_synced
from tower import ROWS

from models import TiedPair
from torchrun import results_of

CASES = [*TRAINED, "shard_and_compile"]
pytestmark = [pytest.mark.gpu, pytest.mark.dist]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    cases = [*CASES, "save_trained", "load_trained", "save_tensor_parallel", "other_ties_on_a_rank"]
    return results_of(RANKS, folder, cases, num_processes=2, on_gpus=True) | {"folder": folder}


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    cases = [*SCHEDULES, "save_and_load", "resume", "save_a_drifted_pair"]
    return results_of(STAGES, tmp_path_factory.mktemp("staged"), cases, num_processes=2, on_gpus=True)


def test_the_ranks_speak_nccl(sharded):
    assert "nccl" == sharded["save_trained"]["backend"]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_a_tied_model_as_one_does(sharded, case):
    check_trained(sharded[case])
    assert sharded[case].get("tied", True)


def test_two_ranks_load_what_they_saved_bit_for_bit(sharded):
    assert [sharded["save_trained"]["saved"]] * 2 == sharded["load_trained"]["loaded"]
    assert sharded["load_trained"]["tied"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_process_loads_what_two_ranks_saved_bit_for_bit(sharded, device):
    assert sharded["save_trained"]["saved"] == loaded_alone(sharded["folder"] / "trained", device)


def test_one_process_loads_what_tensor_parallel_ranks_saved_bit_for_bit(sharded):
    loaded = loaded_alone(sharded["folder"] / "parallel", make=lambda: TiedPair(vocab_size=ROWS).double())
    assert sharded["save_tensor_parallel"]["saved"] == loaded


def test_a_rank_with_other_ties_stops_both_with_one_sentence(sharded):
    result = sharded["other_ties_on_a_rank"]
    assert (True, False) == (result["agreed"], result["sharded"])
    assert result["error"].startswith("PlanMismatchError: rank 0 and rank 1 decided differently what is one tensor")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_of_two_ranks_train_as_one_process_does_and_stay_equal_to_the_bit(staged, schedule):
    check_synced(staged[schedule])


def test_stages_of_two_ranks_save_load_and_resume_to_the_bit(staged):
    assert (True, True) == (staged["save_and_load"]["same"], staged["save_and_load"]["equal"])
    check_resumed(staged["resume"])


def test_a_pair_that_drifted_between_two_ranks_is_an_error_at_save(staged):
    result = staged["save_a_drifted_pair"]
    assert (True, []) == (result["agreed"], result["written"])
    assert result["error"].startswith(
        "TieConflictError: embed_tokens.weight on rank 0 and lm_head.weight on rank 1 are one"
    )
