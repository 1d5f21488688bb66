"""Fuzz one reader, guided by the code it reaches: `python tests/fuzz.py TARGET [SECONDS]`.

What goes wrong is left in `crash-*` or `timeout-*` in the current folder: mend it, and keep the file in
`tests/fuzz_examples/TARGET`, which the test suite runs.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tiepolicy", "tiepolicy_dcp", "json", "zipfile"]):
    import fuzz_targets


def main() -> None:
    target, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(fuzz_targets.seeds(target)):
            (Path(corpus) / str(number)).write_bytes(seed)
        # Ten seconds and two gigabytes are far above what any input of 64 kB may take.
        limits = [f"-max_total_time={seconds}", "-max_len=65536", "-timeout=10", "-rss_limit_mb=3000"]
        atheris.Setup([sys.argv[0], corpus, *limits], lambda data: fuzz_targets.run(target, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
