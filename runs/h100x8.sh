#!/usr/bin/env bash
# 8xH100, the challenge's setting: FineWeb, 600 s of training, three seeds, each scored and certified, packed as a record.
# AUTHOR and GITHUB_ID name whoever ran it; AGAINST is the record to beat, a folder.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" data/download_fineweb.py --variant sp1024 --train-shards 80
torchrun=("$python" -m torch.distributed.run --standalone --nproc_per_node="${GPUS:-8}")
export EXTRA_CODE_FILES
EXTRA_CODE_FILES=$("$python" -m fairway code)  # so that artifact and shipped code meet the budget together
export -n SEEDS  # the trainer would take it for a misspelt SEED
runs=()
for seed in ${SEEDS:-1337 42 2025}; do
  export OUT_DIR=out/seed$seed
  PRESET=${PRESET:-consensus} SEED=$seed RUN_ID=train_seed$seed "${torchrun[@]}" train_gpt.py
  CHECKPOINT=$(ls "$OUT_DIR"/final_model.*.ptz) "${torchrun[@]}" eval_final.py --certify
  runs+=("$OUT_DIR")
done
"$python" -m fairway pack "${runs[@]}" --track 10min_16mb --slug "${SLUG:-Fairway}" --author "${AUTHOR:-unnamed}" \
  --github-id "${GITHUB_ID:-unnamed}" ${AGAINST:+--against "$AGAINST"}
"$python" -m fairway report "${runs[@]}"
