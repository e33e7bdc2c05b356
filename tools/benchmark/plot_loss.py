"""Draws the training and validation loss of a run, beside the unigram entropy of the validation text.

python tools/benchmark/plot_loss.py RUN --train PREFIX --valid PREFIX --output docs/loss.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from megatron_med.data.indexed import IndexedDataset
from megatron_med.errors import run_command


def unigram_entropy(train: IndexedDataset, valid: IndexedDataset, vocab_size: int) -> float:
    """Cross entropy of the validation tokens under the training text's token frequencies (add one), in nats."""
    counts = {
        name: np.bincount(np.fromfile(data.bin_path, data.dtype), minlength=vocab_size)
        for name, data in (("train", train), ("valid", valid))
    }
    probabilities = (counts["train"] + 1) / (counts["train"].sum() + vocab_size)
    return float(-(counts["valid"] * np.log(probabilities)).sum() / counts["valid"].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="RUN folder")
    parser.add_argument("--train", required=True, help="prefix of the training data")
    parser.add_argument("--valid", required=True, help="prefix of the validation data")
    parser.add_argument("--output", type=Path, required=True, help="the picture (.png)")
    arguments = parser.parse_args()
    vocab_size = json.loads(Path(f"{arguments.train}.json").read_text())["tokenizer"]["vocab_size"]
    entropy = unigram_entropy(IndexedDataset(arguments.train), IndexedDataset(arguments.valid), vocab_size)
    last = draw(arguments.run, entropy, arguments.output)
    print(f"unigram entropy {entropy:.4f} nats; last validation loss {last:.4f}")
    print(f"drew {arguments.output}")


def draw(run: Path, entropy: float, output: Path) -> float:
    """Writes the picture and returns the last validation loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    valid = [line for line in metrics if "valid_loss" in line]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
    for lines, key, style in ((metrics, "loss", "-"), (valid, "valid_loss", "o-")):
        tokens = [line["consumed_tokens"] / 1e6 for line in lines]
        name = "training loss" if key == "loss" else "validation loss"
        axes.plot(tokens, [line[key] for line in lines], style, linewidth=1, label=name)
    axes.axhline(entropy, color="grey", linestyle="--", label=f"unigram entropy ({entropy:.2f})")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    return valid[-1]["valid_loss"]


if __name__ == "__main__":
    run_command(main)
