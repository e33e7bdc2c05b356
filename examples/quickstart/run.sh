#!/usr/bin/env bash
# From raw text to a Hugging Face model on this machine, without a GPU:
#   bash examples/quickstart/run.sh [--data FILE.jsonl] [--output DIR]
# Sets up an environment (tools/setup_env.sh), trains a tokenizer, tokenizes, trains on 8 processes as TP 2 x PP 2 x
# DP 2, goes on as PP 2 on 2 processes, exports to Hugging Face, compares the logits with transformers, generates.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
data=$here/sample.jsonl
output=$repository/out/quickstart
while [ $# -gt 0 ]; do
  case $1 in
    --data) data=$2; shift 2 ;;
    --output) output=$2; shift 2 ;;
    *) echo "error: unknown option $1; usage: run.sh [--data FILE.jsonl] [--output DIR]" >&2; exit 2 ;;
  esac
done
[ -f "$data" ] || { echo "error: there is no file $data" >&2; exit 2; }
if [ -n "$(ls -A "$output" 2>/dev/null)" ] && [ ! -e "$output/.quickstart" ]; then
  echo "error: $output is not empty and was not made by this script: name another --output" >&2
  exit 2
fi
say() { printf '\n== %s\n' "$*"; }

venv=$(bash "$repository/tools/setup_env.sh" verify)
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$output"
touch "$output/.quickstart"  # a folder of ours: the next start may replace it

say "tokenizer: byte-level BPE trained on $data"
python "$repository/tools/train_tokenizer.py" --input "$data" --vocab-size 1024 --output "$output/tokenizer" --overwrite

say "data: every twentieth document for validation, the others for training"
awk 'NR % 20 != 0' "$data" > "$output/train.jsonl"
awk 'NR % 20 == 0' "$data" > "$output/valid.jsonl"
for split in train valid; do
  python "$repository/tools/preprocess_data.py" --input "$output/$split.jsonl" --output-prefix "$output/$split" \
    --tokenizer "$output/tokenizer" --workers 2 --append-eod --overwrite
done
python "$repository/tools/inspect_data.py" "$output/train"

launch=(torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 300 --nproc-per-node)
config=(-m megatron_med.train "$here/config.yaml" --train.output_dir "$output/run"
  --data.train "[{path: $output/train}]" --data.valid "[{path: $output/valid}]")
rm -rf "$output/run"
say "training: 100 steps on 8 processes, tensor 2 x pipeline 2 x data 2"
"${launch[@]}" 8 "${config[@]}" --train.steps 100 --parallel.tensor 2 --parallel.pipeline 2

say "resuming: the same run goes on to step 120 on 2 processes, pipeline 2"
"${launch[@]}" 2 "${config[@]}" --train.steps 120 --parallel.tensor 1 --parallel.pipeline 2

say "export: a Hugging Face folder, its logits compared with ours"
python "$repository/tools/convert_checkpoint.py" export --from "$output/run" --to "$output/huggingface" --verify --overwrite

say "generation"
python "$repository/tools/generate.py" --checkpoint "$output/run" --prompt "People with heart failure may notice" \
  --max-new-tokens 80 --temperature 0.7 --top-p 0.9

say "done: $output/huggingface is the model, $output/run/metrics.jsonl has the curve"
