# make quickstart   make the glyph data, train OpenCLIP and FastCLIP side by side, print the table (DATA=real: on real pairs)
# make test         all tests, two files at a time, and then those on a real SLURM
# make test-fast    the tests of the loss, the data and the flags (under two minutes)
# make lint         ruff, mypy and shellcheck
# make gpu-check    whether the loss is right on this machine's GPU and what it costs there (nine minutes)
# make soak         kill twenty short runs at random moments and resume them (about 15 minutes)
# Each makes .venv first if it is missing or older than requirements.txt.

# requirements.txt was resolved with Python 3.11; `pip install -e .` serves the other versions.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
LOSSES ?= clip clip-frozen fastclip-v1 fastclip-v3
DATA ?= glyphs
MISMATCHED ?= $(if $(filter glyphs,$(DATA)),0.3)

VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest
export OMP_NUM_THREADS := 1

.PHONY: quickstart test test-fast lint gpu-check soak

quickstart: $(VENV)/.complete
	$(VENV)/bin/python -m benchmarks.quickstart --data $(DATA) $(addprefix --mismatched ,$(MISMATCHED)) --losses $(LOSSES)

test: $(VENV)/.complete
	$(PYTEST) -n 2 --dist loadfile --durations 10 -m "not slurm"
	$(PYTEST) --durations 10 -m slurm  # alone: its 32 processes take 16 GB

test-fast: $(VENV)/.complete
	$(PYTEST) -n 2 --dist loadfile tests/test_house.py tests/loss tests/data tests/openclip/test_flags.py

lint: $(VENV)/.complete
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	@command -v shellcheck >/dev/null || { test "$$(id -u)" = 0 && apt-get install -qq -y shellcheck; } || \
		{ echo "shellcheck is missing: install the package shellcheck (Debian, Ubuntu, Fedora)" >&2; exit 1; }
	shellcheck -x scripts/slurm/*.sh

gpu-check: $(VENV)/.complete
	$(VENV)/bin/python -m benchmarks.gpu

soak: $(VENV)/.complete
	$(VENV)/bin/python tests/support/soak.py

# Marked as complete only after both installs, so that an interrupted one is not taken for a .venv.
$(VENV)/.complete: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -r requirements.txt
	$(VENV)/bin/python -m pip install --no-deps -e .
	touch $@
