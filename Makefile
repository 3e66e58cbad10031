# Every target first brings .venv up to date; if nothing changed, that is instant and needs no network.
#   make install [PYTHON=python3.12]   the environment alone
#   make demo    [DEMO_TEXT="a.txt b.txt"]  pretrain a small METRO model on this machine; this
#                                      installs only what pretraining needs
#   make test    [SLOW=1] [ARGS="-k masking"]
#   make docs                          the documentation, in site/
#   make faults                        kill and damage everything; its tables go to docs/reliability.md
#   make check | bench | clean
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BASE   := $(VENV)/.base
STAMP  := $(VENV)/.installed
EXTRAS := fairseq-needs,triton,dev
TORCH  := torch==2.13.0
# Idle OpenMP threads sleep instead of spinning: with another busy process on the same cores, spinning
# made a training step of the tiny model about seven times slower.
export OMP_WAIT_POLICY ?= passive
PIP    := $(BIN)/python -m pip -qq --disable-pip-version-check

# Pinned to the reviewed sdist and the only published wheel.
FAIRSEQ := fairseq-fixed==0.12.3.1 \
  --hash=sha256:c607577a54ab30e2ee0f0b0a754ea5cdbc6ad0a9f99a1726638a2201445bc1cc \
  --hash=sha256:38d6732118a4ff568aafa27a7667b51e4e74f23276c7da3600405532cc2d36e0

.PHONY: install demo test check docs bench faults clean
.DELETE_ON_ERROR:

install: $(STAMP)

# .unfinished marks an install in progress: if it exists at the start, the last install was
# interrupted, and the environment is rebuilt from scratch.
$(BASE): pyproject.toml setup.py constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: make install PYTHON=/path/to/python3.11"; exit 1; }
	@echo "install: environment in $(VENV)"
	@if [ -e $(VENV)/.unfinished ]; then $(PYTHON) -m venv --clear $(VENV); \
	  elif [ ! -x $(BIN)/python ]; then $(PYTHON) -m venv $(VENV); fi
	@touch $(VENV)/.unfinished
	@$(PIP) install -c constraints.txt pip setuptools wheel
	@echo "install: $(TORCH)"
	@$(PIP) install -c constraints.txt $(TORCH)
	@echo "install: metro-t5[train]"
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[train]'
	@mv $(VENV)/.unfinished $@
	@touch $@

$(STAMP): $(BASE)
	@mv $(BASE) $(VENV)/.unfinished
	@echo "install: metro-t5[$(EXTRAS)]"
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@echo "install: fairseq (pure Python; a compiled fairseq that is already there is kept)"
	@echo '$(FAIRSEQ)' > $(VENV)/fairseq.txt
	@READTHEDOCS=1 $(PIP) install --no-deps --no-build-isolation -r $(VENV)/fairseq.txt
	@mv $(VENV)/.unfinished $(BASE)
	@touch $@

test: $(STAMP)
	@$(BIN)/python -m pytest $(if $(SLOW),,-m "not slow") $(ARGS)

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy --no-error-summary

docs: $(STAMP)
	@$(BIN)/python -c 'import mkdocs, mkdocstrings_handlers.python' 2>/dev/null || \
	  $(PIP) install -c constraints.txt --no-build-isolation -e '.[docs]'
	@$(BIN)/python -m mkdocs build --strict # with --quiet it would not count its warnings
	@echo "built: site/index.html"

bench: $(STAMP)
	@for file in $$(grep -l write_results benchmarks/*.py | grep -v common.py); do \
	  name=$$(basename $$file .py); echo "== benchmarks.$$name"; \
	  $(BIN)/python -m benchmarks.$$name || exit 1; done

faults: $(STAMP)
	@$(BIN)/python -m tests.faults.kills --page docs/reliability.md
	@$(BIN)/python -m tests.faults.mutations --page docs/reliability.md

demo: $(BASE)
	@$(BIN)/python scripts/demo.py $(if $(DEMO_TEXT),--text $(DEMO_TEXT)) $(ARGS)

clean:
	rm -rf $(VENV) build dist demo outputs site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
