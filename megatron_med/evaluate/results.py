"""The folder of results: samples line by line, and the table made of them. A killed run goes on. No torch here."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from megatron_med.errors import DataError, TargetExistsError
from megatron_med.evaluate.statistics import RESAMPLES, interval, percentiles
from megatron_med.files import naming, whole_lines, write_json

RESULTS = "results.json"
REPORT = "report.html"
_PARTS = ("tasks", "gold", "contamination", "analysis")

ORDER = "@"
"""What stands between a metric and the number of places that the options were moved by."""

Key = tuple[str, str, int]
"""Question, way, and seed of the shots (0 where there are none)."""
Sample = dict[str, Any]


class ResultsFolder:
    """``results.json`` and ``samples_TASK.jsonl``.

    Args:
        path: of the folder.
        identity: what samples depend on; a folder with another is refused.
        overwrite: begin anew.

    Raises:
        TargetExistsError: the folder holds other things, results of another model or of other settings, or another run
            writes it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path
        self._parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise TargetExistsError(f"{path} is being written by another process: wait for it to end.") from error
        if overwrite and (path / RESULTS).is_file():
            for file in [path / REPORT, *path.glob("samples_*.jsonl"), path / RESULTS]:
                file.unlink(missing_ok=True)
        self._settings = self._joined(json.loads(json.dumps(identity)))
        self._write()

    def _joined(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """The settings, with the files of tasks that were scored before."""
        if not [file for file in self.path.iterdir() if file.name not in (".lock", REPORT)]:
            return wanted
        try:
            content = json.loads((self.path / RESULTS).read_text(encoding="utf-8"))
            stored, self._parts["tasks"] = content["settings"], content["tasks"]
            self._parts |= {part: content.get(part, {}) for part in _PARTS[1:]}
            files = stored["files"]
        except (OSError, ValueError, KeyError, TypeError):
            raise TargetExistsError(f"{self.path} is not empty and holds no results: name another --output.") from None
        wanted = wanted | {"files": files | wanted["files"]}
        stored = stored | {"files": wanted["files"] | files}
        different = [name for name in wanted if stored.get(name) != wanted[name]]
        if different:
            name = different[0]
            raise TargetExistsError(
                f"{self.path} holds results with {name} {_short(stored.get(name))}, not {_short(wanted[name])}: name "
                "another --output, or pass --overwrite."
            )
        return stored | wanted

    def read(self, task: str) -> dict[Key, Sample]:
        """Samples that stand already; a last line that a kill has cut is taken away."""
        path = samples_file(self.path, task)
        return read_samples(path) if path.is_file() else {}

    def add(self, task: str, samples: Sequence[Sample]) -> None:
        """Writes samples at the end of a task's file."""
        path = samples_file(self.path, task)
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))

    def write(self, task: str, table: Mapping[str, Any], gold: Mapping[str, int]) -> None:
        """Writes the table of a task beside what stands: other tasks, and other metrics of this one.

        Args:
            task: its name.
            table: metric -> value, interval, count, unparsed.
            gold: letter -> how often it is the right answer.
        """
        tasks = self._parts["tasks"]
        tasks[task] = tasks.get(task, {}) | dict(table)
        self.note("gold", {task: dict(gold)} if gold else {})

    def note(self, part: str, by_task: Mapping[str, Any]) -> None:
        """Writes what else is known of some tasks.

        Args:
            part: ``gold``, ``contamination`` or ``analysis``.
            by_task: name -> what is known.
        """
        self._parts[part] |= by_task
        self._write()

    def forget(self, name: str, task: str) -> None:
        """Takes a part of every analysis of a task away."""
        for told in self._parts["analysis"].get(task, {}).values():
            told.pop(name, None)

    def known(self, part: str) -> Mapping[str, Any]:
        """What ``note`` and ``write`` have put there, by task; ``tasks`` are the tables."""
        return self._parts[part]

    def _write(self) -> None:
        write_json(self.path / RESULTS, {"settings": self._settings, **self._parts}, ensure_ascii=False)

    def close(self) -> None:
        """Lets go of the folder."""
        self._lock.release()


def samples_file(folder: Path, task: str) -> Path:
    """Where the samples of a task stand."""
    return folder / f"samples_{task}.jsonl"


def read_samples(path: Path) -> dict[Key, Sample]:
    """The samples of a file; a last line that a kill has cut is left out, and taken away.

    Raises:
        DataError: a line is no sample.
    """
    samples = {}
    for number, line in enumerate(whole_lines(path), 1):
        try:
            sample = json.loads(line)
            samples[key_of(sample)] = sample
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number} is no sample ({error}). Pass --overwrite to begin anew.") from error
    return samples


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else f"{text[:77]}..."


def key_of(sample: Sample) -> Key:
    """What a sample is the answer to."""
    return sample["id"], sample["score"], sample.get("seed", 0)


def accuracies(samples: Iterable[Sample], wanted: set[Key]) -> dict[str, dict[str, Any]]:
    """Accuracy of every metric with count, unparsed answers and a bootstrap interval; over seeds their mean and spread.

    Args:
        samples: of one task.
        wanted: keys that belong to this run.
    """
    hits: dict[str, dict[int, list[bool]]] = {}
    unparsed: Counter[str] = Counter()
    others: dict[str, Counter[str]] = {}
    for sample in samples:
        if key_of(sample) not in wanted:
            continue
        for metric, letter in sample["predictions"].items():
            hits.setdefault(metric, {}).setdefault(sample.get("seed", 0), []).append(letter == sample["gold"])
            unparsed[metric] += letter is None
            counted = others.setdefault(metric, Counter())
            counted["too_long"] += bool(sample.get("too_long"))
            counted["cut"] += bool(sample.get("cut"))
            counted["ties"] += bool(sample.get("tie"))
    table = {}
    for metric, by_seed in hits.items():
        values = [float(np.mean(found)) for found in by_seed.values()]
        answers = np.mean(list(by_seed.values()), axis=0)  # of each question, over the seeds
        table[metric] = {
            "value": statistics.fmean(values),
            "interval": interval(answers),
            "count": len(answers),
            "unparsed": unparsed[metric],
        }
        if len(by_seed) > 1:
            table[metric]["answers"] = len(answers) * len(by_seed)
        table[metric] |= {name: count for name, count in others[metric].items() if count}
        if len(by_seed) > 1:
            of_seeds = dict(zip(map(str, by_seed), values, strict=True))
            table[metric] |= {"spread": statistics.stdev(values), "seeds": of_seeds}
    return table


def perplexity(samples: Iterable[Sample], wanted: set[Key]) -> dict[str, dict[str, Any]]:
    """exp(-sum of log-likelihoods / number of white-space words), and its interval over resampled documents."""
    mine = [sample for sample in samples if key_of(sample) in wanted]
    totals = np.array([sample["loglikelihood"] for sample in mine])
    words = np.array([sample["words"] for sample in mine], dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(mine), size=(RESAMPLES, len(mine)))
    resampled = np.exp(-totals[drawn].sum(axis=1) / words[drawn].sum(axis=1))
    value = math.exp(-totals.sum() / words.sum())
    described = {"interval": percentiles(resampled), "count": len(mine), "unparsed": 0, "words": int(words.sum())}
    return {"word_perplexity": {"value": value, **described}}


def describe(task: str, table: Mapping[str, Mapping[str, Any]], gold: Mapping[str, int]) -> list[str]:
    """A table in lines."""
    counts = ", ".join(f"{answer} {count}" for answer, count in gold.items())
    lines = [f"{task} (gold answers: {counts})" if counts else task]
    for metric, found in table.items():
        if ORDER in metric:
            continue
        low, high = found["interval"]
        told = ("unparsed", "too_long", "cut", "ties", "spread")
        notes = [f"{name} {found[name]:.4g}" for name in told if found.get(name)]
        if found.get("too_long"):
            notes.append("--truncate left cuts what is too long")
        if found.get("answers"):
            notes = [f"of {found['answers']} answers: {', '.join(notes)}"] if notes else []
        line = f"  {metric:<28} {found['value']:8.4f}  [{low:.4f}, {high:.4f}]  of {found['count']}"
        orders = [moved["value"] for name, moved in table.items() if name.startswith(f"{metric}{ORDER}")]
        if orders:
            values = [found["value"], *orders]
            notes.append(f"{len(values)} orders of the options: {min(values):.4f} to {max(values):.4f}")
        lines.append("; ".join([line, ", ".join(notes)] if notes else [line]))
    return lines
