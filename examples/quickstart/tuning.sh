#!/usr/bin/env bash
# From raw text to five tuned models:  bash examples/quickstart/tuning.sh ABSTRACTS.jsonl WIKIDOC_PATIENT.json MEDQUAD.jsonl OUT
set -euo pipefail
[ $# -eq 4 ] || { echo "usage: tuning.sh ABSTRACTS.jsonl WIKIDOC_PATIENT.json MEDQUAD.jsonl OUT" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tools=$here/../../tools out=$4
venv=$(bash "$tools/setup_env.sh" verify)
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$out"

train() { python -m megatron_med.train "$here/tuning.yaml" --train.output_dir "$out/$1" "${@:2}"; }

# The base: abstracts, a tokenizer made of them, 600 steps.
awk 'NR % 50 != 0' "$1" > "$out/train.jsonl"
awk 'NR % 50 == 0' "$1" > "$out/valid.jsonl"
python "$tools/train_tokenizer.py" --input "$out/train.jsonl" --vocab-size 4096 --output "$out/tokenizer" --overwrite
for split in train valid; do
  python "$tools/preprocess_data.py" --input "$out/$split.jsonl" --output-prefix "$out/$split" \
    --tokenizer "$out/tokenizer" --workers 2 --append-eod --overwrite
done
train base --data.train "[{path: $out/train}]" --data.valid "[{path: $out/valid}]"

# Questions and answers: every twentieth is held out.
python - "$2" "$3" "$out" <<'PY'
import json, sys
wikidoc, medquad, out = sys.argv[1:]
records = json.load(open(wikidoc, encoding="utf-8")) + [json.loads(line) for line in open(medquad, encoding="utf-8")]
for split in ("train", "valid"):
    with open(f"{out}/qa-{split}.jsonl", "w", encoding="utf-8") as file:
        for number, record in enumerate(records):
            if (number % 20 == 0) == (split == "valid"):
                # both sets hold one question and its answer: in the question's own words, without a task around it
                question = record["input"] or record["instruction"]
                file.write(json.dumps({"question": question, "answer": record["output"]}) + "\n")
PY
for split in train valid; do
  python "$tools/preprocess_instructions.py" --input "$out/qa-$split.jsonl" --output-prefix "$out/qa-$split" \
    --tokenizer "$out/tokenizer" --template alpaca --workers 2 --overwrite
done

# Tuned in full, with moments in 32 and in 8 bit; and with LoRA, beside weights in 32 bit, int8 and NF4.
data=(--data.train "[{path: $out/qa-train}]" --data.valid "[{path: $out/qa-valid}]" --data.truncate drop
  --data.sequence_length 256)
run=(--checkpoint.load "$out/base" --train.steps 0 --train.epochs 6 --train.valid_interval 25)
train before "${data[@]}" --checkpoint.load "$out/base" --train.steps 1 --optimizer.lr 0 --lr_schedule.min_lr 0
lora=(--optimizer.lr 4e-3 --lora.rank 16 --lora.alpha 32
  --lora.targets "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]")
train full "${data[@]}" "${run[@]}" --optimizer.lr 1e-3
train full-adamw8bit "${data[@]}" "${run[@]}" --optimizer.lr 1e-3 --optimizer.name adamw8bit
train lora "${data[@]}" "${run[@]}" "${lora[@]}"
train lora-int8 "${data[@]}" "${run[@]}" "${lora[@]}" --quantize.base int8
train lora-nf4 "${data[@]}" "${run[@]}" "${lora[@]}" --quantize.base nf4
for way in lora lora-int8 lora-nf4; do
  python "$tools/convert_adapter.py" merge --from "$out/$way" --to "$out/$way-merged" --overwrite
  python "$tools/convert_checkpoint.py" export --from "$out/$way-merged" --to "$out/$way-hf" --verify --overwrite
done
for way in full full-adamw8bit; do
  python "$tools/convert_checkpoint.py" export --from "$out/$way" --to "$out/$way-hf" --verify --overwrite
done
python "$here/tuning_report.py" "$out"
