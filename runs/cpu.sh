#!/usr/bin/env bash
# A laptop or any two cores: embedded corpus, a small model, artifact and score, in about five minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
make run
