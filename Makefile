# make run    environment, embedded corpus, training (PRESET=cpu), artifact, score
# make test   the fast tests; make test-slow: those behind the marker; make lint; make bench

PYTHON ?= python3
PRESET ?= cpu
OUT := $(if $(filter cpu,$(PRESET)),.,out/$(PRESET))
BIN := .venv/bin
INSTALLED := .venv/.installed
CORPUS := data/embedded/manifest.json
# Threads that spin long make two slower than one on a shared machine; those that never spin do so always.
export GOMP_SPINCOUNT := 10000

.PHONY: run data test test-slow lint bench clean
.DELETE_ON_ERROR:

run: $(OUT)/logs/$(PRESET).done
	@grep -E '^(Total submission size|final_.*_exact)' $(OUT)/logs/$(PRESET).txt
	@echo "artifact: $$(ls $(OUT)/final_model.*.ptz)   log: $(OUT)/logs/$(PRESET).txt"

# Trained once for each preset; again when the trainer or the corpus changes.
$(OUT)/logs/$(PRESET).done: train_gpt.py $(CORPUS)
	@mkdir -p $(OUT)/logs
	PRESET=$(PRESET) OUT_DIR=$(OUT) RUN_ID=$(PRESET) DATA_PATH=data/embedded $(BIN)/python train_gpt.py
	@touch $@

data: $(CORPUS)

$(CORPUS): $(INSTALLED) $(wildcard data/*.py)
	$(BIN)/python data/prepare.py --embedded
	@touch $@

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; PYTHON=$(PYTHON) is $$($(PYTHON) --version). Set PYTHON=python3.x"; exit 1; }
	@echo "installing the requirements into .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .

bench: $(INSTALLED) $(CORPUS)
	$(BIN)/python bench/artifact.py
	$(BIN)/python bench/train.py

clean:
	rm -rf .venv out data/embedded logs final_model.* checkpoint.pt .pytest_cache .ruff_cache .hypothesis
