#!/usr/bin/env bash
# Meditron at toy size, from raw text to its tables: bash examples/gap_replay/toy.sh [--output DIR]
# Base, tokenizer with its tokens, GAP-Replay, continued pretraining (tensor 2 x pipeline 2), tuning for answers and for chains
# of thought, few-shot, top-token, chain of thought, self-consistency. ../toy/README.md says what is small.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
system=meditron
. "$here/../toy/common.sh"
questions=$here/toy

sample
llama_base

say "corpus: raw records of four sources, cleaned, without what repeats the questions, and tokenized"
python "$questions/raw.py" train.jsonl raw
sed "s|QUESTIONS|$questions|" "$questions/corpus.yaml" > corpus.yaml
tool build_corpus corpus.yaml
tool corpus_report data/gap_replay

say "tokenizer: the corpus has given it its 12 tokens; ChatML's two stand behind them for the tuning"
tool extend_tokenizer --tokenizer data/gap_replay/tokenizer --tokens chatml --output tokenizer-sft

say "continued pretraining: the recipe of 70B, tensor 2 x pipeline 2 on four processes"
tool convert_checkpoint import --from base --to checkpoints/base --tokenizer data/gap_replay/tokenizer
parts=(data/gap_replay/guidelines-train data/gap_replay/abstracts-train data/gap_replay/papers-train data/gap_replay/replay-train)
train 4 "$here/70b.yaml" meditron --base checkpoints/base --train "${parts[@]}" --valid "${parts[@]:0:3}" \
  --steps 16 --tensor 2 --pipeline 2
tool convert_checkpoint export --from runs/meditron --to meditron --verify
tool convert_checkpoint import --from meditron --to checkpoints/meditron --tokenizer tokenizer-sft

say "tuning: answers, and chains of thought"
bash "$here/sft/prepare.sh" medqa answer "$questions/medqa_train.jsonl" medqa tokenizer-sft
bash "$here/sft/prepare.sh" medmcqa explained "$questions/medmcqa_train.jsonl" medmcqa-cot tokenizer-sft
train 1 "$here/sft/7b.yaml" answers --base checkpoints/meditron --train medqa --length 768 --steps 8
train 2 "$here/sft/7b.yaml" thoughts --base checkpoints/meditron --train medmcqa-cot --length 768 --steps 8 --tensor 2

say "scores: few-shot, top-token, chain of thought, self-consistency"
asked=(--limit 10 --tasks "medqa=$questions/medqa_test.jsonl" "medmcqa=$questions/medmcqa_test.jsonl")
evaluate --checkpoint runs/meditron --output results/meditron-few-shot --score top_token --shots 3 --limit 10 \
  --tasks "medqa=$questions/medqa_test.jsonl" --shots-from "$questions/medqa_train.jsonl"
evaluate --checkpoint runs/answers --output results/meditron-answers "${asked[@]}" --score top_token letter
evaluate --checkpoint runs/thoughts --output results/meditron-thoughts "${asked[@]}" --score cot self_consistency --samples 3

say "table"
tool compare_results results/meditron-few-shot results/meditron-answers results/meditron-thoughts --output comparison
say "done: $output/comparison, $output/results/*/report.html"
