#!/usr/bin/env bash
# Runs the tests; --all runs the slow ones too, --chaos those that kill, stop or starve processes (a quarter of an hour on two
# quiet cores), any other argument goes to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup_env.sh
if [ -z "${FEDSIM_DATA:-}" ] && [ -d ../shared/data ]; then
  FEDSIM_DATA=$(cd ../shared/data && pwd)
  export FEDSIM_DATA
fi
# The choice is made here and not in addopts, so that plain `pytest tests/x.py` never leaves a test out.
several() { python -m pytest -n auto --maxprocesses 4 --dist loadgroup "$@"; }
case "${1:-}" in
  --all) shift && several -m "not chaos" "$@" ;;
  --chaos) shift && python -m pytest -m chaos "$@" ;; # one by one: they look at the clock
  *) several -m "not slow and not chaos" "$@" ;;
esac
