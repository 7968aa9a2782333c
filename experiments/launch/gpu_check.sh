#!/usr/bin/env bash
# What only a GPU can show, in one call: `bash experiments/launch/gpu_check.sh OUTPUT_DIR`.
# Codec speed beside a copy, train and compare with simulated workers, many workers, the tests that
# need one device. Uses the JAX that is installed.
set -uo pipefail
out=${1:?usage: gpu_check.sh OUTPUT_DIR}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 JAXCOMM_TEST_PLATFORM=gpu XLA_PYTHON_CLIENT_PREALLOCATE=false
run() { echo "== $*"; timeout 400 "$@"; echo "exit $?"; }
{
  run python3 -c "import jax; print(jax.__version__, jax.devices())"
  run python3 -m experiments.bench codec
  run python3 -m experiments.train --config=configs/digits_ef21.py --config.mode=simulate \
    --workdir="$out/digits_ef21"
  run python3 -m experiments.train --config=configs/lm_ef21.py --config.mode=simulate \
    --config.workers=64 --config.batch_size=512 --config.steps=100 --workdir="$out/lm_64"
  run python3 -m experiments.compare --seeds=2 --workdir="$out/compare" --set=mode=simulate \
    --configs=configs/digits_dense.py,configs/digits_ef21.py,configs/digits_one_bit_adam.py
  run python3 -m pytest -n0 -q tests/test_compressors.py tests/test_ef21_reference.py
} 2>&1 | tee "$out/log.txt"
