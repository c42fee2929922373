#!/bin/bash
# Extracts parts on the nodes of a Slurm job: a Ray cluster for the time of the job, with a token of its own.
#
#   sbatch --nodes 4 --gpus-per-node 8 recipes/slurm-extract.sh \
#       --data /shared/imagenet --learner /shared/learner --output /shared/parts --workers 32
#
# takes what `semmae stage1 extract-parts` takes, but for --address.  `semmae` and `ray` must be on the PATH of every
# node, in the same versions, and the paths on storage that all nodes share (docs/cluster.md).  A job that is preempted
# or runs out of time is queued again and goes on with the shards that are not finished.
#SBATCH --job-name=semmae-extract
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# Below the ports that systems give out themselves, and another one for each job, since nodes may be shared.
port=$((20000 + SLURM_JOB_ID % 10000))
address=$head:$port

RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # steps do not inherit it
export OMP_NUM_THREADS=1

driver=
finish() {
    trap - EXIT TERM USR1
    # Ray ends with its steps; `ray stop` would end every Ray of these nodes, those of other jobs too.
    # shellcheck disable=SC2046
    kill $driver $(jobs -p) 2>/dev/null || true
    wait || true
}
trap finish EXIT
trap 'exit 143' TERM
trap 'echo "time is nearly up: queued again"; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1

ray=(ray start --block --num-cpus "$SLURM_CPUS_PER_TASK" --min-worker-port 0 --max-worker-port 0)
ray+=(--dashboard-agent-listen-port 0 --disable-usage-stats)
srun --nodes=1 --ntasks=1 --nodelist="$head" "${ray[@]}" --head --port "$port" --include-dashboard false \
    --ray-client-server-port $((port + 10000)) --temp-dir "/tmp/ray-$SLURM_JOB_ID" &
others=$((${#nodes[@]} - 1))

# Nodes join within minutes; the command would refuse workers that have no room yet.
wait_for() {
    timeout 600 python - "$address" "$1" <<'PYTHON'
import logging, sys, time
import ray

while not ray.is_initialized():
    try:
        ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError):
        time.sleep(2)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(2)
PYTHON
}
wait_for 1 &
wait $!
if ((others)); then
    srun --nodes=$others --ntasks=$others --exclude="$head" "${ray[@]}" --address "$address" &
    wait_for ${#nodes[@]} &
    wait $!
fi

# In the background, so that signals are answered while it runs.
semmae stage1 extract-parts --address "$address" "$@" &
driver=$!
wait $driver
