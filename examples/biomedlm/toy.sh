#!/usr/bin/env bash
# BioMedLM at toy size, from raw text to its table: bash examples/biomedlm/toy.sh [--output DIR]
# Own tokenizer, GPT-2 from scratch (fully sharded over two processes), heads for MedQA, PubMedQA and BioASQ, summaries.
# ../toy/README.md says what is small.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
system=biomedlm
. "$here/../toy/common.sh"
questions=$here/toy

sample
say "tokenizer: byte-level BPE of its own, 1,024 pieces in the place of 28,896"
tool train_tokenizer --input train.jsonl --vocab-size 1024 --output tokenizer
tokens train train.jsonl tokenizer
tokens valid valid.jsonl tokenizer

say "pretraining: GPT-2 from scratch with decoupled AdamW, fully sharded over two processes"
train 2 "$here/2.7b.yaml" biomedlm --vocab-size 1024 --train train --valid valid --steps 24
tool convert_checkpoint export --from runs/biomedlm --to biomedlm --verify

say "bases for tuning: the model with the tokens that the scripts add"
for kind in heads summary; do
  tool extend_tokenizer --tokenizer tokenizer --tokens "biomedlm_$kind" --output "tokenizer-$kind"
  tool convert_checkpoint import --from biomedlm --to "checkpoints/$kind" --tokenizer "tokenizer-$kind"
done

say "heads: options of MedQA, classes of PubMedQA and BioASQ"
declare -A files=([medqa]=jsonl [pubmedqa]=json [bioasq]=tsv)
for task in medqa pubmedqa bioasq; do
  bash "$here/finetune/prepare.sh" "$task" "$questions/${task}_train.${files[$task]}" "$task" tokenizer-heads
  train 1 "$here/finetune/$task.yaml" "$task-head" --base checkpoints/heads --train "$task" --length 640 --steps 8 --lr 1e-3
done

say "summaries: the source masked, behind <|startoftext|>"
bash "$here/finetune/prepare.sh" meqsum "$questions/meqsum_train.csv" meqsum tokenizer-summary
train 1 "$here/finetune/meqsum.yaml" summaries --base checkpoints/summary --train meqsum --length 256 --steps 24

say "scores: each head its own, and 5 beams with ROUGE"
evaluate --checkpoint runs/medqa-head --output results/medqa-head --score head \
  --tasks "medqa_4options=$questions/medqa_test.jsonl"
for task in pubmedqa bioasq; do
  evaluate --checkpoint "runs/$task-head" --output "results/$task-head" --score head \
    --tasks "$task=$questions/${task}_test.${files[$task]}"
done
evaluate --checkpoint runs/summaries --output results/summaries --limit 6 --tasks "meqsum=$questions/meqsum_test.csv"

say "export: a classifier for transformers, its logits compared"
tool convert_checkpoint export --from runs/pubmedqa-head --to pubmedqa --verify

say "table"
tool compare_results results/medqa-head results/pubmedqa-head results/bioasq-head results/summaries --output comparison
say "done: $output/comparison, $output/results/*/report.html"
