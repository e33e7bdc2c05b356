"""Scores a checkpoint or a Hugging Face folder on medical question sets from local files.

    python tools/evaluate.py --checkpoint RUN --tasks medqa_4options pubmedqa --data DIR --output results
    torchrun --nproc-per-node 8 tools/evaluate.py --tensor 2 --pipeline 2 --checkpoint RUN --score letter option cot ...
    python tools/evaluate.py --list

The same command goes on after a kill; a folder takes further tasks, ways and seeds of the same model. lm-eval's own
command line is python -m megatron_med.evaluate.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_med.errors import ConfigError, UserError, run_command
from megatron_med.evaluate.catalogue import TEST, TRAIN, Task, find_file, load_task, read_questions, task_names
from megatron_med.evaluate.fewshot import apart_from, draw
from megatron_med.evaluate.questions import Question
from megatron_med.evaluate.readers import texts_of
from megatron_med.evaluate.results import Key, ResultsFolder, Sample, accuracies, key_of, perplexity
from megatron_med.evaluate.ways import NAMES, WITHOUT_SHOTS, make_way
from megatron_med.files import sha256
from megatron_med.launch.environment import read_ranks

MEDITRON_SEEDS = (1234, 432, 32)


@dataclass(frozen=True)
class Paper:
    """A task with what is asked.

    Attributes:
        questions: empty for perplexity.
        texts: id and text of each document, for perplexity.
        training: what examples are drawn from.
        files: of the test and, where examples are drawn, of the training split.
    """

    task: Task
    questions: Sequence[Question]
    texts: Sequence[tuple[str, str]]
    training: Sequence[Question]
    files: Sequence[Path]


def main() -> None:
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != here]  # lm-eval imports a library of this file's name
    arguments = _parser().parse_args()
    if arguments.list:
        for name in task_names():
            print(f"{name}: {load_task(name).source}")
        return
    _check(arguments)
    papers = [_paper(given, arguments) for given in arguments.tasks]
    try:
        _evaluate(arguments, papers)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say which tasks there are, and where to get their files")
    parser.add_argument("--checkpoint", help="RUN, RUN/checkpoints, one step, or a Hugging Face folder")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK[=FILE]", help="see --list")
    parser.add_argument("--data", type=Path, help="folder with the files of the tasks")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--overwrite", action="store_true", help="begin the results anew")
    parser.add_argument("--score", nargs="+", choices=NAMES, default=["letter"], help="ways of scoring")
    parser.add_argument("--shots", type=int, default=0, help="examples in front of each question")
    parser.add_argument("--shots-from", type=Path, help="file that examples are drawn from; default: found in --data")
    parser.add_argument("--seeds", type=int, nargs="+", default=MEDITRON_SEEDS, help="of the examples; one run each")
    parser.add_argument("--samples", type=int, default=5, help="chains of thought of self_consistency")
    parser.add_argument("--limit", type=int, help="only the first questions of each task")
    parser.add_argument("--truncate", choices=("left",), help="cut prompts that are too long; else they count as wrong")
    parser.add_argument("--seed", type=int, default=0, help="of sampled answers")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences that are written at the same time")
    parser.add_argument("--max-length", type=int, help="tokens that the model reads at most; default: its positions")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages; further ranks share the questions")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--base", help="of adapters, where it is no longer where they were trained")
    parser.add_argument("--quantize", choices=("none", "int8", "nf4"), help="hold the matrices in 8 or 4 bit")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    needed = ("checkpoint", "tasks", "output")
    faults = [f"--{name} is missing: it is needed." for name in needed if not getattr(arguments, name)]
    if arguments.data is None and any("=" not in task for task in arguments.tasks):
        faults.append("--data is missing: name the folder with the files, or every file as --tasks TASK=FILE.")
    for name in ("samples", "limit", "batch_size", "max_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            faults.append(f"--{name.replace('_', '-')} is {value}: it must be at least 1.")
    if arguments.shots < 0:
        faults.append(f"--shots is {arguments.shots}: it must be at least 0.")
    without = [way for way in arguments.score if way in WITHOUT_SHOTS]
    if arguments.shots and without:
        faults.append(f"--score {without[0]} is asked without examples: leave out --shots.")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        faults.append("--seeds holds a seed twice: each is one run.")
    if faults:
        raise ConfigError(faults)


def _paper(given: str, arguments: argparse.Namespace) -> Paper:
    name, _, file = given.partition("=")
    task = load_task(name)
    path = Path(file) if file else find_file(task, TEST, arguments.data)
    if task.is_perplexity:
        return Paper(task, [], texts_of(path)[: arguments.limit], [], [path])
    questions = read_questions(task, TEST, path)
    if not arguments.shots:
        return Paper(task, questions[: arguments.limit], [], [], [path])
    if task.shots_from is None:
        raise ConfigError(f"{name} has no training split to draw examples from: leave out --shots.")
    source = arguments.shots_from or find_file(task, TRAIN, arguments.data or path.parent)
    training = apart_from(read_questions(task, task.shots_from, source), questions, source, arguments.shots)
    return Paper(task, questions[: arguments.limit], [], training, [path, source])


def _evaluate(arguments: argparse.Namespace, papers: Sequence[Paper]) -> None:
    try:
        from megatron_med.evaluate.language_model import MegatronMedLM
    except ImportError as error:
        raise ConfigError(f"lm-eval is not installed ({error}): pip install 'megatron_med[evaluate]'.") from error
    from megatron_med.evaluate.runner import Asking, ask, rolling
    from megatron_med.parallel.collectives import broadcast_object

    read_ranks()
    names = ("checkpoint", "tensor", "pipeline", "precision", "base", "quantize", "batch_size", "max_length", "seed")
    model = MegatronMedLM(**{name: getattr(arguments, name) for name in names})
    world = model.context.world
    identity = _identity(arguments, model, papers)
    folder, fault = None, None
    if world.is_first:
        try:
            folder = ResultsFolder(arguments.output, identity, arguments.overwrite)
        except (UserError, OSError) as error:
            fault = error
    fault = broadcast_object(fault, world)
    if fault is not None:
        raise fault
    asking = Asking(arguments.truncate is not None, arguments.seed)
    tables, gold = {}, {}
    for paper in papers:
        task = paper.task
        samples = folder.read(task.name) if folder is not None else {}
        done: set[Key] = broadcast_object(set(samples), world)
        keep = _Keeper(folder, task.name, samples)
        if task.is_perplexity:
            rolling(model, paper.texts, done, keep)
            wanted = {(name, "perplexity", 0) for name, _ in paper.texts}
        else:
            wanted = set()
            for seed in arguments.seeds if arguments.shots else [0]:
                shots = draw(paper.training, arguments.shots, seed) if arguments.shots else []
                for name in dict.fromkeys(arguments.score):
                    way = make_way(name, arguments.samples)
                    ask(model, task, paper.questions, way, shots, seed, done, asking, keep)
                    wanted |= {(question.id, name, seed) for question in paper.questions}
        if folder is not None:
            table = perplexity if task.is_perplexity else accuracies
            tables[task.name] = table(samples.values(), wanted)
            gold[task.name] = dict(sorted(Counter(map(task.gold, paper.questions)).items()))
            folder.write(task.name, tables[task.name], gold[task.name])
    if folder is not None:
        _print(tables, gold)
        folder.close()


class _Keeper:
    """Writes samples, and remembers them for the table. Nothing on ranks that have no folder."""

    def __init__(self, folder: ResultsFolder | None, task: str, samples: dict[Key, Sample]) -> None:
        self._folder = folder
        self._task = task
        self._samples = samples

    def __call__(self, samples: Sequence[Sample]) -> None:
        if self._folder is None:
            return
        self._folder.add(self._task, samples)
        self._samples.update({key_of(sample): sample for sample in samples})


def _identity(arguments: argparse.Namespace, model: Any, papers: Sequence[Paper]) -> dict[str, Any]:
    """What a sample depends on."""
    names = ("precision", "quantize", "truncate", "shots", "samples", "seed")
    return {
        "checkpoint": str(model.loaded.source.resolve()),
        "weights": model.loaded.fingerprint(),
        **{name: getattr(arguments, name) for name in names},
        "max_length": model.max_length,
        "files": {paper.task.name: [sha256(file) for file in paper.files] for paper in papers},
    }


def _print(tables: dict[str, Any], gold: dict[str, Any]) -> None:
    for task, table in tables.items():
        counts = ", ".join(f"{letter} {count}" for letter, count in gold[task].items())
        print(f"{task}{f' (gold answers: {counts})' if counts else ''}")
        for metric, found in table.items():
            low, high = found["interval"]
            rest = ", ".join(
                f"{name} {found[name]:.4g}" for name in ("unparsed", "too_long", "ties", "spread") if found.get(name)
            )
            print(
                f"  {metric:<28} {found['value']:8.4f}  [{low:.4f}, {high:.4f}]  of {found['count']}"
                f"{f'; {rest}' if rest else ''}"
            )
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
