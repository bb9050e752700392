#!/usr/bin/env bash
# Apple Silicon: the cpu preset's model trained with MLX, its artifact scored and certified. Not run on a Mac by us; on
# Linux MLX's CPU build runs the same commands, many times slower. After Ctrl-C, RESUME=1 in
# the environment continues. The same through PyTorch: DEVICE=mps and train_gpt.py.
set -euo pipefail
cd "$(dirname "$0")/.."
make data
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-apple.txt
export DATA_PATH=data/embedded OUT_DIR=out/mac
PRESET=cpu RUN_ID=mac .venv/bin/python train_gpt_mlx.py
CHECKPOINT=$(ls "$OUT_DIR"/final_model.*.ptz) .venv/bin/python eval_final.py --certify
