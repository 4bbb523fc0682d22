#!/usr/bin/env bash
# Pretraining on Slurm: Ray on the job's nodes, and one job on it, which goes on after a requeue.
#
#   sbatch deploy/slurm.sh --config jobs/recipes/esm2_t33_650m.yaml \
#       --output /shared/runs/esm2_t33_650m corpus=/shared/corpora/ur100 cluster.workers=[8,32]
#   sbatch --nodes 1 --gpus-per-node 0 deploy/slurm.sh --config jobs/recipes/demo.yaml \
#       --output /shared/runs/demo corpus=/shared/corpora/demo cluster.device=cpu
#
# Every node needs this checkout with its .venv (`make install`) under one path, and the shared
# folder. What follows the script's name goes to jobs/pretrain_model.py, with --start-or-resume.
# Other partitions, times and accounts: on sbatch's command line, which wins over these lines.
#
# Tried on one machine with stand-ins for srun and scontrol: a run of the demo's recipe on two nodes
# of Ray, ended by a notice after its first checkpoint, queued again, and gone on to its end. Not
# tried: Slurm itself, several machines, GPUs.
#
#SBATCH --job-name=raptide
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -euo pipefail

# sbatch runs a copy of this file, so the checkout is where it was called.
checkout="${RAPTIDE_CHECKOUT:-${SLURM_SUBMIT_DIR:?run this by sbatch, from the checkout}}"
cd "$checkout"
ray="$checkout/.venv/bin/ray"
python="$checkout/.venv/bin/python"

# Several jobs may share a node, so each has ports, a token and a folder of its own.
port="${RAPTIDE_RAY_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
export RAY_AUTH_MODE=token
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # nodes end after the job: nothing is left on them
export RAY_TMPDIR="${RAPTIDE_RAY_TMPDIR:-/tmp/raptide-$SLURM_JOB_ID}"
RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
head_ip="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)"
head_ip="${head_ip%% *}"
address="$head_ip:$port"
cpus="${SLURM_CPUS_PER_TASK:-$(nproc)}"

start_ray() { # NODE OPTION...: a node of the cluster, until it is ended
    local node="$1"
    shift
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap \
        "$ray" start --block --num-cpus="$cpus" "$@" &
    ray_nodes+=("$!")
}

# shellcheck disable=SC2329 # traps call these two
stop() { # the job first, which may have something to save; srun hands signals on
    if [[ -n "$job" ]]; then
        kill -TERM "$job" 2> /dev/null || true
        wait "$job" || true
    fi
    kill -TERM "${ray_nodes[@]}" 2> /dev/null || true
    wait
}

# shellcheck disable=SC2329
requeue() { # Slurm's notice of the time limit, or of a preemption
    echo "going away: the job is queued again, and goes on from its newest checkpoint" >&2
    trap - EXIT
    stop
    scontrol requeue "$SLURM_JOB_ID"
    exit 143
}

ray_nodes=()
job=""
trap requeue TERM
trap stop EXIT

echo "Ray: $address on ${#nodes[@]} nodes" >&2
start_ray "$head" --head --node-ip-address="$head_ip" --port="$port" \
    --dashboard-host=127.0.0.1 --dashboard-port="$((port + 1))"
for ((tries = 0; ; tries++)); do
    "$ray" health-check --address "$address" > /dev/null 2>&1 && break
    ((tries < 120)) || { echo "error: Ray's head on $head did not start" >&2; exit 1; }
    sleep 1
done
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address="$address"
done

# On the head's node, as the driver of a run lives best beside its cluster. The job itself waits for
# the nodes that its fewest workers need.
RAY_ADDRESS="$address" srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    "$python" jobs/pretrain_model.py --start-or-resume "$@" &
job="$!"
status=0
wait "$job" || status="$?"
job=""
trap '' TERM # what has ended is not queued again
exit "$status"
