"""The pages on making a draft: their commands and settings exist, and the SLURM script trains and takes up a run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eagle3.cli import COMMANDS, _named
from eagle3.options import read_settings
from eagle3_runs import make_run_world

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("draft-*.md"))]
COMMAND = re.compile(r"^(?:\$ |torchrun .*-m )?eagle3 (.+)$", re.MULTILINE)
#: Stand-ins for two commands of SLURM, on one node: the name of a host, and one task that is run here.
SLURM = {"scontrol": "echo localhost", "srun": 'shift; exec "$@"'}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_take_the_options_that_it_gives_them(page, tmp_path, monkeypatch):
    prepare = (ROOT / "docs" / "draft-prepare.md").read_text()
    (tmp_path / "run.yaml").write_text(re.search(r"```yaml\n(.*?)```", prepare, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    lines = COMMAND.findall(page.read_text())
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        read_settings(COMMANDS[name].settings, _named(COMMANDS[name], arguments))
    assert lines


@pytest.mark.slow
@pytest.mark.dist
def test_the_slurm_script_trains_and_takes_up_its_run_when_it_is_submitted_again(tmp_path):
    target, conversations = make_run_world(tmp_path)
    settings = {
        "out": "not here",
        "target": {"model": str(target)},
        "data": {"train": str(conversations), "max_length": 48},
        "draft": {"vocab_size": 96},
        "unroll": {"steps": 2},
        "train": {"epochs": 2, "batch_size": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {**SLURM, "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"'}.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": "1",
    }
    command = ["bash", str(ROOT / "examples" / "train.sbatch"), "run.yaml", "out"]
    ends = []
    for _ in range(2):
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert 0 == result.returncode, result.stderr
        ends.append(result.stderr)
    assert "Training starts" in ends[0]
    assert "Training starts" not in ends[1]
