#!/usr/bin/env bash
# Runs an entry point on all nodes of a Slurm job; used by the sbatch files: run.sh ENTRY CONFIG.yaml key=value ...
#
# TASKS_PER_NODE processes on each node (default: one for each GPU, one without GPUs). The run saves and the job is
# requeued, at most RESTARTS (100) times: before the time limit (Slurm sends USR1), on pre-emption and `scontrol requeue`
# (TERM), and after a hang, such as a dead node (exit code 75). It resumes on the nodes it gets, so all must mount
# output_dir. `scancel` saves and ends the job.
set -uo pipefail
entry=$1
shift

tasks=${TASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

cores=$((SLURM_CPUS_ON_NODE / tasks))

# srun returns the highest exit code of its tasks and terminates all when one fails. A failure becomes 255, so that it is
# higher than the 143 of the terminated ones. The task waits for its process to save after a signal.
task='
    trap : TERM USR1
    "$@"
    code=$?
    case $code in 0 | 75 | 138 | 143) exit $code ;; *) echo "run.sh: exit code $code" >&2; exit 255 ;; esac
'
# Each process sees all cores of its node and uses its share, and sees all GPUs of the job there, so that they can exchange
# data directly. If the cluster enforces a binding, each process sees and uses one GPU.
srun ${SLURM_GPUS_ON_NODE:+--gpu-bind=none} --ntasks=$((tasks * SLURM_JOB_NUM_NODES)) --ntasks-per-node="$tasks" \
    --cpus-per-task=$((cores > 0 ? cores : 1)) --cpu-bind=none --kill-on-bad-exit=1 bash -c "$task" task python -u -m "launch.$entry" "$@"
code=$?

# Requeue after USR1, a hang, or TERM for pre-emption; a cancelled job is not in state RUNNING.
case $code in
138 | 75 | 143)
    state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z]*\).*/\1/p')
    if [ "$state" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-100}" ]; then
        echo "run.sh: exit code $code, job $SLURM_JOB_ID is requeued"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit $code
