"""Whether scores are learned: a small model tuned on one half of PubMedQA's questions and scored on the other.

    python examples/biomedlm/finetune/halves.py --questions pubmedqa.json --text abstracts.jsonl --output out/halves

A small GPT-2 reads the abstracts first, then a head is tuned on one half, for three draws of the halves; the other half
is scored. Tells the right answers of each with the binomial p against chance (a third) and against always saying the
most frequent answer. The halves of different draws overlap, so that their counts are not to be added.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

from scipy.stats import binomtest

REPOSITORY = Path(__file__).resolve().parents[3]
TOY = REPOSITORY / "examples" / "toy"
FINETUNE = REPOSITORY / "examples" / "biomedlm" / "finetune"
SEEDS = (1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="PubMedQA's labelled questions, by PMID")
    parser.add_argument("--text", type=Path, required=True, help="JSON Lines of abstracts to pretrain on")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--pretraining-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    out = arguments.output.resolve()
    out.mkdir(parents=True)
    _pretrain(out, arguments.text.resolve(), arguments.pretraining_steps)
    records = json.loads(arguments.questions.read_text(encoding="utf-8"))
    for seed in SEEDS:
        right, questions, frequent = _one_half(out, records, seed, arguments.steps)
        print(f"seed {seed}: {right} of {questions} right ({right / questions:.4f})")
        for name, share in (("a third", 1 / 3), ("the most frequent answer", frequent / questions)):
            p = binomtest(right, questions, share, alternative="greater").pvalue
            print(f"  against {name} ({share:.4f}): binomial p {p:.3g}")


def _pretrain(out: Path, text: Path, steps: int) -> None:
    """A GPT-2 of 4 layers on the abstracts, and the same with BioMedLM's tokens for heads."""
    _tool(out, "train_tokenizer", "--input", text, "--vocab-size", 4096, "--output", "tokenizer")
    _tool(
        out, "preprocess_data", "--input", text, "--output-prefix", "text", "--tokenizer", "tokenizer", "--append-eod"
    )
    options = ("--train", "text", "--vocab-size", 4096, "--steps", steps, "--batch", 16)
    _train(out, REPOSITORY / "examples" / "biomedlm" / "2.7b.yaml", "base", *options)
    _tool(out, "convert_checkpoint", "export", "--from", "runs/base", "--to", "base")
    _tool(out, "extend_tokenizer", "--tokenizer", "tokenizer", "--tokens", "biomedlm_heads", "--output", "heads")
    _tool(out, "convert_checkpoint", "import", "--from", "base", "--to", "checkpoint", "--tokenizer", "heads")


def _one_half(out: Path, records: dict[str, dict[str, str]], seed: int, steps: int) -> tuple[int, int, int]:
    """Right answers, questions, and how often the most frequent answer of the tuned half is right in the other."""
    names = sorted(records)
    random.Random(seed).shuffle(names)
    tuned, scored = names[::2], names[1::2]
    for name, part in (("tuned", tuned), ("scored", scored)):
        content = json.dumps({key: records[key] for key in part})
        (out / f"{name}{seed}.json").write_text(content, encoding="utf-8")
    data = ("--task", "pubmedqa", "--head", "classification", "--labels", "yes", "no", "maybe", "--max-length", 640)
    files = ("--input", f"tuned{seed}.json", "--output-prefix", f"data{seed}", "--tokenizer", "heads")
    _tool(out, "preprocess_questions", *data, *files)
    options = ("--base", "checkpoint", "--train", f"data{seed}", "--length", 640, "--steps", steps, "--lr", "5e-4")
    _train(out, FINETUNE / "pubmedqa.yaml", f"half{seed}", *options)
    task = ("--tasks", f"pubmedqa=scored{seed}.json", "--score", "head", "--output", f"results{seed}")
    _tool(out, "evaluate", "--checkpoint", f"runs/half{seed}", *task)
    lines = (out / f"results{seed}" / "samples_pubmedqa.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    most = Counter(records[name]["final_decision"] for name in tuned).most_common(1)[0][0]
    frequent = sum(records[name]["final_decision"] == most for name in scored)
    return sum(one["prediction"] == one["gold"] for one in samples), len(samples), frequent


def _tool(out: Path, name: str, *arguments: object) -> None:
    _run(out, REPOSITORY / "tools" / f"{name}.py", *arguments)


def _train(out: Path, recipe: Path, name: str, *options: object) -> None:
    _run(out, TOY / "shrink.py", recipe, f"{name}.yaml", "--name", name, *options)
    _run(out, "-m", "megatron_med.train", f"{name}.yaml")
    _run(out, TOY / "falls.py", f"runs/{name}")


def _run(out: Path, *arguments: object) -> None:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])


if __name__ == "__main__":
    main()
