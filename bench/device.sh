#!/usr/bin/env bash
# Everything that wants a GPU, on a machine that reaches no network: build, tests, compute-sanitizer,
# benchmarks; one JSON file and one table into the folder given. Under 10 minutes; each stage has a limit, and
# one that fails does not hide the others. Wants torch, transformers, nvcc, cmake, ninja, pybind11,
# scikit-build-core, pytest. With bench/peers (bench/peers.sh) FlashInfer is among the peers.
#   bash bench/device.sh OUT
#   bash bench/device.sh train OUT     the adaptive Countdown model instead: build, train, bench; resumes from OUT/model
set -uo pipefail
cd "$(dirname "$0")/.."
training=
if [ "${1:-}" = train ]; then
  training=yes
  shift
fi
out=$(mkdir -p "${1:?usage: device.sh [train] OUT}" && cd "$1" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' /' '--' | tr '[:upper:]' '[:lower:]')
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
case $capability in
  90) architectures=90a-real ;;
  *) architectures=$capability-real ;;
esac
base="$out/$name-$(date +%F)"
log="$out/stages.md"
printf '# Stages on %s\n\n| stage | result | seconds |\n|---|---|---|\n' "$name" >"$log"
failed=0
rm -f "$base.json" "$base.md"

# stage NAME SECONDS COMMAND...: output to OUT/NAME.log, the end of it here where it failed
stage() {
  local what=$1 limit=$2 began=$SECONDS code=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$what.log" 2>&1 || code=$?
  local result=passed
  [ "$code" -eq 0 ] || result="failed ($code)"
  [ "$code" -ne 124 ] || result="stopped after $limit s"
  printf '| %s | %s | %d |\n' "$what" "$result" "$((SECONDS - began))" | tee -a "$log"
  if [ "$code" -ne 0 ]; then
    failed=1
    tail -n 25 "$out/$what.log"
  fi
}

stage device 60 "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
stage build 200 "$python" -m pip install -q --no-build-isolation --no-deps --no-index \
  --target "$work/site" --config-settings=build-dir="$work/build" \
  --config-settings=cmake.define.APR_CUDA=ON \
  --config-settings=cmake.define.APR_CUDA_ARCHITECTURES="$architectures" .
export PYTHONPATH="$work/site:$PWD/tests:$PWD/bench/peers"
if [ -n "$training" ]; then
  stage train 300 "$python" -m apr train countdown --device cuda --steps "${STEPS:-2500}" --out "$out/model"
  stage bench 60 "$python" -m apr bench adaptive --smoke --json "$base-adaptive.json"
  exit "$failed"
fi
stage tests 120 "$python" -m pytest -q -p no:cacheprovider -m cuda tests/test_cuda.py
for tool in memcheck racecheck synccheck; do
  stage "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=apr \
    "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k test_short
done
stage bench 200 "$python" -m apr bench gpu --json "$base.json"
stage problems 60 "$python" -m apr bench gpu --problem hogwild --problem deft --problem trtllm-4096 --problem pat-1 \
  --json "$base-problems.json"
stage table 20 "$python" bench/table.py "$base.json" "$base.md"
cat "$log" >>"$base.md"
[ ! -s "$base.md" ] || cat "$base.md"
exit "$failed"
