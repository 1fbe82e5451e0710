#!/usr/bin/env bash
# Compiles the core and the CPU kernels for ARM (NEON through the portable vectors), with clang, warnings
# as errors; nothing is run. Wants the package `ziglang`, which brings compiler and headers for any target.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
for file in csrc/core/*.cpp csrc/kernels/cpu/*.cpp; do
  case $file in
    */tile.cpp) printf '%s\n' "-DAPR_ISA=portable $file" "-DAPR_ISA=amx_emulated -DAPR_MATRIX $file" ;;
    *) echo "$file" ;;
  esac
done | xargs -P "$(nproc)" -I {} sh -c "echo 'aarch64: {}' && $python -m ziglang c++ -target aarch64-linux-gnu \
  -std=c++20 -O2 -Wall -Wextra -Werror -Wno-psabi -fno-math-errno -Icsrc -c -o '$objects/'\$\$ {}"
