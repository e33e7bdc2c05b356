#!/usr/bin/env bash
# Token files of one question set, as Meditron was tuned on it.
#   bash examples/gap_replay/sft/prepare.sh medqa|medmcqa|pubmedqa answer|explained RAW PREFIX [TOKENIZER]
# The instructions are those of epfLLM/meditron, evaluation/instructions.json; they stand inside the question.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/../../../tools
if [ $# -lt 4 ]; then
  echo "usage: prepare.sh medqa|medmcqa|pubmedqa answer|explained RAW PREFIX [TOKENIZER]" >&2
  exit 2
fi
task=$1 set=$2 raw=$3 prefix=$4 tokenizer=${5:-data/gap_replay/tokenizer-sft}
skill="mechanisms underlying health, disease, patient care, and modes of therapy"
guidelines="Base your answer on the current and standard practices referenced in medical guidelines."
case $task in
  medqa)
    before="You are a medical doctor taking the US Medical Licensing Examination. You need to demonstrate your"
    before+=" understanding of basic and clinical science, medical knowledge, and $skill. Show your ability to apply the"
    before+=" knowledge essential for medical practice. For the following multiple-choice question, select one correct"
    before+=" answer from A to E. $guidelines"
    ;;
  medmcqa)
    before="You are a medical doctor answering realworld medical entrance exam questions. Based on your understanding of"
    before+=" basic and clinical science, medical knowledge, and $skill, answer the following multiple-choice question."
    before+=" Select one correct answer from A to D. $guidelines"
    ;;
  pubmedqa)
    before="As an expert doctor in clinical science and medical knowledge, can you tell me if the following statement is"
    before+=" correct? Answer yes, no, or maybe."
    ;;
  *)
    echo "error: the task is '$task': medqa, medmcqa or pubmedqa is needed." >&2
    exit 2
    ;;
esac
case $set in
  answer) answers=letter behind=$'The answer is:\n' ;;
  explained) answers=explained behind=$'Let\'s think step-by-step\n' ;;
  *)
    echo "error: the set is '$set': answer or explained is needed." >&2
    exit 2
    ;;
esac
[ "$set" = answer ] || skip=--skip-bad-records # those without an explanation
exec python "$tools"/preprocess_instructions.py --input "$raw" --output-prefix "$prefix" --tokenizer "$tokenizer" \
  --template chatml --format "$task" --answers "$answers" --before "$before" --behind "$behind" ${skip:-}
