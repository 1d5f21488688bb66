"""What numbers were measured with, for the JSON of a benchmark."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def environment(*packages: str) -> dict[str, object]:
    """Versions, hardware and commit; on a copy that is not the one of its git, the variable COMMIT says which it is."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        commit = ""
    return {
        "commit": os.environ.get("COMMIT") or commit,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", *packages)},
    }
