"""What reading a step's data costs a rank, at the recipes' sizes, against the step that the planner predicts.

    python tools/benchmark/loader.py [--rounds 5]

Random tokens in a file of two million documents; the loader reads, packs, checks and makes tensors. The prefetcher
does this during the step; what is printed is what would be hidden.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from report import Report, add_json_argument

from megatron_med.data.blend import BlendedDataset
from megatron_med.data.gpt import PackedDataset
from megatron_med.data.indexed import IndexedDataset
from megatron_med.data.indexed_writer import IndexedDatasetWriter
from megatron_med.data.loader import BatchLoader
from megatron_med.parallel.context import single_process_context

RECIPES = {"7b": (1600, 16, 10, 2048, 12.8), "70b": (512, 2, 2, 4096, 41.3)}
"""Global batch, data-parallel size, micro-batch, sequence length, and seconds of a step as tools/plan.py predicts them
for A100-80GB with one network card a node."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    add_json_argument(parser)
    arguments = parser.parse_args()
    report = Report("loader", {"rounds": arguments.rounds})
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        sizes = rng.lognormal(5.5, 1.0, 2_000_000).astype(np.int32) + 1
        with IndexedDatasetWriter(Path(folder) / "corpus", np.uint16) as writer:
            for part in np.array_split(sizes, 100):
                tokens = rng.integers(0, 32000, int(part.sum(dtype=np.int64)), dtype=np.uint16)
                writer.add_documents(tokens.tobytes(), part)
        for name, (batch, dp, micro, length, step) in RECIPES.items():
            data = PackedDataset(IndexedDataset(Path(folder) / "corpus"), length, 1, Path(folder) / "cache")
            stream = BlendedDataset([data], [1.0], 1_000_000, Path(folder) / "cache")
            loader = BatchLoader(
                stream,
                single_process_context(torch.device("cpu")),
                sequence_length=length,
                micro_batch_size=micro,
                vocab_size=32012,
                seed=1,
            )
            spent = []
            for number in range(arguments.rounds):
                start = time.perf_counter()
                loader.load(number * batch // dp, batch // dp, number)
                spent.append(time.perf_counter() - start)
            seconds = statistics.median(spent)
            samples = f"{batch // dp} x {length}"
            report.rows.append({"recipe": name, "samples": samples, "ms": 1e3 * seconds, "of a step": seconds / step})
    report.show()
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()
