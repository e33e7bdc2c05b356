#!/usr/bin/env bash
# Trains until the run is done: starts torchrun again after a failure, from the last checkpoint.
#
#   bash tools/launch.sh --nproc-per-node 8 -- CONFIG.yaml [--section.key value ...]
#   bash tools/launch.sh --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 -- CONFIG.yaml
#
# Options before -- go to torchrun; on several nodes the same line runs on each. SIGTERM, SIGINT, SIGUSR1 and SIGHUP (but
# under nohup) are handed on: the run saves and this script ends. It does not start again after 2 (bad configuration or
# data) nor after 75 (saved after a signal). Ends with the code in RUN/exit.json. Where torchrun alone was killed, its
# ranks save and leave, and the run starts again.
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
signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
ignored=$(awk '/^SigIgn/ {print "0x" $2}' /proc/$$/status 2>/dev/null)
if [ $((${ignored:-0} & 1)) = 0 ]; then # nohup has not turned SIGHUP off: torchrun would turn it on again
  trap "forward HUP" HUP
  signals=$signals,SIGHUP
fi

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

# Returns when torchrun has ended; $ranks are then the processes that it had.
watch_torchrun() {
  local children idle=0
  ranks=""
  while kill -0 "$torchrun" 2>/dev/null; do
    sleep 1 &
    wait $! # a trapped signal interrupts wait, not sleep
    children=$(cat "/proc/$torchrun/task/"*/children 2>/dev/null)
    if [ -n "$children" ]; then
      ranks=$children idle=0
    elif [ -n "$ranks" ]; then
      idle=$((idle + 1))
      if [ "$idle" -ge "${MEGATRON_MED_STUCK_SECONDS:-60}" ]; then
        echo "launch.sh: torchrun is stuck: its ranks ended $idle s ago. Killing it." >&2
        kill -9 "$torchrun"
      fi
    fi
  done
}

# Ranks whose torchrun was killed save and leave by themselves. A new start would find the run alive.
await_orphans() {
  local waited=0 rank
  for rank in $ranks; do
    while grep -qs megatron_med.train "/proc/$rank/cmdline"; do
      [ "$waited" != 0 ] || echo "launch.sh: torchrun is gone; waiting for its ranks to save." >&2
      sleep 1 &
      wait $!
      waited=$((waited + 1))
      [ "$waited" -lt "${MEGATRON_MED_SAVE_SECONDS:-300}" ] || kill -9 "$rank" 2>/dev/null
    done
  done
}

stamp=$(mktemp) || exit 2
trap 'rm -f "$stamp" "$stamp.exit"' EXIT
export MEGATRON_MED_EXIT_FILE=$stamp.exit
failures=0
while true; do
  before=$(newest)
  rm -f "$stamp.exit"
  touch "$stamp"
  "$python" -m torch.distributed.run "${launcher[@]}" \
    --signals-to-handle "$signals" \
    --shutdown-timeout "${MEGATRON_MED_SAVE_SECONDS:-300}" \
    -m megatron_med.train "$@" &
  torchrun=$!
  watch_torchrun
  wait "$torchrun"
  status=$? torchrun=""
  await_orphans
  [ "$status" -ne 0 ] || exit 0
  code=$(record code "") retry=$(record retry "")
  # torchrun refuses its own options with 2, and without a python there is 126 or 127: no rank has spoken
  if [ -z "$code" ]; then
    case $status in 2 | 126 | 127) exit "$status" ;; esac
    code=1
  fi
  case $code in 0 | 2) exit "$code" ;; esac
  [ "$code" != 75 ] || [ "$retry" = True ] || exit 75
  [ -z "$signalled" ] || exit "$code"
  if [ "$retry" = False ]; then
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
