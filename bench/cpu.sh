#!/usr/bin/env bash
# All CPU benchmarks of the installed package; figures go to the folder given (default bench/results), and
# a picture of time against width. Wants idle cores: each file states the load at its start. About 10 minutes.
set -euo pipefail
out=${1:-$(dirname "$0")/results}
python=${PYTHON:-python}
day=$(date +%F)
for what in attention prefill width fork plan threads pages sampling scaling; do
  OMP_WAIT_POLICY=passive "$python" -m apr bench "$what" --json "$out/cpu-$day-$what.json"
done
# As a user runs it: idle OpenMP threads spin.
env -u OMP_WAIT_POLICY "$python" -m apr bench workers --json "$out/cpu-$day-workers.json"
"$python" "$(dirname "$0")/plot.py" "$out/cpu-$day-width.json" "$out/cpu-$day-width.png"
"$python" "$(dirname "$0")/plot_scaling.py" "$out/cpu-$day-scaling.json" "$out/cpu-$day-scaling.png"
