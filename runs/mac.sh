#!/usr/bin/env bash
# Apple Silicon, from training to text: train the cpu preset with MLX, score and certify its artifact,
# export it for the Neural Engine, compare the export with PyTorch, and write some text.
# We have not run this on a Mac. On Linux the same commands run with MLX's CPU build and an
# interpreter of the exported shards, many times slower. After Ctrl-C, RESUME=1 continues the
# training. To train with PyTorch on the Mac's GPU instead: DEVICE=mps and train_gpt.py.
set -euo pipefail
cd "$(dirname "$0")/.."
make data apple
export DATA_PATH=data/embedded OUT_DIR=out/mac
PRESET=cpu RUN_ID=mac .venv/bin/python train_gpt_mlx.py
artifact=$(ls "$OUT_DIR"/final_model.*.ptz)
CHECKPOINT=$artifact .venv/bin/python eval_final.py --certify
.venv/bin/fairway export-coreml --artifact "$artifact" --out "$OUT_DIR/coreml" --quantise artifact --check
.venv/bin/fairway generate --artifact "$artifact" --engine coreml --shards "$OUT_DIR/coreml" --draft ngram \
  --strategy greedy --prompt "The people of the United States"
if [ "$(uname)" = Darwin ]; then
  .venv/bin/fairway export-coreml --artifact "$artifact" --out "$OUT_DIR/coreml" --audit
  .venv/bin/fairway export-coreml --artifact "$artifact" --out "$OUT_DIR/coreml" --bench
fi
