"""Which checkpoints a store keeps, which one is the best, and what a kill between two steps leaves."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiepolicy_dcp
from models import TiedPair
from tiepolicy_dcp import CheckpointError, CheckpointStore
from tiepolicy_dcp._folder import temporary
from tiepolicy_dcp._root import Record, Retention, read_pointer


def save_all(store, values):
    """One checkpoint per value of the metric, named by its place."""
    for index, value in enumerate(values):
        store.save(f"step_{index}", model=TiedPair(), metrics=None if value is None else {"accept_length": value})


def pointers(store):
    return tuple(read_pointer(store.root, pointer) for pointer in ("LATEST", "BEST"))


def test_the_newest_are_kept_and_the_latest_is_among_them(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    save_all(store, [None] * 4)
    assert (["step_2", "step_3"], ("step_3", None)) == (store.names(), pointers(store))


def test_the_best_are_kept_beside_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=2)
    save_all(store, [1.0, 3.0, 2.0, 0.5, 0.25])
    assert (["step_1", "step_2", "step_4"], ("step_4", "step_1")) == (store.names(), pointers(store))
    assert tmp_path / "step_1" == store.resolve("BEST")


def test_a_metric_may_be_best_when_it_is_small_and_the_first_of_equal_ones_stays_best(tmp_path):
    store = CheckpointStore(tmp_path, metric="loss", mode="min")
    for index, loss in enumerate([2.0, 1.0, 1.0]):
        store.save(f"step_{index}", model=TiedPair(), metrics={"loss": loss, "seconds": 3})
    assert ("step_2", "step_1") == pointers(store)


def test_one_without_a_metric_says_that_it_cannot_become_best_and_does_not(tmp_path, caplog):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=1)
    save_all(store, [1.0, None, None])
    assert (["step_0", "step_2"], ("step_2", "step_0")) == (store.names(), pointers(store))
    assert "step_2 is saved without accept_length: it cannot become BEST" in caplog.text


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"accept_length": float("nan")}, "the metric accept_length is nan, by which nothing can be ranked"),
        ({"accept_length": "high"}, "the metric accept_length is 'high', which is no number"),
        ({"loss": 1.0}, "the metrics of one lack accept_length, .* they have loss. Nothing was written"),
    ],
)
def test_a_metric_that_cannot_rank_is_refused_before_anything_is_written(tmp_path, metrics, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(tmp_path / "run").save("one", model=TiedPair(), metrics=metrics)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 0}, "keep_last is 0, but must be a positive number, or None to keep all"),
        ({"keep_best": True}, "keep_best is True, but must be a positive number"),
        ({"mode": "best"}, "mode is 'best', but must be 'max' or 'min'"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(tmp_path, **options)


def test_what_no_store_wrote_is_never_deleted(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    tiepolicy_dcp.save(tmp_path / "copied", model=TiedPair())
    store = CheckpointStore(tmp_path, keep_last=1)
    save_all(store, [None] * 3)
    assert (["copied", "step_2"], "mine") == (store.names(), (tmp_path / "notes" / "todo.txt").read_text())


def test_a_reopened_store_goes_on_counting(tmp_path):
    with CheckpointStore(tmp_path, keep_last=2) as store:
        save_all(store, [3.0, 2.0, 1.0])
    with CheckpointStore(tmp_path, keep_last=2) as store:
        store.save("a", model=TiedPair(), metrics={"accept_length": 0.5})
    assert (["a", "step_0", "step_2"], ("a", "step_0")) == (store.names(), pointers(store))


def test_a_save_that_was_killed_before_it_was_pointed_to_may_be_repeated(tmp_path):
    """Else a run resumed from LATEST would fail when it comes to the same step again."""
    store = CheckpointStore(tmp_path)
    save_all(store, [1.0, 2.0, 3.0])
    for pointer in ("LATEST", "BEST"):
        (tmp_path / pointer).write_text("step_1\n")
    store.save("step_2", model=TiedPair(), metrics={"accept_length": 1.5})
    again = json.loads((tmp_path / "step_2" / "checkpoint.json").read_text())
    assert {"number": 3, "metrics": {"accept_length": 1.5}} == again
    assert (["step_0", "step_1", "step_2"], ("step_2", "step_1")) == (store.names(), pointers(store))
    with pytest.raises(CheckpointError, match="step_1 exists already"):
        store.save("step_1", model=TiedPair())


def test_the_first_save_too_may_be_repeated_if_it_was_killed_before_it_was_pointed_to(tmp_path):
    CheckpointStore(tmp_path).save("one", model=TiedPair())
    (tmp_path / "LATEST").unlink()
    store = CheckpointStore(tmp_path)
    store.save("one", model=TiedPair())
    assert (["one"], ("one", None)) == (store.names(), pointers(store))


def test_what_a_killed_save_and_a_killed_deletion_left_is_removed_whatever_its_name(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save("one", model=TiedPair())
    for purpose in ("unfinished", "doomed"):
        folder = temporary(tmp_path / "other", purpose)
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(b"half")
    assert ["one"] == store.names()
    store.save("two", model=TiedPair())
    assert [".pointers", "BEST", "LATEST", "one", "two"] == sorted(
        path.name for path in tmp_path.iterdir() if path.suffix != ".target" and path.name not in (".lock", ".writer")
    )


def test_a_copy_that_followed_links_is_a_store_like_any_other(tmp_path):
    store = CheckpointStore(tmp_path)
    save_all(store, [1.0])
    (tmp_path / "LATEST").unlink()
    (tmp_path / "LATEST").write_text("step_0\n")
    (tmp_path / ".pointers").unlink()
    (tmp_path / ".pointers").mkdir()
    assert tmp_path / "step_0" == store.resolve("LATEST")
    store.save("next", model=TiedPair(), metrics={"accept_length": 2.0})
    assert ("next", "next") == pointers(store)


def test_a_root_that_was_moved_keeps_its_pointers(tmp_path):
    save_all(CheckpointStore(tmp_path / "here"), [1.0])
    (tmp_path / "here").rename(tmp_path / "there")
    assert tmp_path / "there" / "step_0" == CheckpointStore(tmp_path / "there").resolve("LATEST")


def test_a_damaged_record_is_named_before_anything_is_written(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save_all(store, [1.0])
    (tmp_path / "step_0" / "checkpoint.json").write_text(json.dumps({"number": 1}))
    with pytest.raises(CheckpointError, match=r"checkpoint.json is damaged: KeyError\('metrics'\). Delete step_0"):
        store.save("two", model=TiedPair())
    assert ["step_0"] == store.names()


@given(
    values=st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=8),
    keep_last=st.none() | st.integers(1, 3),
    keep_best=st.none() | st.integers(1, 3),
    mode=st.sampled_from(["max", "min"]),
)
def test_what_is_deleted_is_neither_new_nor_good_nor_pointed_to(values, keep_last, keep_best, mode):
    """Against a slow oracle: count for each one how many are newer, and how many are better or as good and older."""
    records = [
        Record(name=str(number), number=number, metrics={} if value is None else {"m": float(value)})
        for number, value in enumerate(values, start=1)
    ]
    retention = Retention(keep_last=keep_last, keep_best=keep_best, metric="m", mode=mode)
    sign = 1 if mode == "max" else -1
    expected = []
    for place, value in enumerate(values):
        newer = len(values) - place - 1
        better = sum(
            other is not None and value is not None and (sign * other, -i) > (sign * value, -place)
            for i, other in enumerate(values)
        )
        new = keep_last is not None and newer < keep_last
        good = keep_best is not None and value is not None and better < keep_best
        if not (new or good or place == 0) and (keep_last or keep_best):
            expected.append(str(place + 1))
    assert expected == [record.name for record in retention.doomed(records, pointed={"1"})]
