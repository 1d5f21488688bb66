"""Runs a script of `examples/` under torchrun, and ends its process as all ranks of the tests end."""

import runpy
import sys

from torchrun import leave

if __name__ == "__main__":
    runpy.run_path(sys.argv[1], run_name="__main__")
    leave()
