"""One evaluation: a model, some tasks, some ways of scoring, a folder of results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_med.errors import ConfigError
from megatron_med.evaluate.analysis import analyse
from megatron_med.evaluate.catalogue import TEST, TRAIN, Task, files_beside, find_file, load_task, read_questions
from megatron_med.evaluate.contamination import TrainingFiles, find_training_files, hash_of, search
from megatron_med.evaluate.fewshot import apart_from, draw
from megatron_med.evaluate.language_model import MegatronMedLM
from megatron_med.evaluate.questions import Question
from megatron_med.evaluate.readers import texts_of
from megatron_med.evaluate.reorder import reordered
from megatron_med.evaluate.report import write_report
from megatron_med.evaluate.results import Key, ResultsFolder, Sample, accuracies, describe, key_of, perplexity
from megatron_med.evaluate.runner import Asking, ask, rolling, summarise
from megatron_med.evaluate.summaries import Summary, read_summaries, rouge_table
from megatron_med.evaluate.ways import WITHOUT_ORDER, WITHOUT_SHOTS, Way, make_way
from megatron_med.files import sha256
from megatron_med.inference.request import no_language_model
from megatron_med.parallel.collectives import on_first_rank


@dataclass(frozen=True)
class Options:
    """What is asked, and how; the names are those of ``tools/evaluate.py``'s options."""

    checkpoint: str
    tasks: Sequence[str]
    output: Path
    data: Path | None = None
    overwrite: bool = False
    score: Sequence[str] = ("letter",)
    shots: int = 0
    shots_from: Path | None = None
    seeds: Sequence[int] = (1234, 432, 32)
    samples: int = 5
    limit: int | None = None
    truncate: str | None = None
    orders: int = 1
    contamination: Path | None = None
    seed: int = 0
    batch_size: int = 16
    max_length: int | None = None
    tensor: int = 1
    pipeline: int = 1
    precision: str = "fp32"
    base: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        needed = ("checkpoint", "tasks", "output")
        faults = [f"--{name} is missing: it is needed." for name in needed if not vars(self)[name]]
        if self.data is None and any("=" not in task for task in self.tasks):
            faults.append("--data is missing: name the folder with the files, or every file as --tasks TASK=FILE.")
        for name in ("samples", "limit", "batch_size", "max_length", "orders"):
            value = vars(self)[name]
            if value is not None and value < 1:
                faults.append(f"--{name.replace('_', '-')} is {value}: it must be at least 1.")
        names = [task.partition("=")[0] for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            faults.append(f"--tasks names {twice} twice: each has one file in a folder of results.")
        faults += [f"--tasks is {task}: a file is missing behind '='." for task in self.tasks if task.endswith("=")]
        faults += [f"--seeds holds {seed}: it must be at least 0." for seed in self.seeds if seed < 0]
        for name in ("tensor", "pipeline"):
            if vars(self)[name] < 1:
                faults.append(f"--{name} is {vars(self)[name]}: it must be at least 1.")
        if self.shots < 0:
            faults.append(f"--shots is {self.shots}: it must be at least 0.")
        without = [way for way in self.score if way in WITHOUT_SHOTS]
        if self.shots and without:
            faults.append(f"--score {without[0]} is asked without examples: leave out --shots.")
        if len(set(self.seeds)) < len(self.seeds):
            faults.append("--seeds holds a seed twice: each is one run.")
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True)
class Paper:
    """A task with what is asked.

    Attributes:
        questions: empty for perplexity.
        texts: id and text of each document, for perplexity.
        summaries: texts to sum up.
        left_out: questions of the training split that are asked, too, and no examples.
        training: what examples are drawn from.
        files: of the test and, where examples are drawn, of the training split.
    """

    task: Task
    questions: Sequence[Question]
    texts: Sequence[tuple[str, str]]
    training: Sequence[Question]
    files: Sequence[Path]
    summaries: Sequence[Summary] = ()
    left_out: int = 0


def read_paper(given: str, options: Options) -> Paper:
    """Reads ``TASK`` or ``TASK=FILE``.

    Raises:
        UserError: there is no such task or file, or what it holds cannot be asked.
    """
    name, _, file = given.partition("=")
    task = load_task(name)
    path = Path(file) if file else find_file(task, TEST, options.data or Path())
    if task.is_perplexity:
        return Paper(task, [], texts_of(path)[: options.limit], [], [path])
    if task.is_summary:
        return Paper(task, [], [], [], [path, *files_beside(task, path)], read_summaries(path)[: options.limit])
    questions = read_questions(task, TEST, path)
    if not options.shots:
        return Paper(task, questions[: options.limit], [], [], [path, *files_beside(task, path)])
    if task.shots_from is None:
        raise ConfigError(f"{name} has no training split to draw examples from: leave out --shots.")
    source = options.shots_from or find_file(task, TRAIN, options.data or path.parent)
    whole = read_questions(task, task.shots_from, source)
    training = apart_from(whole, questions, source, options.shots)
    files = [path, source, *files_beside(task, path)]
    return Paper(task, questions[: options.limit], [], training, files, left_out=len(whole) - len(training))


def evaluate(options: Options) -> None:
    """Asks all questions of all tasks that do not stand in the results yet, on every rank; rank 0 writes and prints.

    Raises:
        UserError: see ``Options``, ``read_paper``, ``ResultsFolder`` and ``load_model``.
    """
    papers = [read_paper(given, options) for given in options.tasks]
    names = ("checkpoint", "tensor", "pipeline", "precision", "base", "quantize", "batch_size", "max_length", "seed")
    model = MegatronMedLM(**{name: getattr(options, name) for name in names})
    sheet = _Sheet()
    _check_ways(options, model)
    if options.contamination is not None:
        training = find_training_files(options.contamination, model.loaded.tokenizer)
        questions = {paper.task.name: paper.questions for paper in papers if paper.questions}
        on_first_rank(model.context, lambda: sheet.look_up(training, questions))
    on_first_rank(model.context, lambda: sheet.open(options, model, papers))
    for paper in papers:
        done = on_first_rank(model.context, partial(sheet.begin, paper.task))
        wanted = _ask(model, paper, options, done, sheet)
        sheet.finish(paper, wanted)
    sheet.close()


def _check_ways(options: Options, model: MegatronMedLM) -> None:
    """Refuses ways that the model does not have, before a folder is touched."""
    if "head" in options.score:
        model.head_encoder()
    head = model.loaded.head
    if head is not None and set(options.score) != {"head"}:
        raise no_language_model(head.kind)


def _ask(model: MegatronMedLM, paper: Paper, options: Options, done: set[Key], sheet: _Sheet) -> set[Key]:
    """Asks one paper in all ways; the keys of what belongs to this run."""
    task = paper.task
    if task.is_perplexity:
        rolling(model, paper.texts, done, sheet.keep)
        return {(name, "perplexity", 0) for name, _ in paper.texts}
    asking = Asking(options.truncate is not None, options.seed)
    if task.is_summary:
        summarise(model, paper.summaries, done, asking, sheet.keep)
        return {(summary.id, "summary", 0) for summary in paper.summaries}
    wanted: set[Key] = set()
    for seed in options.seeds if options.shots else [0]:
        shots = draw(paper.training, options.shots, seed) if options.shots else []
        for way in _ways(paper, options):
            ask(model, task, paper.questions, way, shots, seed, done, asking, sheet.keep)
            wanted |= {(question.id, way.name, seed) for question in paper.questions}
    return wanted


def _ways(paper: Paper, options: Options) -> Iterator[Way]:
    """Each way, and the same with the options moved; not where the model is not shown an order."""
    task, most = paper.task, max(len(question.options) for question in paper.questions)
    for name in dict.fromkeys(options.score):
        way = make_way(name, options.samples)
        yield way
        if task.answers == "letters" and name not in WITHOUT_ORDER:
            yield from (reordered(way, by) for by in range(1, min(options.orders, most)))


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


class _Sheet:
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
