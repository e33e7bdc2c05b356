#!/usr/bin/env bash
# MedAlpaca at toy size, from raw text to its table: bash examples/medalpaca/toy.sh [--output DIR]
# A base that stands for LLaMA, Alpaca, then Medical Meadow in full, with LoRA and with LoRA on 8 and 4 bit; USMLE by sampled
# answers. ../toy/README.md says what is small.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
system=medalpaca
. "$here/../toy/common.sh"
questions=$here/toy

sample
llama_base
tool convert_checkpoint import --from base --to checkpoints/llama

say "Alpaca: the base of all, tuned on instructions"
bash "$here/prepare.sh" alpaca tokenizer alpaca 0.1 "$questions/alpaca.json"
train 1 "$here/alpaca_7b.yaml" alpaca --base checkpoints/llama --train alpaca-train --valid alpaca-valid --steps 20 --lr 1e-3

say "Medical Meadow: full, LoRA, LoRA on int8, LoRA on NF4"
bash "$here/prepare.sh" medalpaca tokenizer meadow 0.1 "$questions/meadow.json"
for way in medalpaca_7b medalpaca_7b_lora medalpaca_7b_lora_int8 medalpaca_7b_lora_nf4; do
  case $way in *int8) steps=6 ;; *) steps=20 ;; esac # products in 8 bit are slow on a CPU
  train 1 "$here/$way.yaml" "$way" --base runs/alpaca --train meadow-train --valid meadow-valid --steps "$steps" --lr 2e-3
done

say "merged: the adapters of LoRA in the weights, and as a PEFT folder"
tool convert_adapter merge --from runs/medalpaca_7b_lora --to merged
tool convert_adapter export --from runs/medalpaca_7b_lora --to peft

say "scores: USMLE by sampled answers, up to five tries"
asked=()
for step in step1 step2 step3; do
  asked+=("usmle_$step=$questions/$step.json")
done
for way in alpaca medalpaca_7b medalpaca_7b_lora medalpaca_7b_lora_int8 medalpaca_7b_lora_nf4; do
  evaluate --checkpoint "runs/$way" --output "results/$way" --score medalpaca --limit 4 --tasks "${asked[@]}"
done

say "table"
tool compare_results results/* --output comparison
say "done: $output/comparison, $output/results/*/report.html"
