# make quickstart   make the glyph data, train OpenCLIP and FastCLIP side by side, print the table
# make test         all tests, two files at a time, and then those on a real SLURM
# make soak         kill twenty short runs at random moments and resume them (about 15 minutes)
# make lint         ruff and shellcheck
# Each makes .venv first if it is missing or older than requirements.txt.

# requirements.txt was resolved with Python 3.11; `pip install -e .` serves the other versions.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
LOSSES ?= clip clip-frozen fastclip-v1 fastclip-v3
MISMATCHED ?= 0.3

VENV := .venv
export OMP_NUM_THREADS := 1

.PHONY: quickstart test soak lint

quickstart: $(VENV)/.complete
	$(VENV)/bin/python -m benchmarks.quickstart --mismatched $(MISMATCHED) --losses $(LOSSES)

test: $(VENV)/.complete
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slurm"
	$(VENV)/bin/python -m pytest -m slurm  # alone: its 32 processes take 16 GB

soak: $(VENV)/.complete
	$(VENV)/bin/python tests/support/soak.py

lint: $(VENV)/.complete
	$(VENV)/bin/ruff check .
	@command -v shellcheck >/dev/null || { test "$$(id -u)" = 0 && apt-get install -qq -y shellcheck; } || \
		{ echo "shellcheck is missing: install the package shellcheck (Debian, Ubuntu, Fedora)" >&2; exit 1; }
	shellcheck -x scripts/slurm/*.sh

# Marked as complete only after both installs, so that an interrupted one is not taken for a .venv.
$(VENV)/.complete: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -r requirements.txt
	$(VENV)/bin/python -m pip install --no-deps -e .
	touch $@
