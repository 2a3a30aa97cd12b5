# Two commands on a fresh machine with Python 3.11+: `make demo` runs the main job, `make test` every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# CPU wheels: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
TORCH ?= torch==2.13.0

.PHONY: demo test clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	@scripts/demo $(BIN)

test: $(VENV)/.installed-dev
	@scripts/check $(BIN)

clean:
	rm -rf $(VENV) .types build dist *.egg-info
