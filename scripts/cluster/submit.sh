#!/usr/bin/env bash
# A run as a Ray job: on a cluster that stands, its output beyond the job's life.
#
#   scripts/cluster/submit.sh my.yaml /mnt/runs/mine [--set KEY=VALUE ...]
#
# RAY_API_SERVER_ADDRESS names the cluster's dashboard (default http://127.0.0.1:8265). The configuration alone goes
# along: paths in it must be absolute, on storage that the nodes share, and so must be the run directory,
# for the job's own folder is a temporary one. A directory with a run in it is resumed.
set -euo pipefail
config=${1:?"usage: submit.sh CONFIG RUN_DIR [OPTIONS of fedsim run]"}
output=${2:?"usage: submit.sh CONFIG RUN_DIR [OPTIONS of fedsim run]"}
shift 2
case $output in
    /*) ;;
    *) echo "the run directory $output must be absolute: a job's own folder is removed" >&2 && exit 2 ;;
esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$config" "$folder/config.yaml"
printf -v more ' %q' "$@"
[ $# -gt 0 ] || more=
printf -v quoted '%q' "$output"
cat >"$folder/run.sh" <<EOF
if [ -f $quoted/config.yaml ]; then exec fedsim resume $quoted --address auto; fi
exec fedsim run config.yaml --address auto --output $quoted$more
EOF
ray job submit --working-dir "$folder" -- bash run.sh
