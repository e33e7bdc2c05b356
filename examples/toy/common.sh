# Sourced by examples/*/toy.sh, which set `here` to their folder and `system` to a name.
# usage of every toy.sh: [--output DIR]
repository=$(cd "$here/../.." && pwd)
toy=$repository/examples/toy
output=$repository/out/toy-$system
while [ $# -gt 0 ]; do
  case $1 in
    --output)
      [ $# -ge 2 ] || { echo "error: --output needs a folder; usage: toy.sh [--output DIR]" >&2; exit 2; }
      output=$2
      shift 2
      ;;
    *) echo "error: unknown option $1; usage: toy.sh [--output DIR]" >&2; exit 2 ;;
  esac
done
if [ -n "$(ls -A "$output" 2>/dev/null)" ] && [ ! -e "$output/.toy" ]; then
  echo "error: $output is not empty and was not made by this script: name another --output" >&2
  exit 2
fi
rm -rf "$output"
mkdir -p "$output"
touch "$output/.toy"
output=$(cd "$output" && pwd)
venv=$(bash "$repository/tools/setup_env.sh" toys)
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cd "$output"
python - <<'PY'
from importlib.util import find_spec

for name in ("_megatron_med_index", "_megatron_med_kernels"):
    if find_spec(name) is None:
        print(f"{name} was not built, for lack of a compiler: plain Python serves, slower")
PY

say() { printf '\n== %s\n' "$*"; }
tool() { python "$repository/tools/$1.py" "${@:2}"; }
evaluate() { tool evaluate "$@" --truncate left --batch-size 64 2> evaluate.log || { cat evaluate.log >&2; exit 1; }; }

# pretrained RECIPE|shrunk ranks ...: trains a recipe at toy size on some processes; its loss must fall.
#   train RANKS RECIPE NAME [OPTION ...]     OPTIONs of shrink.py
train() {
  local ranks=$1 recipe=$2 name=$3
  shift 3
  python "$toy/shrink.py" "$recipe" "$name.yaml" --name "$name" "$@"
  if [ "$ranks" = 1 ]; then
    python -m megatron_med.train "$name.yaml" > "$name.log" 2>&1
  else
    torchrun --nproc-per-node "$ranks" -m megatron_med.train "$name.yaml" > "$name.log" 2>&1
  fi || { tail -n 20 "$name.log" >&2; exit 1; }
  python "$toy/falls.py" "runs/$name"
}

# The text that everything begins with, and a held-out part of it.
sample() {
  awk 'NR % 20 != 0' "$repository/examples/quickstart/sample.jsonl" > train.jsonl
  awk 'NR % 20 == 0' "$repository/examples/quickstart/sample.jsonl" > valid.jsonl
}

# tokens PREFIX FILE TOKENIZER: token files of text.
tokens() {
  tool preprocess_data --input "$2" --output-prefix "$1" --tokenizer "$3" --workers 1 --append-eod
}

# llama_base: a small Llama that has read the sample, as a Hugging Face folder `base`, the place that LLaMA has.
llama_base() {
  say "base: a tokenizer, and a small Llama that reads the sample; it stands for LLaMA"
  tool train_tokenizer --input train.jsonl --vocab-size 1024 --output tokenizer
  tokens base-train train.jsonl tokenizer
  tokens base-valid valid.jsonl tokenizer
  train 1 "$toy/base.yaml" base --train base-train --valid base-valid --steps 24
  tool convert_checkpoint export --from runs/base --to base --verify
}
