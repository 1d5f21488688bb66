"""Two checkpoints side by side: names, shapes, dtypes, ties and recorded digests."""

import torch
from safetensors.torch import save_file, save_model

import tiepolicy_dcp
from models import TiedPair
from tiepolicy._contents import read_contents
from tiepolicy._diff import diff

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def test_differences_are_names_shapes_dtypes_and_ties(tmp_path):
    save_model(TiedPair(), tmp_path / "tied.safetensors")
    save_model(TiedPair(tied=False), tmp_path / "untied.safetensors")
    save_file({EMBED: torch.zeros(12, 4).half(), "more": torch.zeros(1)}, tmp_path / "other.safetensors")
    tied, untied, other = (read_contents(tmp_path / f"{name}.safetensors") for name in ("tied", "untied", "other"))
    assert [(HEAD, "tied differently", f"(12, 4) float32 = {EMBED}", "(12, 4) float32")] == [
        (d.name, d.kind, d.a, d.b) for d in diff(tied, untied).differences
    ]
    assert [(EMBED, "differs"), (HEAD, "only in A"), ("more", "only in B")] == [
        (d.name, d.kind) for d in diff(tied, other).differences
    ]
    assert [] == diff(tied, tied).differences


def test_the_model_of_a_dcp_folder_is_compared_with_a_file_of_the_model(tmp_path):
    model = TiedPair()
    folder = tiepolicy_dcp.save(tmp_path / "c", model=model, optimizer=torch.optim.AdamW(model.parameters()))
    save_model(model, tmp_path / "m.safetensors")
    assert [] == diff(read_contents(folder), read_contents(tmp_path / "m.safetensors")).differences
    other = read_contents(tiepolicy_dcp.save(tmp_path / "d", model=model))
    assert {"only in A", "file differs"} == {d.kind for d in diff(read_contents(folder), other).differences}
