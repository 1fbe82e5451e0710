#!/usr/bin/env bash
# Makes bench/peers: FlashInfer without its sources, and the modules that the benchmarks call, compiled here for
# compute capability 9.0; for a machine that reaches no network (`carry` bench/peers there). Wants nvcc, no GPU, a
# package index; about 10 minutes. The modules do not depend on torch or on the version of Python.
#   bash bench/peers.sh [PYTHON_VERSION of that machine, default 3.12]
#   bash bench/peers.sh llama OUT.json   llama.cpp from source (5 minutes on two cores), beside `python -m apr bench loop`
# PYTHON: an interpreter with apr (default .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")"
if [ "${1:-}" = llama ]; then
  out=$(realpath -m "${2:?usage: peers.sh llama OUT.json}")
  python=$(realpath -s "${PYTHON:-../.venv/bin/python}")
  folder=${LLAMA:-$(mktemp -d)} # LLAMA: a folder that keeps what was built
  test -d "$folder/venv" || python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install -q llama-cpp-python gguf
  site=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" llama.py export "$folder/model.gguf" "$site"
  "$folder/venv/bin/python" llama.py measure "$folder/model.gguf" "$out"
  exit
fi
version=${1:-3.12}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install -q torch==2.13.0 apache-tvm-ffi ninja jinja2 filelock nvidia-ml-py einops tabulate tqdm requests \
  packaging click numpy nvidia-curand
"$pip" install -q --no-deps flashinfer-python
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# Modules link to the driver's library; where there is no driver, to an empty one of its name.
mkdir "$work/stub"
gcc -shared -Wl,-soname,libcuda.so.1 -x c /dev/null -o "$work/stub/libcuda.so"
CPATH=$(dirname "$(find "$site" -name curand_kernel.h | head -1)") LIBRARY_PATH="$work/stub" PATH="$work/venv/bin:$PATH" FLASHINFER_CUDA_ARCH_LIST=9.0a \
  CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" \
  FLASHINFER_WORKSPACE_BASE="$work/cache" "$work/venv/bin/python" - <<'PYTHON'
import torch
from flashinfer import jit

b, i = torch.bfloat16, torch.int32
specs = [jit.gen_batch_prefill_module(x, b, b, b, i, 128, 128, 0, False, False, False) for x in ("fa2", "fa3")]
specs += [jit.gen_batch_attention_module(b, b, b, i, 128, 128, 0, False, False)]
specs += [jit.cascade.gen_cascade_module(), jit.page.gen_page_module()]
for spec in specs:
    spec.build(False)
    print("built", spec.name, flush=True)
PYTHON

rm -rf peers
mkdir peers
(cd "$site" && find flashinfer -type f \( -name '*.py' -o -name '*.json' \) -not -path 'flashinfer/data/*' -print0 |
  tar c --null -T -) | tar x -C peers
mkdir -p peers/flashinfer/data/aot peers/flashinfer/data/csrc
# Read, not compiled, when a module is asked for.
find "$site/flashinfer/data/csrc" -maxdepth 1 -type f \( -name '*.jinja' -o -name 'batch_*' -o -name 'cascade*' \
  -o -name 'page*' \) -exec cp {} peers/flashinfer/data/csrc/ \;
find "$work/cache" -name '*.so' | while read -r module; do
  name=$(basename "$module" .so)
  mkdir -p "peers/flashinfer/data/aot/$name"
  cp "$module" "peers/flashinfer/data/aot/$name/"
done
"$pip" install -q --no-deps --only-binary=:all: --python-version "$version" --target peers \
  apache-tvm-ffi nvidia-ml-py einops tabulate click
find peers -name '__pycache__' -type d -prune -exec rm -rf {} +
tar cz peers | wc -c | awk '{printf "bench/peers: %.1f MiB compressed\n", $1 / 1048576}'
