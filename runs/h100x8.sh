#!/usr/bin/env bash
# 8xH100, the challenge's setting: FineWeb, 600 s of training, three seeds, each scored and certified.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" data/download_fineweb.py --variant sp1024 --train-shards 80
torchrun=("$python" -m torch.distributed.run --standalone --nproc_per_node="${GPUS:-8}")
export EXTRA_CODE_FILES
EXTRA_CODE_FILES=$(find eval_final.py fairway -name '*.py' | paste -sd,)
for seed in ${SEEDS:-1337 42 2025}; do
  export OUT_DIR=out/seed$seed
  PRESET=${PRESET:-consensus} SEED=$seed RUN_ID=train_seed$seed "${torchrun[@]}" train_gpt.py
  CHECKPOINT=$(ls "$OUT_DIR"/final_model.*.ptz) "${torchrun[@]}" eval_final.py --certify
done
