#!/usr/bin/env bash
# Trains until the run is done: starts torchrun again after a failure, from the last checkpoint.
#
#   bash tools/launch.sh --nproc-per-node 8 -- CONFIG.yaml [--section.key value ...]
#   bash tools/launch.sh --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 -- CONFIG.yaml
#
# Options before -- go to torchrun; on several nodes the same line runs on each. SIGTERM, SIGINT and SIGUSR1 are handed
# on: the run saves and this script ends. It does not start again after 2 (bad configuration or data) nor after 75
# (saved after a signal). Ends with the code in RUN/exit.json.
#
#   MEGATRON_MED_RESTARTS       failures in a row without a new checkpoint that are borne (100)
#   MEGATRON_MED_RESTART_DELAY  seconds before the next start (10)
#   MEGATRON_MED_SAVE_SECONDS   seconds that a signalled run may take to save (300)
#   MEGATRON_MED_STUCK_SECONDS  seconds after which a torchrun whose ranks have all ended is killed: behind a cut link
#                               it waits for its rendezvous far longer (60)
#   MEGATRON_MED_FORWARD        0: do not hand signals on, they reach torchrun anyway (Slurm signals every process of a
#                               step, and torchrun must not get one twice)
#
# Where a host does not know its own address by name, tell torchrun: --local-addr ADDRESS, and on the host of the
# rendezvous --rdzv-conf is_host=true.
set -uo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${MEGATRON_MED_PYTHON:-python}
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}

launcher=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
  launcher+=("$1")
  shift
done
if [ $# -lt 2 ]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
shift

run=$("$python" -c 'import sys; from megatron_med.config.load import peek_output_dir
print(peek_output_dir(sys.argv[1:]) or "")' "$@") || exit 2
[ -n "$run" ] || exec "$python" -m megatron_med.train "$@" # no folder to run in: it says what is wrong
signalled="" torchrun=""

forward() {
  signalled=$1
  [ -z "$torchrun" ] || [ "${MEGATRON_MED_FORWARD:-1}" = 0 ] || kill -s "$1" "$torchrun" 2>/dev/null
}
trap "forward TERM" TERM INT
trap "forward USR1" USR1

# Field of the record that this start has left: its own file on the host of rank 0, else RUN/exit.json if it is newer
# than the start.
record() {
  local file=$stamp.exit
  [ -s "$file" ] || file=$run/exit.json
  if [ -f "$file" ] && [ ! "$file" -ot "$stamp" ]; then
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2], sys.argv[3]))' "$file" "$1" "$2"
  else
    echo "$2"
  fi
}

newest() { cat "$run/checkpoints/latest" 2>/dev/null || true; }

ranks_alive() { [ "$(cat "/proc/$torchrun/task/"*/children 2>/dev/null | wc -w)" -gt 0 ]; }

# Returns when torchrun has ended.
watch_torchrun() {
  local had_ranks="" idle=0
  while kill -0 "$torchrun" 2>/dev/null; do
    sleep 1 &
    wait $! # a trapped signal interrupts wait, not sleep
    if ranks_alive; then
      had_ranks=1 idle=0
    elif [ -n "$had_ranks" ]; then
      idle=$((idle + 1))
      if [ "$idle" -ge "${MEGATRON_MED_STUCK_SECONDS:-60}" ]; then
        echo "launch.sh: torchrun is stuck: its ranks ended $idle s ago. Killing it." >&2
        kill -9 "$torchrun"
      fi
    fi
  done
}

stamp=$(mktemp)
trap 'rm -f "$stamp" "$stamp.exit"' EXIT
export MEGATRON_MED_EXIT_FILE=$stamp.exit
failures=0
while true; do
  before=$(newest)
  rm -f "$stamp.exit"
  touch "$stamp"
  "$python" -m torch.distributed.run "${launcher[@]}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout "${MEGATRON_MED_SAVE_SECONDS:-300}" \
    -m megatron_med.train "$@" &
  torchrun=$!
  watch_torchrun
  wait "$torchrun"
  status=$? torchrun=""
  [ "$status" -ne 0 ] || exit 0
  code=$(record code 1)
  case $code in 0 | 2 | 75) exit "$code" ;; esac
  [ -z "$signalled" ] || exit "$code"
  if [ "$(record retry True)" = False ]; then
    echo "launch.sh: it would fail again: $(record reason '')" >&2
    exit "$code"
  fi
  if [ "$(newest)" = "$before" ]; then failures=$((failures + 1)); else failures=1; fi
  if [ "$failures" -gt "${MEGATRON_MED_RESTARTS:-100}" ]; then
    echo "launch.sh: $failures failures in a row without a new checkpoint; giving up." >&2
    exit "$code"
  fi
  echo "launch.sh: torchrun ended with $status; starting again in ${MEGATRON_MED_RESTART_DELAY:-10} s" \
    "from $(newest | grep . || echo 'step 0')." >&2
  sleep "${MEGATRON_MED_RESTART_DELAY:-10}"
  [ -z "$signalled" ] || exit 75
done
