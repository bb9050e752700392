#!/usr/bin/env bash
# Run the fast tests of trainer and scorer on other versions of torch: `make test-torch`, or
# `tests/other_torch.sh 2.12 2.13`. Each version is installed into an environment that takes all
# other packages from .venv and is deleted afterwards; PyPI's wheels for Linux bring CUDA, some 3 GB
# to load and 7 GB of disk. Prints one line a version, and the rest to out/torch/VERSION.txt. The
# exit code is 1 if a test failed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
(($#)) || set -- 2.11 2.12 2.13
failed=0
for version in "$@"; do
  env=$PWD/out/torch/$version log=out/torch/$version.txt
  mkdir -p out/torch && rm -rf "$env"
  "$python" -m venv --without-pip "$env"
  site=$(echo "$env"/lib/python*/site-packages)
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/rest.pth"
  if ! "$python" -m pip install --disable-pip-version-check --no-warn-conflicts --no-compile \
    --target "$site" "torch==$version.*" >"$log" 2>&1; then
    echo "torch $version: cannot be installed here: $(tail -1 "$log")"
  else
    name=$("$env/bin/python" -c 'import torch; print(torch.__version__)')
    OMP_NUM_THREADS=1 "$env/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile \
      --no-loadscope-reorder -m "not slow and not apple" tests/trainer tests/scoring \
      >>"$log" 2>&1 || failed=1
    echo "torch $name: $(tail -1 "$log")"
  fi
  rm -rf "$env"
done
exit $failed
