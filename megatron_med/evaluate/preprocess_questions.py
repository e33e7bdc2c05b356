"""Turns question sets into token files with the labels beside them, for heads that score sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_med.config.schema import CLASSIFICATION, MOST_CLASSES
from megatron_med.data.head_form import HeadForm
from megatron_med.data.indexed import smallest_dtype
from megatron_med.data.indexed_writer import ColumnsWriter
from megatron_med.data.labelled import labels_prefix
from megatron_med.data.sources import refuse_token_files, write_side_file
from megatron_med.errors import ConfigError
from megatron_med.evaluate.catalogue import load_task, read_questions
from megatron_med.evaluate.heads import HeadEncoder, labels_of
from megatron_med.evaluate.questions import Question
from megatron_med.files import sha256
from megatron_med.outputs import refuse_existing
from megatron_med.tokenizer import load_tokenizer


@dataclass(frozen=True)
class QuestionOptions:
    """What ``megatron-med preprocess-questions`` is asked for.

    Attributes:
        task: of ``megatron-med evaluate --list``.
        split: ``train`` or ``test``, where a file holds both.
        input: the file.
        output_prefix: of ``.bin``, ``.idx``, ``.json`` and ``.labels.bin``, ``.labels.idx``.
        tokenizer: as ``load_tokenizer`` takes it.
        head: ``classification`` or ``multiple_choice``.
        labels: of a classification; empty: the options of the file.
        separator: token behind both parts; empty: none.
        max_length: tokens of a sequence.
        overwrite: replace existing files.
    """

    task: str
    split: str
    input: Path
    output_prefix: Path
    tokenizer: str
    head: str
    labels: tuple[str, ...] = ()
    separator: str = ""
    max_length: int = 512
    overwrite: bool = False


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        questions, sequences, tokens: how many.
        longest: tokens of the longest question, all of its sequences together.
        cut: sequences that were longer than ``max_length``.
        form: how they were made.
    """

    questions: int
    sequences: int
    tokens: int
    longest: int
    cut: int
    form: HeadForm


def preprocess_questions(options: QuestionOptions) -> Written:
    """Writes every question in order.

    Raises:
        DataError: the file cannot be used, or a question has a label that the head does not have.
        TargetExistsError: the output exists.
    """
    task = load_task(options.task)
    if task.is_perplexity or task.is_summary:
        raise ConfigError(
            f"{options.task} holds texts without labels, which no head learns from. Summaries are tuned as "
            "conversations: megatron-med preprocess-instructions --template biomedlm_summary."
        )
    if options.max_length < 1:
        raise ConfigError(f"--max-length is {options.max_length}: it must be at least 1.")
    questions = read_questions(task, options.split, options.input)
    is_classes = options.head == CLASSIFICATION
    if len(set(options.labels)) < len(options.labels):
        raise ConfigError(f"--labels holds a label twice ({', '.join(options.labels)}): name each once.")
    labels = (options.labels or labels_of(questions)) if is_classes else ()
    if is_classes and not 2 <= len(labels) <= MOST_CLASSES:
        raise ConfigError(
            f"{options.input} has {len(labels)} different options, a classification has 2 to {MOST_CLASSES} labels: "
            "name them with --labels, or pass --head multiple_choice."
        )
    form = HeadForm(options.head, labels, options.separator, options.max_length)
    tokenizer = load_tokenizer(options.tokenizer)
    prefix = options.output_prefix
    refuse_token_files(prefix, options.overwrite, [options.input, *tokenizer.files])
    for suffix in (".bin", ".idx"):
        refuse_existing(labels_prefix(prefix).with_name(labels_prefix(prefix).name + suffix), options.overwrite)
    encoder = HeadEncoder(form, tokenizer)
    documents = [_document(question, encoder, form) for question in questions]
    dtype = smallest_dtype(tokenizer.vocab_size)
    ingredients = {"questions": sha256(options.input), "form": form.described(), "tokenizer": tokenizer.describe()}
    with ColumnsWriter([(prefix, dtype), (labels_prefix(prefix), np.uint8)], ingredients) as writer:
        sizes = np.array([len(ids) for ids, _ in documents], np.int32)
        columns = [np.concatenate(parts) for parts in zip(*documents, strict=True)]
        writer.add_documents([columns[0].astype(dtype).tobytes(), columns[1].tobytes()], sizes)
    sequences, tokens = int((columns[1] > 0).sum()), int(sizes.sum())
    counts = {"documents": len(documents), "sequences": sequences, "tokens": tokens}
    write_side_file(prefix, tokenizer, {**counts, "head": form.described()})
    return Written(len(documents), sequences, tokens, int(sizes.max()), encoder.cut, form)


def _document(
    question: Question, encoder: HeadEncoder, form: HeadForm
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Ids of all sequences of a question, and their labels at the ends."""
    sequences = encoder.sequences(question)
    if form.kind == CLASSIFICATION:
        ends = [1 + form.class_of(question.options[question.answer], f"question {question.id}")]
    else:
        ends = [2 if letter == question.answer else 1 for letter in question.letters]
    labels = np.zeros(sum(map(len, sequences)), np.uint8)
    labels[np.cumsum([len(ids) for ids in sequences]) - 1] = ends
    return np.concatenate([np.array(ids, np.int64) for ids in sequences]), labels
