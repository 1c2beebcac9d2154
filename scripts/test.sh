#!/usr/bin/env bash
# Runs the tests; --all runs the slow ones too, any other argument goes to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup_env.sh
if [ -z "${FEDSIM_DATA:-}" ] && [ -d ../shared/data ]; then
  FEDSIM_DATA=$(cd ../shared/data && pwd)
  export FEDSIM_DATA
fi
# The choice is made here and not in addopts, so that plain `pytest tests/x.py` never leaves a test out.
if [ "${1:-}" = --all ]; then
  shift
else
  set -- -m "not slow" "$@"
fi
exec python -m pytest "$@"
