#!/usr/bin/env bash
# All CPU benchmarks of the installed package; figures go to the folder given (default bench/results).
# Wants idle cores: each file states the load at its start.
set -euo pipefail
out=${1:-$(dirname "$0")/results}
python=${PYTHON:-python}
for what in fork plan threads; do
  OMP_WAIT_POLICY=passive "$python" -m apr bench "$what" --json "$out/cpu-$(date +%F)-$what.json"
done
