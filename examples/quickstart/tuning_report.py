"""What tuning.sh has made: held-out loss, time and memory of each way, their curves, and 20 answers each.

python examples/quickstart/tuning_report.py OUT
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import transformers

matplotlib.use("agg")
import matplotlib.pyplot as plt

WAYS = ("full", "full-adamw8bit", "lora", "lora-int8", "lora-nf4")
LINES = {
    "full": "tab:blue",
    "full-adamw8bit": "black",
    "lora": "tab:orange",
    "lora-int8": "black",
    "lora-nf4": "tab:red",
}
"""Colours; ways in 16 or 32 bit are broad lines, the others thin ones on top of them."""

ANSWERS = 20
LONGEST = 400


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """One object a step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def held_out(run: Path) -> dict[int, float]:
    """Held-out loss by step."""
    return {line["step"]: line["valid_loss"] for line in read_metrics(run) if "valid_loss" in line}


def checkpoint_bytes(run: Path) -> int:
    """Of the newest checkpoint."""
    step = run / "checkpoints" / (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    return sum(path.stat().st_size for path in step.glob("*.distcp"))


def answers_that_end(out: Path, model: str, questions: list[str]) -> int:
    """Of so many greedy answers, those that end by themselves at the turn-end token."""
    pipe = transformers.pipeline("text-generation", model=str(out / model))
    end = pipe.model.generation_config.eos_token_id
    ended = 0
    for question in questions:
        options = {"do_sample": False, "max_new_tokens": LONGEST, "return_tensors": True}
        ids = pipe([{"role": "user", "content": question}], **options)[0]["generated_token_ids"]
        ended += ids[-1] == end
        print(f"[{model}] {pipe.tokenizer.decode(ids)[-400:]}")
    return ended


def draw(out: Path, before: float) -> None:
    """``OUT/curves.png``."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for way in WAYS:
        points = {0: before} | held_out(out / way)
        in_few_bits = "-" in way
        style: dict[str, Any] = {"linewidth": 1.2, "linestyle": ":" if way.endswith("nf4") else "--"}
        axes.plot(
            list(points),
            list(points.values()),
            color=LINES[way],
            label=way,
            **(style if in_few_bits else {"linewidth": 6, "alpha": 0.4}),
        )
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss of an answer's token")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(out / "curves.png", dpi=110)


def main() -> None:
    out = Path(sys.argv[1])
    transformers.utils.logging.set_verbosity_error()
    lines = (out / "qa-valid.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines][:: max(1, len(lines) // ANSWERS)][:ANSWERS]
    (before,) = held_out(out / "before").values()
    ended = {way: answers_that_end(out, f"{way}-hf", questions) for way in WAYS}
    draw(out, before)
    print(f"held-out loss before: {before:.3f}")
    print("| way | held-out loss | change | seconds a step | memory, MB | checkpoint, MB | answers that end |")
    for way in WAYS:
        steps = read_metrics(out / way)
        loss = list(held_out(out / way).values())[-1]
        seconds = statistics.median(step["step_seconds"] for step in steps)
        memory = max(step["memory_bytes"] for step in steps) / 1e6
        size = checkpoint_bytes(out / way) / 1e6
        change = f"{100 * (loss / before - 1):+.1f} %"
        print(
            f"| {way} | {loss:.3f} | {change} | {seconds:.2f} | {memory:.0f} | {size:.1f} | {ended[way]} of {ANSWERS} |"
        )


if __name__ == "__main__":
    main()
