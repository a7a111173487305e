#!/bin/bash
# A sweep on Slurm: a Ray cluster over the job's nodes, the search on the first of them, everything stopped at the end.
#
#   sbatch --nodes=2 --gpus-per-node=1 deploy/slurm.sh collage_costs --name weekend --set resources.gpus_per_worker=1
#
# The arguments are those of `python -m orchestrator.sweep`. The same command with the same --name goes on where a job was cut
# off. CAVS_OUTPUTS must lie on storage that all nodes share, as must this folder and its .venv.
#SBATCH --job-name=cavs
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=4G
#SBATCH --time=48:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

: "${SLURM_JOB_ID:?submit this by sbatch}" "${SLURM_JOB_NODELIST:?submit this by sbatch}"
: "${CAVS_OUTPUTS:?must name a folder that all nodes share, as an absolute path}"
BIN=${CAVS_BIN:-$SLURM_SUBMIT_DIR/.venv/bin}
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
port=$((20000 + SLURM_JOB_ID % 3000 * 3)) # and the next two: jobs may share a node

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# The head is found by the address that the other nodes reach it at, not by that of every interface it has.
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)
address=${address%% *}
address=${CAVS_HEAD_ADDRESS:-$address}
if [[ $address == 127.* || -z $address ]]; then
    echo "error: $head knows itself as '$address', where no other node reaches it; set CAVS_HEAD_ADDRESS to its address" >&2
    exit 2
fi

# A token of this job's own, which only its owner can read. Without a token Ray is open to every user of these nodes.
mkdir -p "$HOME/.ray"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/slurm-$SLURM_JOB_ID.token
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")

parts=()
started() { # the index of a node and what ray start is to do there; stays in the foreground of its step, so that Slurm ends it
    srun --nodes=1 --ntasks=1 --overlap --nodelist="${nodes[$1]}" --kill-on-bad-exit=1 \
        "$BIN/ray" start --block --disable-usage-stats --num-cpus="$cpus" --num-gpus="$gpus" \
        --temp-dir="${TMPDIR:-/tmp}/cavs-ray-$SLURM_JOB_ID" "${@:2}" &
    parts+=($!)
}

stop() {
    trap - EXIT TERM INT
    # The search first: it ends its runs in MLflow. Then the nodes, in the reverse of the order they came in.
    if [[ -n ${search:-} ]]; then
        kill -TERM "$search" 2> /dev/null || true
        wait "$search" || true
    fi
    for ((n = ${#parts[@]} - 1; n >= 0; n--)); do kill -TERM "${parts[n]}" 2> /dev/null || true; done
    wait || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap stop EXIT
trap 'stop; exit 143' TERM INT

started 0 --head --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 \
    --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 2))
export RAY_ADDRESS=$address:$port
for _ in $(seq 60); do # seconds
    if "$BIN/ray" status --address="$RAY_ADDRESS" > /dev/null 2>&1; then break; fi
    sleep 1
done
for ((n = 1; n < ${#nodes[@]}; n++)); do
    started "$n" --address="$RAY_ADDRESS"
done

# The shell runs on the first node of the job, which is the head. In the background, so that the trap is heard at once.
cd "$SLURM_SUBMIT_DIR"
{
    "$BIN/python" -m orchestrator.check "$@" --nodes "${#nodes[@]}"
    exec "$BIN/python" -m orchestrator.sweep "$@"
} &
search=$!
status=0
wait "$search" || status=$?
search=
exit "$status"
