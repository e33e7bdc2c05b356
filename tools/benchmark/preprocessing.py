"""Preprocessing against the bare tokenizer library: same text, same number of processes, alternated, medians.

    python tools/benchmark/preprocessing.py --input a.jsonl --tokenizer PATH [--workers 2] [--megabytes 60] [--rounds 3]
    python tools/benchmark/preprocessing.py --input a.jsonl --tokenizer PATH --memory 10     peak memory over 10 GB

The bare side has the texts in memory, in processes that have loaded the tokenizer, and throws the ids away. Ours is
the whole command: processes, JSON, order, writing, index.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from report import Report, add_json_argument

from megatron_med.data.jsonl import read_lines, text_of
from megatron_med.data.preprocess import PreprocessOptions, preprocess
from megatron_med.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=60, help="of input, repeated until there is so much")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, help="gigabytes of input to measure peak memory over, no comparison")
    add_json_argument(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = arguments.memory * 1e9 if arguments.memory else arguments.megabytes * 1e6
        source = _repeated(arguments.input, int(size), Path(folder) / "text.jsonl")
        options = PreprocessOptions(
            [source], Path(folder) / "out", arguments.tokenizer, arguments.workers, append_eod=True, overwrite=True
        )
        if arguments.memory:
            _measure_memory(options)
        else:
            report = _compare(options, arguments.rounds)
            report.show()
            if arguments.json:
                report.write(arguments.json)


def _repeated(inputs: list[Path], size: int, target: Path) -> Path:
    content = b"".join(line.content for line in read_lines(inputs) if _has_text(line))
    with target.open("wb") as file:
        while file.tell() < size:
            file.write(content)
    return target


def _has_text(line: Any) -> bool:
    try:
        return bool(text_of(line, "text"))
    except ValueError:
        return False


def _compare(options: PreprocessOptions, rounds: int) -> Report:
    texts = [text_of(line, "text") for line in read_lines(options.inputs)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ours, bare = [], []
    for _ in range(rounds):
        bare.append(_bare(texts, options))
        start = time.perf_counter()
        summary = preprocess(options)
        ours.append(time.perf_counter() - start)
    settings = {"MB of text": round(megabytes), "documents": summary.documents, "processes": options.workers}
    report = Report(f"preprocessing, {options.workers} processes", settings | {"rounds": rounds})
    report.add_turns({"preprocessing": ours, "the bare library": bare})
    for row in report.rows:
        row |= {"MB/s": 1e3 * megabytes / row["ms"], "tokens/s": 1e3 * summary.tokens / row["ms"]}
    return report


def _bare(texts: list[str], options: PreprocessOptions) -> float:
    """Seconds in which as many processes encode all texts and keep nothing."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(options.workers + 1)
    processes = [
        context.Process(target=_encode_share, args=(texts, number, options, barrier))
        for number in range(options.workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    return time.perf_counter() - start


def _encode_share(texts: list[str], number: int, options: PreprocessOptions, barrier: Any) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    share = texts[number :: options.workers]
    barrier.wait()
    for start in range(0, len(share), 256):
        tokenizer.encode_batch(share[start : start + 256])


def _measure_memory(options: PreprocessOptions) -> None:
    """Peak resident memory of this process and its workers, by tenth of the run."""
    peaks: list[tuple[float, float]] = []
    done = threading.Event()
    start = time.perf_counter()

    def watch() -> None:
        while not done.wait(1.0):
            peaks.append((time.perf_counter() - start, _resident_megabytes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        summary = preprocess(options)
    finally:
        done.set()
        watcher.join()
    seconds = time.perf_counter() - start
    gigabytes = options.inputs[0].stat().st_size / 1e9
    print(f"{gigabytes:.1f} GB, {summary.documents:,} documents, {summary.tokens:,} tokens in {seconds:,.0f} s")
    for tenth in range(10):
        low, high = seconds * tenth / 10, seconds * (tenth + 1) / 10
        inside = [size for moment, size in peaks if low <= moment < high]
        if inside:
            print(f"{tenth * 10:3d} to {tenth * 10 + 10:3d} %: peak {max(inside):,.0f} MB")


def _resident_megabytes() -> float:
    """Proportional set size of this process and all below it."""
    total = 0
    for pid in _below(os.getpid()):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1e3


def _below(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # the thread has ended
            continue
        found += [item for child in children for item in _below(int(child))]
    return found


if __name__ == "__main__":
    main()
