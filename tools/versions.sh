#!/usr/bin/env bash
# Attach, cache, decode, text and oracle tests on the oldest and the newest transformers, an environment each; the newest
# is left out where it is the pinned one, which `make test` runs.
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
versions=("transformers==$oldest.*")
pinned=$(sed -n 's/^transformers==//p' constraints.txt)
newest=$("$python" -m pip index versions transformers 2> /dev/null | sed -n '1s/.*(\(.*\)).*/\1/p')
if [ "$newest" = "$pinned" ]; then
  echo "transformers $newest is the newest, and pinned: make test runs it"
else
  versions+=(transformers)
fi
for version in "${versions[@]}"; do
  name=${version//[^a-z0-9.]/}
  "$python" -m venv "$work/$name"
  "$work/$name/bin/pip" install -q "$(grep '^torch==' constraints.txt)"
  "$work/$name/bin/pip" install -q "$WHEEL[test]" "$version"
  printf '\n-- %s: ' "$version"
  "$work/$name/bin/pip" list 2> /dev/null | grep -E '^(torch|transformers) ' | tr -s ' \n' ' '
  echo
  "$work/$name/bin/python" -m pytest -q -n 2 --disable-warnings -p no:cacheprovider \
    tests/test_session.py tests/test_cache.py tests/test_cache_contract.py \
    tests/test_beside.py tests/test_changed_models.py tests/test_compiled.py tests/test_settings.py \
    tests/test_decode.py tests/test_text.py tests/test_strategies.py tests/test_oracles.py \
    tests/test_states.py tests/test_states_proof.py tests/test_states_cache.py
done
