#!/usr/bin/env bash
# sanitize.sh memory: builds core and kernels with address and undefined-behaviour checks and runs the core's and the
# kernels' tests on them: reads and writes outside of pools, pages and tables end the run. sanitize.sh threads: with a
# thread sanitizer, for what several Python threads do at once (tests/threads_program.py); it must also see a race that
# is there. Wants g++ and its libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() {  # folder, flags, more flags of the bindings
  "$python" -m pip install -q --no-deps --target "$work/$1" --config-settings=build-dir="$work/build-$1" \
    --config-settings=cmake.define.APR_CUDA=OFF --config-settings=cmake.build-type=None \
    --config-settings=cmake.define.APR_BINDINGS_OPTIONS="${3:-}" \
    --config-settings=cmake.define.CMAKE_CXX_FLAGS="-O1 -g1 -DNDEBUG $2" .
}

library() { g++ -print-file-name="$1.so"; }

memory() {
  # Not the bindings, which would take most of the time.
  build memory "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=vptr,alignment" \
    -fno-sanitize=all
  # torch keeps memory to the end, and a forked child of a checked process is another story.
  ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(library libasan) $(library libubsan)" \
    PYTHONPATH="$work/memory" "$python" -m pytest -q -n 2 -p no:cacheprovider \
    tests/test_ops.py tests/test_kernel_numbers.py tests/test_kernel_bits.py tests/test_core.py \
    --deselect tests/test_kernel_bits.py::test_a_forked_process_computes_alone
}

threads() {
  build threads -fsanitize=thread
  # torch is not built with it, nor is OpenMP: how their threads wait for each other cannot be seen.
  printf 'race:libtorch_cpu.so\nrace:libgomp.so\nrace:_dl_deallocate_tls\n' > "$work/suppressions"
  together > /dev/null
  if together race > "$work/race" 2>&1 || ! grep -q "ThreadSanitizer: data race" "$work/race"; then
    echo "the thread sanitizer saw no race where there is one"
    exit 1
  fi
  echo "threads: no race, and one seen where there is one"
}

together() {
  TSAN_OPTIONS="suppressions=$work/suppressions exitcode=66" LD_PRELOAD="$(library libtsan)" \
    PYTHONPATH="$work/threads" OMP_NUM_THREADS=1 "$python" tests/threads_program.py "$@"
}

for what in "$@"; do "$what"; done
