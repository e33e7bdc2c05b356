#!/usr/bin/env bash
# Token files of one question set or of summaries, as BioMedLM was tuned on them.
#   bash examples/biomedlm/finetune/prepare.sh medqa|pubmedqa|bioasq|meqsum RAW PREFIX [TOKENIZER] [OPTION ...]
# OPTIONs go to the tool: --separator '' leaves [SEP] out, as the published script for classification does.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/../../../tools
if [ $# -lt 3 ]; then
  echo "usage: prepare.sh medqa|pubmedqa|bioasq|meqsum RAW PREFIX [TOKENIZER] [OPTION ...]" >&2
  exit 2
fi
task=$1 raw=$2 prefix=$3 tokenizer=${4:-}
shift $(($# < 4 ? $# : 4))
case $task in
  medqa) set -- --task medqa_4options --head multiple_choice "$@" ;;
  pubmedqa) set -- --task pubmedqa --head classification --labels yes no maybe "$@" ;;
  bioasq) set -- --task bioasq --head classification --labels yes no "$@" ;;
  meqsum)
    exec python "$tools"/preprocess_instructions.py --input "$raw" --output-prefix "$prefix" --template biomedlm_summary \
      --tokenizer "${tokenizer:-data/biomedlm/tokenizer-summary}" --columns question=CHQ answer=Summary "$@"
    ;;
  *)
    echo "error: the task is '$task': medqa, pubmedqa, bioasq or meqsum is needed." >&2
    exit 2
    ;;
esac
exec python "$tools"/preprocess_questions.py --input "$raw" --output-prefix "$prefix" \
  --tokenizer "${tokenizer:-data/biomedlm/tokenizer-heads}" "$@"
