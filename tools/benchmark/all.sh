#!/usr/bin/env bash
# Runs the benchmarks that need no other machine, one after the other, and puts what they measured into one file:
#   bash tools/benchmark/all.sh [FILE]        default: benchmarks/DATE-HOST.json
# Peers that are not installed are left out by name (pip install 'megatron_med[peers]'). A busy machine is told by the spread
# of its pairs.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$repository/tools/benchmark
file=${1:-$repository/benchmarks/$(date +%F)-$(hostname).json}
cores=$(nproc)
export OMP_NUM_THREADS=$cores TOKENIZERS_PARALLELISM=false
measure() {
  echo "== $*"
  python "$here/$1.py" "${@:2}" || echo "$1 has failed; the others go on" >&2
}
step=(throughput --preset llama-58m --sequence-length 512 --micro-batch-size 4 --threads "$cores" --json "$file")
for precision in fp32 bf16; do
  measure "${step[@]}" --precision "$precision"
  measure kernels --precision "$precision" --threads "$cores" --json "$file"
  measure kernels --precision "$precision" --threads "$cores" --kilobytes 64 --json "$file"
done
for precision in fp32 bf16; do
  measure generation --precision "$precision" --threads "$cores" --json "$file"
  measure tuning --preset llama-10m --precision "$precision" --threads "$cores" --json "$file"
done
echo "$file"
