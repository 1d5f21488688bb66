"""The demonstration, whole."""

import re

import pytest

from eagle3.cli import main


@pytest.mark.slow
@pytest.mark.dist
def test_the_demo_makes_a_target_trains_a_draft_resumes_it_and_shows_what_came_out(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "demo"
    assert 0 == main(["demo", "--out", str(out)])
    output = capfd.readouterr()
    lines = {
        cells[0].strip(): cells[1].strip()
        for cells in re.findall(r"^\W (\S.*?) +\W (.*?) *\W$", output.out, re.MULTILINE)
    }
    for kind in ("simulated", "real"):
        assert 2.5 <= float(lines[f"accept length, {kind}"].split(" of ")[0]) <= 6
    assert "16 of 16 answers token by token" == lines["identical greedy output"]
    assert 0 < float(lines["speed-up over generate"].split(" ")[0])
    for path in ("report.png", "report.html", "export/model.safetensors", "export-speculators/config.json"):
        assert (out / path).stat().st_size > 0
    assert "lm_head.weight is model.embed_tokens.weight" in output.out
    assert "refused: lm_head.weight (512, 128) and embed_tokens.weight" in output.out
    assert f"Resuming from checkpoint: {out}/run/checkpoints/epoch_2_step_75" in output.err
    assert f"Saved checkpoint to {out}/run/checkpoints/epoch_3_step_150" in output.err


def test_the_demo_does_not_write_into_a_folder_that_exists(tmp_path, capfd):
    assert 2 == main(["demo", "--out", str(tmp_path)])
    expected = f"{tmp_path} exists already, perhaps of a demo that was cut; delete it, or choose another --out."
    assert expected in capfd.readouterr().err
