#!/usr/bin/env bash
# The 10M-parameter run that docs/first_run.md reports:  bash examples/quickstart/pubmed_10m.sh ABSTRACTS.jsonl OUT
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: pubmed_10m.sh ABSTRACTS.jsonl OUT" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tools=$here/../../tools
venv=$(bash "$tools/setup_env.sh" verify)
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=1
mkdir -p "$2"
awk 'NR % 50 != 0' "$1" > "$2/train.jsonl"
awk 'NR % 50 == 0' "$1" > "$2/valid.jsonl"
python "$tools/train_tokenizer.py" --input "$2/train.jsonl" --vocab-size 8192 --output "$2/tokenizer" --overwrite
for split in train valid; do
  python "$tools/preprocess_data.py" --input "$2/$split.jsonl" --output-prefix "$2/$split" \
    --tokenizer "$2/tokenizer" --workers 2 --append-eod --overwrite
done
torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 300 \
  --nproc-per-node 8 -m megatron_med.train "$here/pubmed_10m.yaml" --train.output_dir "$2/run" \
  --data.train "[{path: $2/train}]" --data.valid "[{path: $2/valid}]"
python "$tools/generate.py" --checkpoint "$2/run" --prompt "The aim of this study was to" \
  --max-new-tokens 120 --temperature 0.7 --top-p 0.9
