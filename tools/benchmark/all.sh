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
reused() { MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 "$@"; } # memory is not given back and faulted in again
step=(throughput --preset llama-58m --sequence-length 512 --micro-batch-size 4 --threads "$cores" --json "$file")
precisions=fp32
if python -c '
import sys, torch
from megatron_med.kernels.linear import has_bf16_products
sys.exit(not has_bf16_products(torch.device("cuda" if torch.cuda.is_available() else "cpu")))'; then
  precisions="fp32 bf16"
else
  echo "bf16 is left out: this processor has no instructions for its products"
fi
for precision in $precisions; do
  measure "${step[@]}" --precision "$precision"
  reused measure kernels --precision "$precision" --threads "$cores" --json "$file"
  reused measure kernels --precision "$precision" --threads "$cores" --kilobytes 64 --json "$file"
done
measure attention --threads "$cores" --json "$file"
launch() { # RANKS SCRIPT ...: one thread a rank
  echo "== $*"
  OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc-per-node "$1" "$here/$2.py" "${@:3}" --json "$file" ||
    echo "$2 has failed; the others go on" >&2
}
launch 2 schedules --micro-batches 8
launch 2 overlap --tensor 2 --precision fp32
launch 4 overlap --tensor 2 --precision fp32
launch 2 overlap --pipeline 2 --schedule interleaved --precision fp32
OMP_NUM_THREADS=1 measure scaling --json "$file"
launch 2 saving
measure conversion --json "$file"
tokenizer=$(mktemp -d)
trap 'rm -rf "$tokenizer"' EXIT
sample=$repository/examples/quickstart/sample.jsonl
python "$repository/tools/train_tokenizer.py" --input "$sample" --vocab-size 4096 --output "$tokenizer/bpe"
measure preprocessing --input "$sample" --tokenizer "$tokenizer/bpe" --workers "$cores" --json "$file"
measure loader --json "$file"
measure index --json "$file"
for precision in $precisions; do
  measure generation --precision "$precision" --threads "$cores" --json "$file"
  measure tuning --preset llama-10m --precision "$precision" --threads "$cores" --json "$file"
done
echo "$file"
