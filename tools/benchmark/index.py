"""The index builder at GAP-Replay's size against megatron-core's, alternated in processes of their own, medians.

    python tools/benchmark/index.py [--documents 21100000] [--tokens 46700000000] [--sequence-length 4096] [--rounds 3]

Document, sample and shuffle index of one epoch; lengths are drawn for each source as published (documents, tokens).
Then the time to open the corpus and read a first sample: with nothing in the cache, and on a warm one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from report import Report, add_json_argument

from megatron_med.data.gpt import PackedDataset
from megatron_med.data.index import build_sample_index, shuffled_range
from megatron_med.data.indexed import IndexedDataset
from megatron_med.data.indexed_writer import IndexedDatasetWriter

SOURCES = {
    "guidelines": (41e3, 107e6),
    "abstracts": (15.7e6, 5.48e9),
    "papers": (4.9e6, 40.7e9),
    "replay": (494e3, 420e6),
}
SPREAD = 0.6
"""Standard deviation of the logarithm of lengths within a source."""
SEED = 1234


def draw_lengths(documents: int, tokens: int) -> npt.NDArray[np.int32]:
    """int32 lengths of so many documents with about so many tokens, in GAP-Replay's shares."""
    rng = np.random.default_rng(SEED)
    all_documents, all_tokens = (sum(item) for item in zip(*SOURCES.values(), strict=True))
    parts = []
    for count, size in SOURCES.values():
        share = int(documents * count / all_documents)
        mean = tokens * size / all_tokens / share
        parts.append(rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, share).astype(np.int32) + 1)
    return rng.permutation(np.concatenate(parts))


def ours(sizes: npt.NDArray[np.int32], length: int) -> tuple[Any, Any, Any]:
    rng = np.random.RandomState(SEED)
    documents = shuffled_range(len(sizes), rng)
    samples = build_sample_index(sizes, documents, length)
    return documents, samples, shuffled_range(len(samples) - 1, rng)


def theirs(sizes: npt.NDArray[np.int32], length: int) -> tuple[Any, Any, Any]:
    warnings.simplefilter("ignore")
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index

    rng = np.random.RandomState(SEED)
    documents = _build_document_index(np.arange(len(sizes), dtype=np.int32), 1, rng, False)
    tokens = int(sizes.sum(dtype=np.int64))
    samples = helpers.build_sample_idx(sizes, documents, length, 1, tokens, True, 1)
    return documents, samples, _build_shuffle_index(len(samples) - 1, len(samples) - 1, rng)


def _measure(build: Callable[..., Any], sizes: npt.NDArray[np.int32], length: int, pipe: Any) -> None:
    build(sizes[:1000], 64)  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    built = build(sizes, length)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    pipe.send((seconds, peak, [int(array.astype(np.int64).sum()) for array in built]))


def _in_process(build: Callable[..., Any], sizes: npt.NDArray[np.int32], length: int) -> tuple[float, float, list[int]]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_measure, args=(build, sizes, length, there))
    process.start()
    there.close()
    result = here.recv()
    process.join()
    return result


def _start_up(sizes: npt.NDArray[np.int32], length: int) -> Iterator[tuple[str, float]]:
    """Seconds to open the corpus and read a sample, with nothing in the cache and twice with everything."""
    with tempfile.TemporaryDirectory() as folder:
        prefix, cache = Path(folder) / "corpus", Path(folder) / "cache"
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_documents(b"", sizes)
        with (Path(folder) / "corpus.bin").open("ab") as file:
            file.truncate(2 * int(sizes.sum(dtype=np.int64)))
        for name in ("cold", "warm", "warm"):
            start = time.perf_counter()
            PackedDataset(IndexedDataset(prefix), length, SEED, cache).sample(0)
            yield f"open and first sample, {name} cache", time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=21_100_000)
    parser.add_argument("--tokens", type=int, default=46_700_000_000)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    add_json_argument(parser)
    arguments = parser.parse_args()
    sizes = draw_lengths(arguments.documents, arguments.tokens)
    results: dict[str, list[tuple[float, float, list[int]]]] = {"megatron_med": [], "megatron-core": []}
    for _ in range(arguments.rounds):
        results["megatron-core"].append(_in_process(theirs, sizes, arguments.sequence_length))
        results["megatron_med"].append(_in_process(ours, sizes, arguments.sequence_length))
    assert len({str(rounds[0][2]) for rounds in results.values()}) == 1, "the arrays differ"
    settings = {"documents": len(sizes), "tokens": int(sizes.sum(dtype=np.int64)), "sample": arguments.sequence_length}
    report = Report("index", settings | {"rounds": arguments.rounds})
    report.add_turns({name: [one[0] for one in rounds] for name, rounds in results.items()})
    for row in report.rows:
        row["GB above the start"] = statistics.median(one[1] for one in results[row["contestant"]])
    for name, seconds in _start_up(sizes, arguments.sequence_length):
        report.rows.append({"contestant": name, "ms": 1e3 * seconds})
    report.show()
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()
