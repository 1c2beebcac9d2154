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
case "${1:-}" in
  --all) shift && set -- -m "not chaos" "$@" ;;
  --chaos) shift && set -- -m chaos "$@" ;;
  *) set -- -m "not slow and not chaos" "$@" ;;
esac
exec python -m pytest "$@"
