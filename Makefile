# Everything here sets itself up: on a fresh machine with Python 3.11+, `make demo` or `make test` is the only command.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
# What the tests need of the package; the rest are its dependency groups, which older releases of pip do not know.
EXTRAS := eagle3,parquet,testing
PIP := pip>=25.1

.PHONY: demo test slow quick faults lint types docs wheel wheel-test compat fuzz audit setup clean

demo: setup
	rm -rf $(DEMO)
	$(BIN)/eagle3 demo --out $(DEMO)

test: setup
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(BIN)/python -m pytest -n 2 -m "not slow"

slow: setup
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

quick: setup
	$(BIN)/python -m pytest -n 2 -m "not slow and not dist"

# Kills, failing disks, damage and hostile files, done to real processes; then the table of docs/reliability.md.
faults: setup
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(BIN)/python -m pytest tests/faults
	PYTHONPATH=.:adapters:tests $(BIN)/python tests/faults/table.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy
	$(BIN)/pyright

# The site, in build/docs. Each warning is an error: a link that leads nowhere, a page that is missing from the navigation.
docs: setup
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet --fresh-env docs build/docs
	@echo build/docs/index.html

# What is installed, small enough to be read: a wheel that grows past this says something twice.
MOST_WHEEL_BYTES := 400000
wheel: setup
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel .
	@size=$$(cat build/wheel/*.whl | wc -c); [ $$size -le $(MOST_WHEEL_BYTES) ] || { echo "make wheel: the wheel has\
	 $$size bytes and may have $(MOST_WHEEL_BYTES): say things once, or take something away"; exit 1; }

# The tests once more, on what is installed: in a folder in which neither they nor their processes find these packages.
INSTALLED := -P -m pytest -c $(CURDIR)/pyproject.toml -o pythonpath=tests -n 2 -m "not slow" $(CURDIR)/tests
wheel-test: wheel
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet -c constraints.txt "$(PIP)"
	build/wheel/venv/bin/python -m pip install --quiet -c constraints.txt "$$(ls build/wheel/*.whl)[$(EXTRAS)]" --group test
	cd build/wheel && HYPOTHESIS_PROFILE=ci venv/bin/python $(INSTALLED)

# With other versions: make compat PYTHON=python3.12 TORCH=2.11.0 TRANSFORMERS=5.17.0. The newest that the package allows,
# where none is given. All other pins hold, but for two that transformers pins itself.
COMPAT := build/compat
compat:
	$(PYTHON) -m venv --clear $(COMPAT)
	grep -Ev '^(torch|transformers|huggingface_hub|tokenizers)==' constraints.txt > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/python -m pip install --quiet -c $(COMPAT)/constraints.txt "$(PIP)"
	$(COMPAT)/bin/python -m pip install --quiet -c $(COMPAT)/constraints.txt \
		torch$(TORCH:%===%) transformers$(TRANSFORMERS:%===%) ".[$(EXTRAS)]" --group test
	cd $(COMPAT) && HYPOTHESIS_PROFILE=ci bin/python $(INSTALLED)

# The readers of untrusted bytes, one after the other, guided by the code they reach; see tests/fuzz.py.
FUZZ_SECONDS ?= 60
fuzz: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt --group fuzz
	mkdir -p build/fuzz
	cd build/fuzz && for target in manifest header index metadata archive reconcile; do \
		PYTHONPATH=$(CURDIR):$(CURDIR)/adapters:$(CURDIR)/tests \
		$(CURDIR)/$(BIN)/python $(CURDIR)/tests/fuzz.py $$target $(FUZZ_SECONDS) || exit 1; \
	done

# Known vulnerabilities of what the tests run with. Asks the public database of advisories, and says so where it is not reachable.
AUDIT := build/audit
audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet "pip-audit>=2.9"
	@$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt \
		|| { echo "make audit: found the above, or could not reach the database of advisories"; exit 1; }

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(PIP)" hatchling editables
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[$(EXTRAS)]" --group dev
	touch $@

clean:
	rm -rf build dist $(VENV)
