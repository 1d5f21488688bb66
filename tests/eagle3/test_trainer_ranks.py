"""Two processes learn what one does, however the draft is spread over them, and go on where any of them stopped."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from trainer_ranks import copy_run

from eagle3.export import export
from eagle3.finished import open_run
from eagle3.trainer import train
from eagle3_runs import ALONE, config_of, make_run_world, metrics_of, weights_of
from tiepolicy.files import read_sharded_metadata
from tiepolicy_dcp import CheckpointStore
from torchrun import torchrun

pytestmark = pytest.mark.dist

STEP_3 = "epoch_1_step_3"
#: Sums in another order, in float32, over ten steps at a learning rate of 0.01.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of `trainer_ranks.py`, and those of one process that they are held against."""
    folder = tmp_path_factory.mktemp("runs")
    world = make_run_world(folder)
    train(config_of(world, folder / "alone", every_steps=3), ALONE)
    train(config_of(world, folder / "alone-large", epochs=1, batch_size=4), ALONE)
    export(open_run(folder / "alone", checkpoint="LATEST"), folder / "export", kind="plain")
    train(config_of(world, folder / "from-export", epochs=1, init_from=folder / "export"), ALONE)
    result = torchrun(Path(__file__).with_name("trainer_ranks.py"), folder, num_processes=2)
    assert 0 == result.returncode, result.stdout
    return folder


def near(expected):
    return [pytest.approx(entry["loss"], rel=TOLERANCE) for entry in expected]


def losses(entries):
    return [entry["loss"] for entry in entries]


def largest_difference(one, other):
    floating = [name for name in one if one[name].is_floating_point()]
    assert [True] * (len(one) - len(floating)) == [torch.equal(one[n], other[n]) for n in one if n not in floating]
    return max(float((one[name] - other[name]).abs().max()) for name in floating)


@pytest.mark.parametrize("kind", ["data", "fused", "shard", "hybrid-1", "hybrid-2"])
def test_two_processes_learn_what_one_does(folder, kind):
    """The split over processes changes only the order of additions."""
    whole, two = metrics_of(folder / "whole"), metrics_of(folder / kind)
    alone = metrics_of(folder / "alone")
    # The learning rate differs after one epoch of one and of two: only the first step's loss is the same in all.
    assert alone[0]["accuracy"] == two[0]["accuracy"]
    assert near(alone) == losses(whole)
    single_epoch = metrics_of(folder / "data")
    assert near(single_epoch) == losses(two)
    weights = [weights_of(folder / run, "epoch_1_step_5") for run in ("data", kind)]
    assert TOLERANCE > largest_difference(*weights)


def test_gradients_of_a_sharded_head_travel_while_others_are_computed(folder):
    operations = json.loads((folder / "operations.json").read_text())
    exchanges = [len([*group]) for name, group in itertools.groupby(operations) if name != "aten::mm"]
    assert [1] * 2 * 5 == exchanges


@pytest.mark.parametrize("run", ["accumulated", "accumulated-fused", "accumulated-shard"])
def test_accumulated_batches_are_one_batch(folder, run):
    """Twice two processes of one conversation are one of four; the epoch's last step has half as many."""
    expected, actual = metrics_of(folder / "alone-large"), metrics_of(folder / run)
    assert [1, 2, 3] == [entry["step"] for entry in actual]
    assert near(expected) == losses(actual)
    assert [entry["accept_length"] for entry in expected] == [entry["accept_length"] for entry in actual]
    assert [pytest.approx(entry["grad_norm"], rel=1e-3) for entry in expected] == [e["grad_norm"] for e in actual]
    weights = [weights_of(folder / name, "epoch_1_step_3") for name in ("alone-large", run)]
    assert TOLERANCE > largest_difference(*weights)


@pytest.mark.parametrize("kind", ["data", "shard"])
def test_two_processes_start_from_the_draft_that_one_does(folder, kind):
    assert near(metrics_of(folder / "from-export")) == losses(metrics_of(folder / f"from-export-{kind}"))
    weights = [weights_of(folder / run, "epoch_1_step_5") for run in ("from-export", f"from-export-{kind}")]
    assert TOLERANCE > largest_difference(*weights)


def test_each_process_starts_with_its_part_of_every_bit_of_a_run(folder):
    """At a learning rate that moves none of them."""
    weights = weights_of(folder / "alone", "epoch_2_step_10"), weights_of(folder / "from-run", "epoch_1_step_5")
    assert 0 == largest_difference(*weights)


@pytest.mark.parametrize(("whole", "cut"), [("whole", "cut-data"), ("whole-shard", "cut-shard")])
def test_processes_resume_to_the_last_bit(folder, whole, cut):
    assert metrics_of(folder / whole)[3:] == metrics_of(folder / cut)
    expected, actual = (weights_of(folder / run, "epoch_2_step_10") for run in (whole, cut))
    assert [True] * len(expected) == [torch.equal(expected[name], actual[name]) for name in expected]


def test_a_run_of_whole_drafts_goes_on_with_shards(folder):
    expected, actual = metrics_of(folder / "whole")[3:], metrics_of(folder / "sharded-later")
    assert near(expected) == losses(actual)


def test_two_processes_go_on_with_the_data_where_one_stopped(folder):
    expected, actual = metrics_of(folder / "alone")[3:], metrics_of(folder / "from-alone")
    assert [entry["step"] for entry in expected] == [entry["step"] for entry in actual]
    assert [entry["lr"] for entry in expected] == [entry["lr"] for entry in actual]
    assert near(expected) == losses(actual)


@pytest.mark.parametrize("run", ["whole", "cut-shard"])
def test_no_process_writes_the_embedding_which_is_the_targets(folder, run):
    tensors = read_sharded_metadata(folder / run / "checkpoints" / "epoch_2_step_10").tensors
    assert (True, False) == tuple(f"model.{name}.weight" in tensors for name in ("lm_head", "embed_tokens"))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_one_process_goes_on_with_the_data_where_two_stopped(folder, tmp_path, caplog, batch_size):
    """With other steps, too: then the total in the log, and the schedule, are those of the run as it goes on."""
    copy_run(folder / "whole", tmp_path, STEP_3)
    world = (folder / "target", folder / "conversations.jsonl")
    train(config_of(world, tmp_path, batch_size=batch_size, restore_from=STEP_3), ALONE)
    actual = metrics_of(tmp_path)
    last = 3 + (4 + 10) // batch_size
    assert list(range(4, last + 1)) == [entry["step"] for entry in actual]
    assert f"epoch 2 step {last}/{last}: loss" in caplog.text
    said = "The checkpoint was written by 2 processes and is resumed by 1: random states start anew"
    assert [said] == [message for message in caplog.messages if message.startswith("The checkpoint was written")]
    if batch_size == 2:
        assert near(metrics_of(folder / "whole")[3:]) == losses(actual)
    rates = [entry["lr"] for entry in actual]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder):
    """The second run went on from there, and both together took the steps of one that was not stopped."""
    names = CheckpointStore(folder / "stopped" / "checkpoints").names()
    assert ["epoch_1_step_3", "epoch_1_step_5", "epoch_2_step_10"] == names
    assert metrics_of(folder / "whole") == metrics_of(folder / "stopped")


def test_a_checkpoint_says_what_made_it(folder):
    extra = json.loads((folder / "cut-shard" / "checkpoints" / "epoch_2_step_9" / "extra.json").read_text())
    assert {"epoch": 1, "step": 9, "num_seen": 8} == extra["progress"]
    assert ("shard", 96) == (extra["config"]["parallel"]["kind"], extra["config"]["draft"]["vocab_size"])
    assert 2 == len(extra["rng"])
