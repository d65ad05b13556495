#!/usr/bin/env bash
# What the sbatch files beside it share: run.sh ENTRY CONFIG.yaml key=value ... within a Slurm job, on all its nodes.
#
# One process a GPU; on nodes without GPUs TASKS_PER_NODE processes (1). Near the end of its time Slurm sends USR1: the
# run saves, ends, and queues again; likewise after a standstill, such as a node that has died. On pre-emption and
# `scontrol requeue` Slurm sends TERM: the run saves, and the job queues again. It goes on from there on whatever nodes
# it gets. output_dir must be seen by all nodes. At most RESTARTS (100) times. `scancel` saves, and ends it for good.
set -uo pipefail
entry=$1
shift

tasks=${TASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

cores=$((SLURM_CPUS_ON_NODE / tasks))

# srun tells the highest code of all its tasks, and ends them all when one fails: what failed must outrank the 143 of the
# ones ended. The task waits for its process to save after a signal.
task='
    trap : TERM USR1
    "$@"
    code=$?
    case $code in 0 | 75 | 138 | 143) exit $code ;; *) echo "run.sh: exit code $code" >&2; exit 255 ;; esac
'
# Each process sees all cores of its node, and takes its share of them; and all GPUs of the job there, so that they can
# copy to each other. (A binding that a cluster enforces all the same works too: then each process sees one GPU.)
srun ${SLURM_GPUS_ON_NODE:+--gpu-bind=none} --ntasks=$((tasks * SLURM_JOB_NUM_NODES)) --ntasks-per-node="$tasks" \
    --cpus-per-task=$((cores > 0 ? cores : 1)) --cpu-bind=none --kill-on-bad-exit=1 bash -c "$task" task python -u -m "launch.$entry" "$@"
code=$?

# USR1, a standstill, and TERM where Slurm only wants the nodes back; a job that was cancelled is no longer running.
case $code in
138 | 75 | 143)
    state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z]*\).*/\1/p')
    if [ "$state" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-100}" ]; then
        echo "run.sh: exit code $code, job $SLURM_JOB_ID queues again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit $code
