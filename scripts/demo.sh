#!/usr/bin/env bash
# Runs the embedded default experiment; arguments go to `fedsim run` (e.g. --set federation.num_clients=100).
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup_env.sh
cd "$here" # runs/ appears where the script is called
exec fedsim run "$@"
