"""Step 30, `python -m tiepolicy`: the commands of `tiepolicy`."""

import sys

from tiepolicy._cli import main

if __name__ == "__main__":
    sys.exit(main())
