#!/usr/bin/env bash
# Instruction files -> token files with a held-out part:
#   bash examples/medalpaca/prepare.sh alpaca|medalpaca TOKENIZER OUT HELD_OUT FILE...
# HELD_OUT is a share (0.1) or a count (2000); the records are shuffled with seed 42 before the cut.
set -euo pipefail
[ $# -ge 5 ] || { echo "usage: prepare.sh alpaca|medalpaca TOKENIZER OUT HELD_OUT FILE..." >&2; exit 2; }
template=$1 tokenizer=$2 out=$3 held_out=$4
shift 4
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/../../tools
mkdir -p "$(dirname "$out")"
python - "$out" "$held_out" "$@" <<'PY'
import json, random, sys

out, held_out, *files = sys.argv[1:]
records = []
for file in files:
    with open(file, encoding="utf-8") as opened:
        records += json.load(opened) if file.endswith(".json") else [json.loads(line) for line in opened if line.strip()]
usable = [record for record in records if record.get("output", "").strip()]
random.Random(42).shuffle(usable)
count = round(float(held_out) * len(usable)) if float(held_out) < 1 else int(held_out)
parts = {"valid": usable[:count], "train": usable[count:]}
for name, part in parts.items():
    with open(f"{out}-{name}.jsonl", "w", encoding="utf-8") as opened:
        opened.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in part)
print(f"{len(records):,} records, {len(records) - len(usable):,} of them without an answer and left out; "
      f"{len(parts['train']):,} to train on, {count:,} held out")
PY
for part in train valid; do
  [ -s "$out-$part.jsonl" ] || continue
  python "$tools/preprocess_instructions.py" --input "$out-$part.jsonl" --template "$template" \
    --tokenizer "$tokenizer" --output-prefix "$out-$part"
done
