#!/usr/bin/env bash
# Apple Silicon through PyTorch's MPS device: the cpu preset's model, a minute longer. Not run on a Mac by us.
set -euo pipefail
cd "$(dirname "$0")/.."
make data
PRESET=cpu DEVICE=mps MAX_WALLCLOCK_SECONDS=200 RUN_ID=mac .venv/bin/python train_gpt.py
DEVICE=mps DATA_PATH=data/embedded .venv/bin/python eval_final.py --certify
