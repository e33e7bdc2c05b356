#!/usr/bin/env bash
# From raw records of each source to a training run: corpus, report, 40 steps of a tiny Llama on two processes.
#   bash examples/gap_replay/sample.sh [--raw DIR] [--work DIR] [--steps N]
# DIR (default: raw) holds guidelines/ s2orc/ papers/ pubmed/ redpajama/ llama2/tokenizer.model; README.md tells where
# they come from. Everything is written below --work (default: the repository).
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
raw=raw work=$repository steps=40
while [ $# -gt 0 ]; do
  case $1 in
    --raw) raw=$2; shift 2 ;;
    --work) work=$2; shift 2 ;;
    --steps) steps=$2; shift 2 ;;
    *) echo "error: $1 is not an option: --raw DIR, --work DIR, --steps N" >&2; exit 2 ;;
  esac
done
[ -d "$raw" ] || { echo "error: there is no $raw: see examples/gap_replay/README.md for what goes there." >&2; exit 2; }
raw=$(cd "$raw" && pwd)
venv=$(bash "$repository/tools/setup_env.sh" corpus)
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=1
mkdir -p "$work"
cd "$work"
[ "$raw" -ef raw ] || ln -sfn "$raw" raw

python "$repository/tools/build_corpus.py" "$repository/examples/gap_replay/sample.yaml"
python "$repository/tools/corpus_report.py" data/gap_replay_sample --overwrite
python "$repository/tools/inspect_data.py" data/gap_replay_sample/papers-train --document 0 | head -c 1500
echo
torchrun --nproc-per-node 2 -m megatron_med.train "$repository/examples/gap_replay/sample_run.yaml" --train.steps "$steps"
