#!/usr/bin/env bash
# Compiles the core and the CPU kernels for ARM (NEON through the portable vectors), with clang, warnings
# as errors; nothing is run. Wants the package `ziglang`, which brings compiler and headers for any target.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
object=$(mktemp)
trap 'rm -f "$object"' EXIT
compile() {
  "$python" -m ziglang c++ -target aarch64-linux-gnu -std=c++20 -O2 -Wall -Wextra -Werror -Wno-psabi \
    -fno-math-errno -Icsrc -c -o "$object" "$@"
}
for file in csrc/core/*.cpp csrc/kernels/cpu/*.cpp; do
  case $file in
    */tile.cpp)
      compile -DAPR_ISA=portable "$file"
      compile -DAPR_ISA=amx_emulated -DAPR_MATRIX "$file"
      ;;
    *) compile "$file" ;;
  esac
  echo "aarch64: $file"
done
