#!/usr/bin/env bash
#SBATCH --job-name=fedsim
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# A run on the nodes of a Slurm job: one Ray node on each, the first is the head, where driver and server are.
#
#   sbatch scripts/cluster/slurm.sh my.yaml /shared/runs/mine [--set KEY=VALUE ...]
#
# The run directory is on storage that all nodes share. Before the time is up, or when the job is preempted, SIGTERM is
# passed on: fedsim keeps the last finished round (exit code 143), the job is put back into the queue, and resumes.
set -euo pipefail
config=${1:?"usage: sbatch slurm.sh CONFIG RUN_DIR [OPTIONS of fedsim run]"}
output=${2:?"usage: sbatch slurm.sh CONFIG RUN_DIR [OPTIONS of fedsim run]"}
shift 2
: "${SLURM_JOB_ID:?"this is for sbatch; on one machine fedsim run needs nothing"}"

cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
gpus=${SLURM_GPUS_ON_NODE:-0}
# Ports by job, so that two jobs on a node don't meet; sockets want a short path.
port=${FEDSIM_PORT:-$((20000 + SLURM_JOB_ID % 10000 * 4))}
temporary=${FEDSIM_TMP:-/tmp}/ray-$SLURM_JOB_ID
export RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR=$temporary
# Others on the network can't join, or send code to, a cluster whose token they don't know.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')
address=$head_ip:$port
steps=()
driver=
stopped=

finish() {
    trap - TERM INT
    for step in "${steps[@]}"; do kill -TERM "$step" 2>/dev/null || true; done
    wait "${steps[@]}" 2>/dev/null || true
    for node in "${nodes[@]:1}"; do
        srun --nodes=1 --ntasks=1 --overlap -w "$node" rm -rf "$temporary" 2>/dev/null || true
    done
    rm -rf "$temporary"
}
trap finish EXIT
forward() {
    stopped=yes
    if [ -n "$driver" ]; then kill -TERM "$driver" 2>/dev/null || true; else requeue; fi
}
requeue() {
    echo "stopped by SIGTERM: the job goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || true
    exit 143
}
trap forward TERM INT

echo "head $head at $address, ${#nodes[@]} nodes with $cpus CPUs and $gpus GPUs"
srun --nodes=1 --ntasks=1 --overlap -w "$head" ray start --head --block --node-ip-address="$head_ip" --port="$port" \
    --ray-client-server-port="$((port + 1))" --num-cpus="$cpus" --num-gpus="$gpus" --temp-dir="$temporary" \
    --include-dashboard=false &
steps+=($!)
for _ in $(seq 60); do
    if (exec 3<>"/dev/tcp/$head_ip/$port") 2>/dev/null; then break; fi
    sleep 1
done
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --overlap -w "$node" ray start --block --address="$address" --num-cpus="$cpus" \
        --num-gpus="$gpus" &
    steps+=($!)
done
# fedsim refuses what doesn't fit, so all nodes must be there first.
python - "$address" "${#nodes[@]}" <<'EOF'
import sys, time
import ray
ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
end, wanted = time.monotonic() + 180, int(sys.argv[2])
while (up := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > end:
        sys.exit(f"{up} of {wanted} Ray nodes are up after 180 s")
    time.sleep(0.5)
EOF

if [ -f "$output/config.yaml" ]; then
    fedsim resume "$output" --address "$address" &
else
    fedsim run "$config" --address "$address" --output "$output" "$@" &
fi
driver=$!
code=0
wait "$driver" || code=$?
if [ -n "$stopped" ]; then
    # The signal has interrupted `wait`; the driver still writes its checkpoint.
    while kill -0 "$driver" 2>/dev/null; do sleep 0.5; done
    code=0
    wait "$driver" || code=$?
fi
if [ "$code" -eq 143 ]; then requeue; fi
exit "$code"
