#!/usr/bin/env bash
# One CUDA GPU, ten minutes a preset, on text of your own:  runs/gpu1.sh out/wide TEXT.jsonl.xz…
# Trained, then scored and certified; the code that a record ships is counted in both. With the folder alone, shards that
# are already there are used. Presets: PRESETS="baseline consensus".
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: runs/gpu1.sh FOLDER [TEXT…]}; shift
python=${PYTHON:-.venv/bin/python}
[ $# -eq 0 ] || "$python" data/prepare.py --docs "$@" --tokenizer "${TOKENIZER:-train:1024}" --out "$folder"
export EXTRA_CODE_FILES
EXTRA_CODE_FILES=$("$python" -m fairway code)
export -n PRESETS  # the trainer would take it for a misspelt PRESET
for preset in ${PRESETS:-baseline consensus}; do
  # An eighth of the batch is 98,304 tokens a pass: set MICRO_BATCH_TOKENS=16384 on a card of 24 GB.
  export DATA_PATH=$folder OUT_DIR=out/gpu1_$preset
  PRESET=$preset RUN_ID=gpu1_$preset "$python" train_gpt.py
  CHECKPOINT=$(ls "$OUT_DIR"/final_model.*.ptz) "$python" eval_final.py --certify
done
