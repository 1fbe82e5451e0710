#!/usr/bin/env bash
# Attach, cache, decode, text and oracle tests on the oldest and the newest transformers, an environment each.
# WHEEL: a built wheel of apr; made here where it is not given. ENVIRONMENTS: where the environments lie.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=passive
python=${PYTHON:-python3}
work=${ENVIRONMENTS:-$(mktemp -d)}
oldest=$(sed -n 's/^OLDEST, NEWEST = "\([0-9.]*\)".*/\1/p' python/apr/hf/compatibility.py)
if [ -z "${WHEEL:-}" ]; then
  "$python" -m venv "$work/build"
  "$work/build/bin/pip" wheel -q --no-deps --config-settings=cmake.define.APR_CUDA=OFF -w "$work" .
  WHEEL=$(ls "$work"/apr-*.whl)
fi
for version in "transformers==$oldest.*" transformers; do
  name=${version//[^a-z0-9.]/}
  "$python" -m venv "$work/$name"
  "$work/$name/bin/pip" install -q "$(grep '^torch==' constraints.txt)"
  "$work/$name/bin/pip" install -q "$WHEEL[test]" "$version"
  printf '\n-- %s: ' "$version"
  "$work/$name/bin/pip" list 2> /dev/null | grep -E '^(torch|transformers) ' | tr -s ' \n' ' '
  echo
  "$work/$name/bin/python" -m pytest -q -n 2 --disable-warnings -p no:cacheprovider \
    tests/test_session.py tests/test_cache.py tests/test_cache_contract.py tests/test_beside.py \
    tests/test_decode.py tests/test_text.py tests/test_strategies.py tests/test_oracles.py \
    tests/test_states.py tests/test_states_cache.py
done
