"""One evaluation: a model, some tasks, some ways of scoring, a folder of results."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from megatron_med.evaluate.contamination import find_training_files
from megatron_med.evaluate.fewshot import draw
from megatron_med.evaluate.language_model import MegatronMedLM
from megatron_med.evaluate.options import Options
from megatron_med.evaluate.paper import Paper, read_paper
from megatron_med.evaluate.reorder import reordered
from megatron_med.evaluate.results import Key
from megatron_med.evaluate.runner import Asking, ask, rolling, summarise
from megatron_med.evaluate.sheet import Sheet
from megatron_med.evaluate.ways import WITHOUT_ORDER, Way, make_way
from megatron_med.inference.request import no_language_model
from megatron_med.parallel.collectives import on_first_rank


def evaluate(options: Options) -> None:
    """Asks all questions of all tasks that do not stand in the results yet, on every rank; rank 0 writes and prints.

    Raises:
        UserError: see ``Options``, ``read_paper``, ``ResultsFolder`` and ``load_model``.
    """
    papers = [read_paper(given, options) for given in options.tasks]
    names = ("checkpoint", "tensor", "pipeline", "precision", "base", "quantize", "max_length", "seed")
    model = MegatronMedLM(**{name: getattr(options, name) for name in names}, slots=options.batch_size)
    sheet = Sheet()
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


def _ask(model: MegatronMedLM, paper: Paper, options: Options, done: set[Key], sheet: Sheet) -> set[Key]:
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
