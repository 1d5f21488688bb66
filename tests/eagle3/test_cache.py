"""The target's states on disk: written in parts, taken up after a cut, refused where they do not fit."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from eagle3.cache import CachedTarget, FeatureReader, bytes_per_token
from eagle3.capture import _groups, _plan_shards, write_features
from eagle3.config import DataConfig, DraftConfig, RunConfig, TargetConfig, TrainConfig, UnrollConfig
from eagle3.data import BatchOrder, batches
from eagle3.errors import CacheError, NumericsError
from eagle3.inputs import cache_key, load_data, load_target, open_inputs, write_cache
from eagle3.metrics import METRICS
from eagle3.parallel import Ranks
from eagle3.trainer import train
from eagle3_targets import make_target, make_world

CPU = torch.device("cpu")
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
ALONE = Ranks(rank=0, world_size=1, device=CPU)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target and eight conversations."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, conversations = make_world(folder, num_conversations=8)
    return make_target(folder / "target", tokenizer, vocab_size=600, tie_word_embeddings=True), conversations


def config_of(world, folder, *, cache=True, **changes):
    target = {"model": str(world[0]), "cache": str(folder / "cache") if cache else None}
    data = {"train": str(world[1]), "max_length": 40, "cache": str(folder / "tokens")}
    sections = {"target": target, "data": data, "draft": {"vocab_size": 96}, "train": {"lr": 1e-2, "log_every": 1}}
    for name, value in changes.items():
        sections[name.split("_", 1)[0]][name.split("_", 1)[1]] = value
    return RunConfig(
        out=str(folder / "run"),
        target=TargetConfig(**sections["target"]),
        data=DataConfig(**sections["data"]),
        draft=DraftConfig(**sections["draft"]),
        unroll=UnrollConfig(steps=2),
        train=TrainConfig(**sections["train"]),
    )


def shards_of(folder):
    return sorted((folder / "cache").glob("data-*/shard-*.safetensors"))


def write_small_shards(config, *, num_examples=2):
    """A cache of several shards."""
    target = load_target(config, device=CPU)
    data = load_data(config.data.train, config, target.tokenizer)
    size = num_examples * 40 * bytes_per_token(32, config.target.dtype)
    write_features(config.target.cache, target, data, key=cache_key(config, data), shard_bytes=size)
    return target, data


def losses_of(config):
    train(config, ALONE)
    lines = Path(config.out, METRICS).read_text().splitlines()
    return [(entry["step"], entry["loss"], entry["accuracy"]) for entry in map(json.loads, lines)]


@pytest.mark.parametrize("changes", [{}, {"data_packing": True, "train_batch_size": 2}, {"target_dtype": "bfloat16"}])
def test_a_run_from_the_cache_has_the_losses_of_one_that_runs_the_target(world, tmp_path, changes):
    online = losses_of(config_of(world, tmp_path / "online", cache=False, **changes))
    config = config_of(world, tmp_path / "cached", **changes)
    write_cache(config, ALONE)
    cached = losses_of(config)
    assert [step for step, _, _ in online] == [step for step, _, _ in cached]
    # States of a conversation alone, beside others and in rows of several differ in the last bits.
    tolerance = 2e-2 if "target_dtype" in changes else 1e-4
    assert [loss for _, loss, _ in online] == pytest.approx([loss for _, loss, _ in cached], rel=tolerance)


def test_the_cache_holds_the_states_and_the_greedy_tokens_of_each_conversation(world, tmp_path):
    config = config_of(world, tmp_path)
    target, data = write_small_shards(config)
    assert 4 == len(shards_of(tmp_path))
    reader = FeatureReader(config.target.cache, key=cache_key(config, data), data=data)
    for number, example in enumerate(data.examples):
        expected, found = target.features(example.input_ids[None]), reader([[number]], example.input_ids.numel())
        torch.testing.assert_close(expected.aux_BTA, found.aux_BTA, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(expected.hidden_BTE, found.hidden_BTE, rtol=1e-4, atol=1e-5)
        logits = target.model(example.input_ids[None]).logits
        assert logits.argmax(-1).tolist() == found.argmax_BT.tolist()


def test_states_take_four_widths_and_an_id_per_token(world, tmp_path):
    config = config_of(world, tmp_path, target_dtype="bfloat16")
    _, data = write_small_shards(config)
    tensors = [load_file(path) for path in shards_of(tmp_path)]
    assert 4 * 32 * 2 + 4 == bytes_per_token(32, "bfloat16")
    assert {torch.bfloat16, torch.int32} == {tensor.dtype for shard in tensors for tensor in shard.values()}
    num_bytes = sum(tensor.numel() * tensor.element_size() for shard in tensors for tensor in shard.values())
    assert data.num_tokens * bytes_per_token(32, "bfloat16") == num_bytes


def test_several_rows_and_workers_read_the_same(world, tmp_path):
    config = config_of(world, tmp_path, data_packing=True)
    write_small_shards(config)
    inputs = open_inputs(config, device=CPU)
    order = BatchOrder(inputs.data.num_rows, batch_size=3, rank=0, world_size=1, seed=0)
    alone, helped = (
        list(batches(inputs.data, order=order, epoch=0, pad_id=0, num_workers=number)) for number in (0, 2)
    )
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.features.aux_BTA, other.features.aux_BTA)
        assert torch.equal(one.features.argmax_BT, other.features.argmax_BT)
    reader = pickle.loads(pickle.dumps(inputs.data.feature_source))
    assert torch.equal(alone[0].features.hidden_BTE, reader(alone[0].examples, 40).hidden_BTE)


def test_a_tied_target_is_kept_as_one_tensor_and_an_untied_one_as_two(world, tmp_path):
    untied = make_target(tmp_path / "untied", world[0], vocab_size=600, tie_word_embeddings=False)
    for name, model, number in (("a", world[0], 1), ("b", untied, 2)):
        config = config_of((model, world[1]), tmp_path / name)
        _, data = write_small_shards(config)
        (path,) = (tmp_path / name / "cache").glob("target-*")
        assert number == len(load_file(path))
        cached = CachedTarget(config.target.cache, config.target.model, device=CPU, key=cache_key(config, data))
        assert (number == 1) is (cached.head_VE is cached.embedding_VE)
        live = load_target(config, device=CPU)
        assert torch.equal(live.head_VE, cached.head_VE)
        assert (live.layer_ids, live.end_ids, live.vocab_size) == (cached.layer_ids, cached.end_ids, cached.vocab_size)


def test_a_writer_goes_on_where_an_earlier_one_was_cut(world, tmp_path):
    config = config_of(world, tmp_path)
    write_small_shards(config)
    first, second, *_ = shards_of(tmp_path)
    before = first.stat().st_mtime_ns
    wanted = second.read_bytes()
    second.unlink()
    (second.parent / f"{second.name}.99999.partial").write_bytes(b"half")
    with pytest.raises(CacheError, match=r"is not finished: 1 of its 4 parts are missing\. Run `eagle3 cache` with"):
        open_inputs(config, device=CPU)
    write_small_shards(config)
    assert (before, wanted) == (first.stat().st_mtime_ns, second.read_bytes())
    assert [] == list(second.parent.glob("*.partial"))


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_whole_shards_only(world, tmp_path):
    config = config_of(world, tmp_path)
    script = f"""
import pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_cache import config_of, write_small_shards
config = config_of(({str(world[0])!r}, {str(world[1])!r}), pathlib.Path({str(tmp_path)!r}))
write_small_shards(config, num_examples=1)
"""
    process = subprocess.Popen([sys.executable, "-c", script], env=ENVIRONMENT)
    try:
        for _ in range(600):
            if shards_of(tmp_path) or process.poll() is not None:
                break
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert shards_of(tmp_path)
    assert all(load_file(path)["hidden"].shape[1] == 32 for path in shards_of(tmp_path))
    _, data = write_small_shards(config, num_examples=1)
    assert len(data.examples) == len(shards_of(tmp_path))
    open_inputs(config, device=CPU)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_layers": (0, 1, 2)}, r"were made from the layers \[1, 2, 3\], not \[0, 1, 2\]"),
        ({"target_dtype": "bfloat16"}, r"were made in float32, not in target\.dtype bfloat16"),
        ({"data_max_length": 39}, r"holds no states of this data as this target's tokenizer reads it"),
    ],
)
def test_states_of_other_settings_are_refused(world, tmp_path, changes, words):
    write_cache(config_of(world, tmp_path), ALONE)
    with pytest.raises(CacheError, match=words):
        open_inputs(config_of(world, tmp_path, **changes), device=CPU)


def test_states_of_other_weights_are_refused_by_readers_and_writers(world, tmp_path):
    write_cache(config_of(world, tmp_path), ALONE)
    other = make_target(tmp_path / "other", world[0], vocab_size=600, tie_word_embeddings=True, hidden_size=16)
    config = config_of((other, world[1]), tmp_path)
    for use in (lambda: open_inputs(config, device=CPU), lambda: write_cache(config, ALONE)):
        with pytest.raises(
            CacheError, match=r"were made from other weights than target\.model has now\. Choose another"
        ):
            use()


def test_a_folder_that_is_no_cache_is_refused(world, tmp_path):
    with pytest.raises(CacheError, match=r"cache holds no states of this data .*Run `eagle3 cache` with the same"):
        open_inputs(config_of(world, tmp_path), device=CPU)


def test_a_cache_without_embedding_and_head_is_refused(world, tmp_path):
    write_small_shards(config_of(world, tmp_path))
    (path,) = (tmp_path / "cache").glob("target-*")
    path.unlink()
    with pytest.raises(CacheError, match=r"target\.cache must be a folder that `eagle3 cache` has filled"):
        open_inputs(config_of(world, tmp_path), device=CPU)


@pytest.mark.parametrize("size", [10, 30_000])
def test_a_shard_that_was_cut_short_is_named(world, tmp_path, size):
    config = config_of(world, tmp_path)
    _, data = write_small_shards(config)
    path = shards_of(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:size])
    reader = FeatureReader(config.target.cache, key=cache_key(config, data), data=data)
    with pytest.raises(
        CacheError, match=r"shard-00001\.safetensors is damaged .*Delete it and run `eagle3 cache` again"
    ):
        reader([[2]], 40)


def test_states_that_are_not_finite_are_never_written(world, tmp_path):
    config = config_of(world, tmp_path)
    target = load_target(config, device=CPU)
    target.decoder_layers[3].mlp.down_proj.weight[0, 0] = torch.nan
    data = load_data(config.data.train, config, target.tokenizer)
    with pytest.raises(NumericsError, match=r"states of conversation \d of those that can be trained on hold NaN or"):
        write_features(config.target.cache, target, data, key=cache_key(config, data))
    assert [] == shards_of(tmp_path)


def test_two_writers_at_once_are_refused(world, tmp_path):
    config = config_of(world, tmp_path)
    target, data = write_small_shards(config)
    (place,) = (tmp_path / "cache").glob("data-*")
    with FileLock(place / "lock"), pytest.raises(CacheError, match=r"is being written by another run\. Wait for it"):
        write_features(config.target.cache, target, data, key=cache_key(config, data))


def test_parts_of_several_processes_make_one_cache(world, tmp_path):
    config = config_of(world, tmp_path)
    target = load_target(config, device=CPU)
    data = load_data(config.data.train, config, target.tokenizer)
    options = {"key": cache_key(config, data), "num_parts": 2, "shard_bytes": 40 * bytes_per_token(32, "float32")}
    write_features(config.target.cache, target, data, part=1, **options)
    assert 4 == len(shards_of(tmp_path))
    write_features(config.target.cache, target, data, part=0, **options)
    assert 8 == len(shards_of(tmp_path))
    open_inputs(config, device=CPU)


def test_a_disk_that_is_too_small_is_named_before_any_work(world, tmp_path, monkeypatch):
    config = config_of(world, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CacheError, match=r"The states need \d+ kB more in .*, but only 1 kB are free\. Free some"):
        write_cache(config, ALONE)
    assert [] == shards_of(tmp_path)


@pytest.mark.slow
def test_a_file_that_the_system_refuses_to_write_is_a_sentence_and_leaves_nothing_half_written(world, tmp_path):
    """The kernel refuses files above a limit here, as it does on a full disk."""
    script = f"""
import pathlib, resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_cache import *
config = config_of(({str(world[0])!r}, {str(world[1])!r}), pathlib.Path({str(tmp_path)!r}))
target = load_target(config, device=CPU)
data = load_data(config.data.train, config, target.tokenizer)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_features(config.target.cache, target, data, key=cache_key(config, data))
except CacheError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=ENVIRONMENT
    )
    assert "File too large. What is there is whole; run the command again when there is room" in result.stdout, (
        result.stderr
    )
    assert [] == [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith("shard")]


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [([3, 4, 5], 7, [[0, 1], [2]]), ([9, 1], 7, [[0], [1]]), ([1], 7, [[0]]), ([7, 7], 7, [[0], [1]])],
)
def test_shards_hold_whole_conversations_in_order(lengths, size, expected):
    assert expected == _plan_shards(lengths, size)


def test_conversations_that_are_read_together_have_similar_lengths(monkeypatch):
    monkeypatch.setattr("eagle3.capture._FORWARD_TOKENS", 12)
    assert [[1, 3], [0, 2], [4]] == list(_groups([5, 1, 6, 2, 30]))
