#!/usr/bin/env bash
# Apple Silicon: the cpu preset's model trained with MLX, its artifact scored and certified, exported for the Neural Engine,
# compared with PyTorch, and asked for some text. Not run on a Mac by us; on Linux MLX's CPU build and the interpreter of
# the shards run the same commands, many times slower. After Ctrl-C, RESUME=1 in the environment continues. The same
# training through PyTorch: DEVICE=mps and train_gpt.py.
set -euo pipefail
cd "$(dirname "$0")/.."
make data apple
export DATA_PATH=data/embedded OUT_DIR=out/mac
PRESET=cpu RUN_ID=mac .venv/bin/python train_gpt_mlx.py
artifact=$(ls "$OUT_DIR"/final_model.*.ptz)
CHECKPOINT=$artifact .venv/bin/python eval_final.py --certify
.venv/bin/python export_coreml.py --artifact "$artifact" --out "$OUT_DIR/coreml" --quantise artifact --check
.venv/bin/fairway generate --artifact "$artifact" --engine coreml --shards "$OUT_DIR/coreml" --draft ngram \
  --strategy greedy --prompt "The people of the United States"
if [ "$(uname)" = Darwin ]; then
  .venv/bin/python export_coreml.py --artifact "$artifact" --out "$OUT_DIR/coreml" --audit
  .venv/bin/python export_coreml.py --artifact "$artifact" --out "$OUT_DIR/coreml" --bench
fi
