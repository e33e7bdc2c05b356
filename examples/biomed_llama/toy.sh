#!/usr/bin/env bash
# BioMed-LLaMA at toy size, from raw text to its table: bash examples/biomed_llama/toy.sh [--output DIR]
# A base that stands for LLaMA, continued pretraining with hybrid sharding (two replicas of two processes), both instruction
# mixtures, tuning on one task; word perplexity, likelihood of options, exact strings, self-consistency.
# ../toy/README.md says what is small.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
system=biomed_llama
. "$here/../toy/common.sh"
questions=$here/toy

sample
llama_base
tool convert_checkpoint import --from base --to checkpoints/llama

say "continued pretraining: sharded in pairs, replicated across them"
awk 'NR % 2 == 0' train.jsonl > pubmed.jsonl
tokens pubmed pubmed.jsonl tokenizer
train 4 "$here/pretrain.yaml" continued --base checkpoints/llama --train pubmed --valid base-valid --steps 16 --batch 8 --replicate 2

say "instruction data: question sets, Alpaca, chains of thought"
instructions() { tool preprocess_instructions --template biomed_llama --tokenizer tokenizer "$@"; }
instructions --input "$questions/medqa_train.jsonl" --output-prefix medqa --answers option
instructions --input "$questions/medmcqa_train.jsonl" --output-prefix medmcqa --answers option
instructions --input "$questions/pubmedqa_train.json" --output-prefix pubmedqa --format pubmedqa
instructions --input "$questions/medmcqa_train.jsonl" --output-prefix thoughts --answers explained --behind "Let's think step-by-step"
instructions --input "$questions/alpaca.json" --output-prefix alpaca

say "tuning: mixture A, mixture B, one task"
train 1 "$here/instruct/mixture_a.yaml" mixture_a --base runs/continued --length 512 --steps 9 \
  --train medqa alpaca pubmedqa thoughts
train 1 "$here/instruct/mixture_b.yaml" mixture_b --base runs/continued --length 512 --steps 9 \
  --train medqa medmcqa pubmedqa alpaca thoughts
train 1 "$here/instruct/one_task.yaml" one_task --base runs/continued --length 512 --steps 9 --train medqa

say "scores: word perplexity, likelihood of each option's text, few-shot, exact strings, self-consistency"
asked=(--limit 10 --tasks "medqa_4options=$questions/medqa_test.jsonl" "pubmedqa=$questions/pubmedqa_test.json")
evaluate --checkpoint runs/base --output results/base --score biomed_llama "${asked[@]}" \
  "pubmed_abstracts_perplexity=$output/valid.jsonl"
evaluate --checkpoint runs/continued --output results/continued --score biomed_llama "${asked[@]}" \
  "pubmed_abstracts_perplexity=$output/valid.jsonl"
evaluate --checkpoint runs/continued --output results/few-shot --score biomed_llama --shots 3 --limit 10 \
  --tasks "medqa_4options=$questions/medqa_test.jsonl" --shots-from "$questions/medqa_train.jsonl"
for run in mixture_a mixture_b; do
  evaluate --checkpoint "runs/$run" --output "results/$run" --score biomed_llama text self_consistency "${asked[@]}"
done
evaluate --checkpoint runs/one_task --output results/one_task --score text --limit 10 --tasks "medqa_4options=$questions/medqa_test.jsonl"

say "table"
tool compare_results results/* --output comparison
say "done: $output/comparison, $output/results/*/report.html"
