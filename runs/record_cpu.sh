#!/usr/bin/env bash
# Three seeds of PRESET=cpu, each scored and certified, packed as a record and checked: a quarter of an hour on two cores.
# AUTHOR and GITHUB_ID name whoever ran it.
set -euo pipefail
cd "$(dirname "$0")/.."
make data
export -n SEEDS  # the trainer would take it for a misspelt SEED
python=.venv/bin/python
export DATA_PATH=data/embedded EXTRA_CODE_FILES
EXTRA_CODE_FILES=$("$python" -m fairway code)
runs=()
export SIZE_BUDGET_BYTES=1070000  # so that the artifact, which the record carries, is below 1 MB
for seed in ${SEEDS:-1337 42 2025}; do
  export OUT_DIR=out/cpu_seed$seed
  PRESET=cpu SEED=$seed RUN_ID=train_seed$seed "$python" train_gpt.py
  CHECKPOINT=$OUT_DIR/final_model.int6.ptz "$python" eval_final.py --certify
  runs+=("$OUT_DIR")
done
"$python" -m fairway pack "${runs[@]}" --track non_record_16mb --slug "${SLUG:-CPU_150s}" --with-artifact \
  --author "${AUTHOR:-unnamed}" --github-id "${GITHUB_ID:-unnamed}" --out "${RECORDS:-out/records}" --replace
"$python" -m fairway check --run "${RECORDS:-out/records}"/track_non_record_16mb/*_"${SLUG:-CPU_150s}"
