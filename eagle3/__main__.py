"""`python -m eagle3`, also for `torchrun -m eagle3`."""

import logging
import os
import sys

from eagle3.cli import main


def run() -> None:
    """Run the command line and end the process with its exit code."""
    code = main()
    if "RANK" in os.environ:
        # gloo's threads may still hold tensors of the last collective; one that lets go of them while the interpreter
        # shuts down aborts a process whose work is done ("terminate called without an active exception", torch 2.13).
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
