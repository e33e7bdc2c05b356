#!/usr/bin/env bash
# Runs tools/launch.sh on every node of a Slurm job. An sbatch script ends with it:
#
#   bash tools/slurm.sh CONFIG.yaml [--section.key value ...]
#
# Slurm's warning (#SBATCH --signal=B:USR1@600) makes the run save; a run that ended with 75 (saved, start me again) is
# put back into the queue and goes on where it was. Ends with the run's code; `scancel JOB` ends it for good.
#
#   MEGATRON_MED_PROCESSES  ranks of a node (default: its GPUs)
#   MEGATRON_MED_PORT       of the rendezvous on the first node (default: from the job's number)
#   MEGATRON_MED_REQUEUE    0: do not requeue
#   MEGATRON_MED_SRUN       further options of srun, for a container for example
set -uo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 1 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi

processes=${MEGATRON_MED_PROCESSES:-${SLURM_GPUS_ON_NODE:-0}}
if [ "$processes" -lt 1 ]; then
  echo "error: the job has no GPUs: ask for them (#SBATCH --gpus-per-node=8), or set MEGATRON_MED_PROCESSES." >&2
  exit 2
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" --oneliner | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
port=${MEGATRON_MED_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MEGATRON_MED_FORWARD=0
export ADDRESS=$address PORT=$port PROCESSES=$processes REPOSITORY=$repository

# shellcheck disable=SC2016,SC2086  # the variables are the nodes' own; the options are several words
srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --wait 120 --kill-on-bad-exit=0 \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"} ${MEGATRON_MED_SRUN:-} bash -c '
    [ "$SLURM_NODEID" -eq 0 ] && is_host=true || is_host=false
    exec bash "$REPOSITORY/tools/launch.sh" --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$PROCESSES" \
      --rdzv-backend c10d --rdzv-endpoint "$ADDRESS:$PORT" --rdzv-conf "is_host=$is_host" \
      --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" -- "$@"
  ' launch "$@" &
step=$!
cancelled=""
trap 'kill -s USR1 "$step"' USR1
trap 'cancelled=1' TERM # Slurm itself tells the ranks
interrupted() { [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; }
wait "$step"
code=$?
while interrupted; do # by a trapped signal
  wait "$step"
  code=$?
done
[ "$code" -le 128 ] || { wait "$step" && code=0 || code=$?; } # it ended while the signal was handled
state=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -o 'JobState=[A-Z]*' | cut -d= -f2)
if [ "$state" != RUNNING ]; then cancelled=1; fi
if [ "$code" -eq 75 ] && [ -z "$cancelled" ] && [ "${MEGATRON_MED_REQUEUE:-1}" != 0 ]; then
  echo "slurm.sh: the run has saved; job $SLURM_JOB_ID goes back into the queue." >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
