#!/usr/bin/env bash
# Builds the extension with address and undefined-behaviour checks and runs the core's and the kernels' tests
# on it: reads and writes outside of pools, pages and tables end the run. Wants g++ and its libasan.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags="-O1 -g -DNDEBUG -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=vptr,alignment"
"$python" -m pip install -q --no-deps --target "$work/site" --config-settings=build-dir="$work/build" \
  --config-settings=cmake.define.APR_CUDA=OFF --config-settings=cmake.build-type=None --config-settings=cmake.define.CMAKE_CXX_FLAGS="$flags" .
# torch keeps memory to the end, and a forked child of a checked process is another story.
export ASAN_OPTIONS=detect_leaks=0
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
PYTHONPATH="$work/site" "$python" -m pytest -q -n 2 -p no:cacheprovider \
  tests/test_ops.py tests/test_kernel_numbers.py tests/test_kernel_bits.py tests/test_core.py \
  --deselect tests/test_kernel_bits.py::test_a_forked_process_computes_alone
