"""One process saves and loads: each tied tensor once, into any model that can hold it, and nothing half done."""

import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import tiepolicy
import tiepolicy_dcp
import tiepolicy_hf._plugin
from models import FlaggedPair, HeadFirst, TiedPair, train_steps
from tiepolicy import Policy, Resolution, Verdict, hookimpl
from tiepolicy.errors import (
    DtypeMismatchError,
    ManifestError,
    MissingTensorError,
    ShapeMismatchError,
    TieConflictError,
    UnsafeVerdictError,
)
from tiepolicy_dcp import CheckpointError, ModelState, OptimizerState, UntrustedCheckpointError

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def plain_dcp_save(state, folder):
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(state, checkpoint_id=folder)


def test_a_tied_tensor_is_written_once(tmp_path):
    model = TiedPair(vocab_size=4096, hidden_size=16)
    folder = tiepolicy_dcp.save(tmp_path / "ours", model=model)
    unique = model.embed_tokens.weight.nbytes
    plain_dcp_save(model.state_dict(), tmp_path / "plain")
    size = {name: sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("ours", "plain")}
    assert unique < size["ours"] < 1.05 * unique
    assert 2 * unique < size["plain"]
    assert folder == tmp_path / "ours"


@pytest.mark.parametrize("tied", [True, False])
def test_plain_dcp_finds_both_names_of_what_was_written_once(tmp_path, tied):
    """Into a tied and into an untied model, by code that knows nothing of ties."""
    model = TiedPair(vocab_size=4096)
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model)
    assert (folder / "__0_0.distcp").stat().st_size < 1.1 * model.embed_tokens.weight.nbytes
    plain = TiedPair(tied=tied, vocab_size=4096)
    state = {"model": plain.state_dict()}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(state, checkpoint_id=folder)
    plain.load_state_dict(state["model"])
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(model.lm_head.weight, plain.embed_tokens.weight)


def test_torchs_own_converter_finds_both_names(tmp_path):
    model = TiedPair()
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model)
    dcp_to_torch_save(folder, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {EMBED, HEAD} == set(loaded["model"])
    assert torch.equal(model.lm_head.weight, loaded["model"][HEAD])


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path):
    model = TiedPair()
    optimizer = adamw(model)
    train_steps(model, optimizer, num_steps=3)
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer, extra={"step": 3})
    expected = train_steps(model, optimizer, num_steps=4, seed=1)

    resumed = TiedPair()
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), lr=99.0)
    restored = tiepolicy_dcp.load(tmp_path / "c", model=resumed, optimizer=resumed_optimizer)
    assert 3 == restored.extra["step"]
    assert expected == train_steps(resumed, resumed_optimizer, num_steps=4, seed=1)
    assert torch.equal(model.lm_head.weight, resumed.lm_head.weight)


def test_the_order_in_which_modules_were_registered_does_not_matter_to_the_optimizer(tmp_path):
    model = HeadFirst()
    optimizer = adamw(model)
    train_steps(model, optimizer, num_steps=2)
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer)
    resumed = TiedPair()
    resumed_optimizer = adamw(resumed)
    tiepolicy_dcp.load(tmp_path / "c", model=resumed, optimizer=resumed_optimizer)
    assert train_steps(model, optimizer, num_steps=2) == train_steps(resumed, resumed_optimizer, num_steps=2)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_optimizers_of_other_kinds_are_restored_too(tmp_path, make):
    model = TiedPair()
    optimizer = make(model.parameters(), lr=0.1)
    train_steps(model, optimizer, num_steps=2)
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=optimizer)
    resumed = TiedPair()
    resumed_optimizer = make(resumed.parameters(), lr=0.5)
    tiepolicy_dcp.load(tmp_path / "c", model=resumed, optimizer=resumed_optimizer)
    assert train_steps(model, optimizer, num_steps=2) == train_steps(resumed, resumed_optimizer, num_steps=2)


def test_a_shrunken_head_under_an_inherited_flag_is_kept(tmp_path):
    """The first failure: the head was dropped for its flag and could not be rebuilt."""
    model = FlaggedPair(flag=True, vocab_size=64, draft_vocab_size=8, hidden_size=4)
    tiepolicy_dcp.save(tmp_path / "c", model=model)
    resumed = FlaggedPair(flag=True, vocab_size=64, draft_vocab_size=8, hidden_size=4)
    tiepolicy_dcp.load(tmp_path / "c", model=resumed)
    assert torch.equal(model.lm_head.weight, resumed.lm_head.weight)
    assert (8, 4) == tuple(resumed.lm_head.weight.shape)


def test_the_flag_trusting_rule_is_stopped_before_anything_is_written(tmp_path):
    class FlagTrusting:
        @hookimpl
        def tiepolicy_decide(self, claim):
            return Verdict.alias("same-storage") if claim.source == "declared" else None

    model = FlaggedPair(flag=True, vocab_size=64, draft_vocab_size=8, hidden_size=4)
    policy = Policy(plugins=[tiepolicy_hf._plugin, FlagTrusting()])
    with pytest.raises(UnsafeVerdictError, match="Saving would lose lm_head.weight; nothing was written"):
        tiepolicy_dcp.save(tmp_path / "c", model=model, plan=policy.plan(model))
    assert [] == list(tmp_path.iterdir())


def test_a_tie_that_was_lost_and_drifted_stops_the_save_and_leaves_nothing(tmp_path):
    model = TiedPair()
    plan = tiepolicy.plan(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(TieConflictError, match="their values differ"):
        tiepolicy_dcp.save(tmp_path / "c", model=model, plan=plan)
    assert [] == list(tmp_path.iterdir())


def test_a_tied_checkpoint_fills_both_tensors_of_an_untied_model(tmp_path):
    model = TiedPair()
    tiepolicy_dcp.save(tmp_path / "c", model=model)
    untied = TiedPair(tied=False)
    restored = tiepolicy_dcp.load(tmp_path / "c", model=untied)
    assert torch.equal(model.lm_head.weight, untied.lm_head.weight)
    assert torch.equal(model.lm_head.weight, untied.embed_tokens.weight)
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert ["", "lm_head.weight and embed_tokens.weight were one tensor when saved; each gets its values"] == [
        action.note for action in restored.actions
    ]


def test_two_stored_values_for_one_live_tensor_are_a_conflict_and_the_model_is_untouched(tmp_path):
    tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(tied=False))
    model = TiedPair()
    before = model.lm_head.weight.clone()
    message = "lm_head.weight and embed_tokens.weight are one tensor in the model, but their values differ: first at"
    with pytest.raises(TieConflictError, match=message):
        tiepolicy_dcp.load(tmp_path / "c", model=model)
    assert torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize("kept", [EMBED, HEAD])
def test_a_plugin_may_choose_which_of_two_stored_values_is_loaded(tmp_path, kept):
    class Chooses:
        @hookimpl
        def tiepolicy_resolve(self, conflict):
            return Resolution.keep(kept)

    saved = TiedPair(tied=False)
    tiepolicy_dcp.save(tmp_path / "c", model=saved)
    model = TiedPair()
    tiepolicy_dcp.load(tmp_path / "c", model=model, plan=Policy(plugins=[Chooses()]).plan(model))
    assert torch.equal(saved.state_dict()[kept], model.lm_head.weight)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_plugin_cannot_untie_a_live_model_by_loading(tmp_path):
    class Unties:
        @hookimpl
        def tiepolicy_resolve(self):
            return Resolution.untie()

    tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(tied=False))
    model = TiedPair()
    with pytest.raises(TieConflictError, match="untie the model before its plan is made. Nothing was loaded"):
        tiepolicy_dcp.load(tmp_path / "c", model=model, plan=Policy(plugins=[Unties()]).plan(model))


def test_two_stored_names_with_equal_bits_load_into_a_tie(tmp_path):
    untied = TiedPair(tied=False)
    untied.lm_head.weight.data.copy_(untied.embed_tokens.weight.data)
    tiepolicy_dcp.save(tmp_path / "c", model=untied)
    model = TiedPair()
    tiepolicy_dcp.load(tmp_path / "c", model=model)
    assert torch.equal(untied.lm_head.weight, model.lm_head.weight)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_folder_of_plain_dcp_loads_too(tmp_path):
    source = TiedPair()
    plain_dcp_save({"model": source.state_dict()}, tmp_path / "plain")
    model = TiedPair()
    tiepolicy_dcp.load(tmp_path / "plain", model=model)
    assert torch.equal(source.lm_head.weight, model.lm_head.weight)


def test_the_stateful_wrappers_work_with_plain_dcp(tmp_path):
    model = TiedPair()
    optimizer = adamw(model)
    train_steps(model, optimizer, num_steps=2)
    plain_dcp_save({"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}, tmp_path / "c")
    resumed = HeadFirst()
    resumed_optimizer = adamw(resumed)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(
            {"model": ModelState(resumed), "optimizer": OptimizerState(resumed, resumed_optimizer)},
            checkpoint_id=tmp_path / "c",
        )
    assert train_steps(model, optimizer, num_steps=2) == train_steps(resumed, resumed_optimizer, num_steps=2)


def test_the_consolidated_file_holds_each_tensor_once_as_other_tools_read_it(tmp_path):
    model = TiedPair()
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model, consolidated=True)
    tensors = load_file(folder / "model.safetensors")
    assert [EMBED] == list(tensors)
    assert torch.equal(model.embed_tokens.weight, tensors[EMBED])
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {"format": "pt"} == file.metadata()


def test_extra_state_comes_back_with_its_tensors(tmp_path):
    rng_state = torch.get_rng_state()
    extra = {"step": 3, "rng": [rng_state, {"cuda": None}], "name": "epoch_1_step_3", "lr": 0.1}
    tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(), extra=extra)
    restored = dict(tiepolicy_dcp.load(tmp_path / "c", model=TiedPair()).extra)
    state, rest = restored.pop("rng")
    assert torch.equal(rng_state, state)
    assert ({"cuda": None}, {"step": 3, "name": "epoch_1_step_3", "lr": 0.1}) == (rest, restored)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            lambda: TiedPair(vocab_size=9),
            ShapeMismatchError,
            r"\(12, 4\) in the checkpoint, the model expects \(9, 4\)",
        ),
        (lambda: TiedPair().double(), DtypeMismatchError, "convert the model with .to"),
        (lambda: torch.nn.Linear(2, 2), MissingTensorError, r"bias \(2,\) is not in the checkpoint"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_it_is_touched(tmp_path, model, error, message):
    tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    live = model()
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    with pytest.raises(error, match=message):
        tiepolicy_dcp.load(tmp_path / "c", model=live)
    assert all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())


def test_an_optimizer_of_an_untied_model_is_refused_with_the_name_that_has_no_state(tmp_path):
    model = TiedPair()
    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=adamw(model))
    untied = TiedPair(tied=False)
    with pytest.raises(
        MissingTensorError, match="the optimizer state state.lm_head.weight.step is not in the checkpoint"
    ):
        tiepolicy_dcp.load(tmp_path / "c", model=untied, optimizer=adamw(untied))


def test_parameter_groups_of_other_parameters_are_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))

    def grouped(first, second):
        return torch.optim.AdamW([{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.5}])

    tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=grouped(model[0], model[1]))
    with pytest.raises(CheckpointError, match="parameter group 0 holds other parameters than when it was saved"):
        tiepolicy_dcp.load(tmp_path / "c", model=model, optimizer=grouped(model[1], model[0]))


def test_a_checkpoint_is_never_written_over_another(tmp_path):
    tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    with pytest.raises(CheckpointError, match="exists already, and a checkpoint is never written over another"):
        tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}


def test_extra_state_that_is_no_json_leaves_nothing_behind(tmp_path):
    with pytest.raises(CheckpointError, match="extra state can hold tensors and what JSON can"):
        tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(), extra={"optimizer": object()})
    assert [] == list(tmp_path.iterdir())


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is no checkpoint: it has no .metadata file"):
        tiepolicy_dcp.load(tmp_path, model=TiedPair())


def test_an_edited_manifest_is_noticed(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(tied=False))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(HEAD, "lm_tail.weight"))
    with pytest.raises(CheckpointError, match="manifest.json does not hold what was written"):
        tiepolicy_dcp.load(folder, model=TiedPair(tied=False))
    with pytest.raises(ManifestError, match="disagree about lm_head.weight"):
        tiepolicy_dcp.load(folder, model=TiedPair(tied=False), verify="off")


def test_a_lost_data_file_is_named_before_the_model_is_touched(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__0_0.distcp is missing"):
        tiepolicy_dcp.load(folder, model=TiedPair())


def test_a_cut_data_file_is_an_error(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    data = folder / "__0_0.distcp"
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp has \d+ bytes, but \d+ were written"):
        tiepolicy_dcp.load(folder, model=TiedPair())
    with pytest.raises(CheckpointError, match="could not be read"):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="off")


@pytest.mark.parametrize(
    "name", [".metadata", "__0_0.distcp", "extra.json", "extra.safetensors", "manifest.json", "model.safetensors"]
)
def test_one_flipped_bit_in_any_file_is_found_before_the_model_is_touched(tmp_path, name):
    extra = {"rng": torch.get_rng_state()}
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(), extra=extra, consolidated=True)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content)
    model = TiedPair()
    before = model.lm_head.weight.clone()
    with pytest.raises(CheckpointError, match=f"{name} does not hold what was written: its digest differs"):
        tiepolicy_dcp.load(folder, model=model)
    assert torch.equal(before, model.lm_head.weight)


def test_every_file_of_a_checkpoint_has_a_digest(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair(), consolidated=True)
    described = set(json.loads((folder / "digests.json").read_text())["files"])
    assert {path.name for path in folder.iterdir()} == described | {"digests.json"}


def test_lost_or_damaged_digests_are_an_error_unless_nothing_is_to_be_checked(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    (folder / "digests.json").write_text('{"algorithm": "crc1", "files": {}}')
    with pytest.raises(CheckpointError, match="digests.json has the unknown algorithm 'crc1'"):
        tiepolicy_dcp.load(folder, model=TiedPair())
    (folder / "digests.json").write_text('{"algorithm": "xxh3_128", "files": {".metadata": 3}}')
    with pytest.raises(CheckpointError, match="digests.json is damaged"):
        tiepolicy_dcp.load(folder, model=TiedPair())
    (folder / "digests.json").unlink()
    with pytest.raises(CheckpointError, match="digests.json is missing: a part of the checkpoint was lost"):
        tiepolicy_dcp.load(folder, model=TiedPair())
    tiepolicy_dcp.load(folder, model=TiedPair(), verify="off")


def test_sizes_alone_do_not_find_a_changed_byte(tmp_path):
    """What `verify="size"` gives up for its speed."""
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("same-object", "same-0bject"))
    with pytest.raises(ManifestError, match="'same-0bject' is not a valid Reason"):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="size")


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_metadata_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    with pytest.raises(UntrustedCheckpointError, match="asks for posix.mkdir, which no tensor needs"):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="off")
    assert not (tmp_path / "pwned").exists()


def test_a_pickled_entry_is_never_unpickled(tmp_path):
    plain_dcp_save({"model": {HEAD: TiedPair().lm_head.weight, EMBED: Payload(tmp_path / "pwned")}}, tmp_path / "c")
    with pytest.raises(MissingTensorError, match="embed_tokens.weight"):
        tiepolicy_dcp.load(tmp_path / "c", model=TiedPair(tied=False))
    assert not (tmp_path / "pwned").exists()


def test_a_file_outside_the_checkpoint_is_not_opened(tmp_path):
    tiepolicy_dcp.save(tmp_path / "other", model=TiedPair())
    folder = tiepolicy_dcp.save(tmp_path / "c", model=TiedPair())
    metadata = (folder / ".metadata").read_bytes()
    inside = b"\x8c\x0c__0_0.distcp"
    assert inside in metadata
    outside = bytes([0x8C, len("../other/__0_0.distcp")]) + b"../other/__0_0.distcp"
    (folder / ".metadata").write_bytes(rebuilt(metadata, inside, outside))
    with pytest.raises(UntrustedCheckpointError, match="'../other/__0_0.distcp', a file outside the checkpoint"):
        tiepolicy_dcp.load(folder, model=TiedPair(), verify="off")


def rebuilt(metadata, old, new):
    """The pickle with one string replaced and the length of its frame corrected."""
    changed = metadata.replace(old, new)
    assert changed[2:3] == b"\x95"
    length = int.from_bytes(changed[3:11], "little") + len(new) - len(old)
    return changed[:3] + length.to_bytes(8, "little") + changed[11:]


def test_what_another_model_owns_is_not_written_and_not_left_as_it_is(tmp_path):
    """Loading says so, where the draft would otherwise keep random weights."""
    target, draft = TiedPair(), FlaggedPair(flag=False, vocab_size=12, draft_vocab_size=5, hidden_size=4)
    draft.embed_tokens = target.embed_tokens
    plan = tiepolicy.plan(draft, external={"target": target}, digests=True)
    tiepolicy_dcp.save(tmp_path / "draft", model=draft, plan=plan)
    fresh = FlaggedPair(flag=False, vocab_size=12, draft_vocab_size=5, hidden_size=4)
    before = fresh.lm_head.weight.detach().clone()
    with pytest.raises(CheckpointError, match=f"{EMBED} belongs to target:{EMBED} and is to be taken from there"):
        tiepolicy_dcp.load(tmp_path / "draft", model=fresh)
    assert torch.equal(before, fresh.lm_head.weight.detach())
