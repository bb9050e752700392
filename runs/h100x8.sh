#!/usr/bin/env bash
# 8xH100, the challenge's setting: FineWeb, 600 s of training, three seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" data/download_fineweb.py --variant sp1024 --train-shards 80
for seed in ${SEEDS:-1337 42 2025}; do
  PRESET=${PRESET:-consensus} SEED=$seed OUT_DIR=out/seed$seed RUN_ID=train_seed$seed \
    "$python" -m torch.distributed.run --standalone --nproc_per_node="${GPUS:-8}" train_gpt.py
done
