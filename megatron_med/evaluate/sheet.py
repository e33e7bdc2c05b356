"""The results of an evaluation while it runs: taken, added to, summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_med.evaluate.analysis import analyse
from megatron_med.evaluate.catalogue import Task
from megatron_med.evaluate.contamination import TrainingFiles, hash_of, search
from megatron_med.evaluate.language_model import MegatronMedLM
from megatron_med.evaluate.options import Options
from megatron_med.evaluate.paper import Paper
from megatron_med.evaluate.questions import Question
from megatron_med.evaluate.report import write_report
from megatron_med.evaluate.results import Key, ResultsFolder, Sample, accuracies, describe, key_of, perplexity
from megatron_med.evaluate.summaries import rouge_table
from megatron_med.files import sha256


def with_other_seeds(samples: Mapping[Key, Sample], wanted: set[Key]) -> set[Key]:
    """The keys of a run, and those of other seeds of the same ways that stand for all of its questions."""
    questions: dict[str, set[str]] = {}
    for name, way, _ in wanted:
        questions.setdefault(way, set()).add(name)
    stood: dict[tuple[str, int], set[str]] = {}
    for name, way, seed in samples:
        if name in questions.get(way, ()):
            stood.setdefault((way, seed), set()).add(name)
    whole = [(way, seed) for (way, seed), names in stood.items() if names == questions[way]]
    return wanted | {(name, way, seed) for way, seed in whole for name in questions[way]}


class Sheet:
    """The results folder on rank 0; on the others nothing is written."""

    def __init__(self) -> None:
        self._folder: ResultsFolder | None = None
        self._task = ""
        self._wanted: dict[str, set[Key]] = {}
        self._found: dict[str, Any] = {}
        self._samples: dict[Key, Sample] = {}

    def look_up(self, training: TrainingFiles, questions: Mapping[str, Sequence[Question]]) -> None:
        """Searches training files for the questions."""
        self._found = {task: one.described(training) for task, one in search(training, questions).items()}

    def open(self, options: Options, model: MegatronMedLM, papers: Sequence[Paper]) -> None:
        """Takes the folder, on rank 0."""
        self._folder = ResultsFolder(options.output, _identity(options, model, papers), options.overwrite)

    def begin(self, task: Task) -> set[Key]:
        """Reads what stands of a task, on rank 0."""
        assert self._folder is not None, "only rank 0 has the folder"
        self._task, self._samples = task.name, self._folder.read(task.name)
        return set(self._samples)

    def keep(self, samples: Sequence[Sample]) -> None:
        """Writes the samples of a block."""
        if self._folder is not None:
            self._folder.add(self._task, samples)
            self._samples.update({key_of(sample): sample for sample in samples})

    def finish(self, paper: Paper, wanted: set[Key]) -> None:
        """Writes and prints the table of a task."""
        if self._folder is None:
            return
        task = paper.task
        wanted = self._wanted[task.name] = with_other_seeds(self._samples, wanted)
        make = perplexity if task.is_perplexity else rouge_table if task.is_summary else accuracies
        table = make(self._samples.values(), wanted)
        gold = dict(sorted(Counter(map(task.gold, paper.questions)).items()))
        self._folder.write(task.name, table, gold)
        print("\n".join(describe(task.name, table, gold)), flush=True)
        if paper.left_out:
            print(f"  {paper.left_out} questions of the file of examples are asked, too, and were left out there")

    def close(self) -> None:
        """Writes what can be said of all answers, and lets go of the folder."""
        if self._folder is None:
            return
        folder = self._folder
        folder.note("contamination", self._found)
        for task, wanted in self._wanted.items():
            known = folder.known("contamination").get(task)
            if known and known.get("asked") != hash_of(name for name, _, _ in wanted):
                known = None  # other questions were looked up
                folder.forget("clean", task)
            samples = [sample for key, sample in folder.read(task).items() if key in wanted]
            told = analyse(samples, known["found"] if known else None)
            folder.note("analysis", {task: folder.known("analysis").get(task, {}) | told})
        folder.close()
        print(f"report: {write_report(folder.path)}", flush=True)


def _identity(options: Options, model: MegatronMedLM, papers: Sequence[Paper]) -> dict[str, Any]:
    """What a sample depends on."""
    names = ["precision", "quantize", "truncate", "shots", "seed"]
    names += ["samples"] if "self_consistency" in options.score else []
    return {
        "checkpoint": str(model.loaded.source.resolve()),
        "weights": model.loaded.fingerprint(),
        **{name: getattr(options, name) for name in names},
        "max_length": model.max_length,
        "base": options.base,
        "files": {paper.task.name: [sha256(file) for file in paper.files] for paper in papers},
    }
