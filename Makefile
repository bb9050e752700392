# make run        install, prepare the embedded corpus, train (PRESET=cpu), score and certify
# make report     draw the pages and pictures of that run
# make test       the fast tests; make test-apple: those of MLX and CoreML, on Linux too;
#                 make test-slow: those behind the marker; make test-torch: other versions of torch
# make lint       layout and lint
# make bench      every figure of docs/RESULTS.md that fits this machine
# make apple      also install what train_gpt_mlx.py and fairway export-coreml need
# make methods    also install what some rows of fairway compare need: ONNX Runtime, torchao, Ray

PYTHON ?= python3
PRESET ?= cpu
OUT := $(if $(filter cpu,$(PRESET)),.,out/$(PRESET))
CERTIFY_SECONDS := $(if $(filter smoke,$(PRESET)),5,30)
BIN := .venv/bin
INSTALLED := .venv/.installed
APPLE := .venv/.installed-apple
METHODS := .venv/.installed-methods
CORPUS := data/embedded/manifest.json
# On a shared machine, OpenMP threads that spin long make two threads slower than one. Threads that
# never spin are always slower.
export GOMP_SPINCOUNT := 10000

.PHONY: run report data apple methods test test-apple test-slow test-torch lint bench clean
.DELETE_ON_ERROR:

run: $(OUT)/logs/eval.done
	@grep -E '^(Total submission size|final_.*_exact)' $(OUT)/logs/$(PRESET).txt
	@grep -E '^(ladder|val_bpb):' $(OUT)/logs/eval.txt
	@echo "artifact: $$(ls $(OUT)/final_model.*.ptz)   logs: $(OUT)/logs/$(PRESET).txt, eval.txt   scores: $(OUT)/eval/"

# Trained once for each preset; again when the trainer or the corpus changes.
$(OUT)/logs/$(PRESET).done: train_gpt.py $(CORPUS)
	@mkdir -p $(OUT)/logs
	PRESET=$(PRESET) OUT_DIR=$(OUT) RUN_ID=$(PRESET) DATA_PATH=data/embedded $(BIN)/python train_gpt.py
	@touch $@

# Scored again when the artifact or the scorer changes; columns that are still right are read from disk.
$(OUT)/logs/eval.done: $(OUT)/logs/$(PRESET).done eval_final.py $(shell find fairway -name '*.py' -not -path 'fairway/re*')
	CHECKPOINT=$$(ls $(OUT)/final_model.*.ptz) OUT_DIR=$(OUT) DATA_PATH=data/embedded EVAL_STRIDE=128 \
	  CERTIFY_SECONDS=$(CERTIFY_SECONDS) $(BIN)/python eval_final.py --certify --compare
	@touch $@

report: $(OUT)/logs/eval.done
	$(BIN)/fairway report $(OUT) --out $(OUT)/report

data: $(CORPUS)

$(CORPUS): $(INSTALLED) $(wildcard data/*.py)
	$(BIN)/python data/prepare.py --embedded --case-ops
	@touch $@

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; PYTHON=$(PYTHON) is $$($(PYTHON) --version). Set PYTHON=python3.x"; exit 1; }
	@echo "installing the requirements into .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

apple: $(APPLE)

$(APPLE): requirements-apple.txt $(INSTALLED)
	@echo "installing requirements-apple.txt into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-apple.txt
	@touch $@

methods: $(METHODS)

$(METHODS): requirements-methods.txt $(INSTALLED)
	@echo "installing requirements-methods.txt into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-methods.txt
	@touch $@

# One process a core, four at most, a file of tests each, in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
  --no-loadscope-reorder

test: $(INSTALLED)
	$(PYTEST) -m "not slow and not apple"

# MLX would compile a shared object for each kernel with g++ on Linux, a minute and a half for the first step.
test-apple: $(APPLE)
	MLX_DISABLE_COMPILE=1 $(PYTEST) -m "apple and not slow"

test-torch: $(INSTALLED)
	tests/other_torch.sh

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: $(OUT)/logs/eval.done $(APPLE)
	$(BIN)/python data/prepare.py --embedded --case-ops --tokenizer train:1024 --out out/embedded1024
	$(BIN)/python bench/artifact.py
	$(BIN)/python bench/export.py
	$(BIN)/python bench/ladder.py --steps 500 --variants baseline,consensus,frontier \
	  --data out/embedded1024 --case-data data/embedded
	$(BIN)/python bench/low_bits.py
	$(BIN)/python bench/experts.py
	$(BIN)/python bench/scoring.py
	$(BIN)/python bench/mixing.py
	$(BIN)/python bench/adapt.py
	$(BIN)/python bench/correction.py
	$(BIN)/python bench/compress.py
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/records.py
	$(BIN)/python bench/planning.py
	$(BIN)/python bench/mlx.py
	$(BIN)/python bench/coreml.py

clean:
	rm -rf .venv out data/embedded logs eval report coreml runs.jsonl final_model.* checkpoint.pt checkpoint_mlx.pt \
	  .pytest_cache .ruff_cache .hypothesis
