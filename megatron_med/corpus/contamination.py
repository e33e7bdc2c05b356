"""Decontamination: the n-grams of benchmark questions, for datatrove's n-gram filter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text

from megatron_med.corpus.records import read_records
from megatron_med.corpus.recipe import Questions
from megatron_med.errors import DataError

BOILERPLATE = 3
"""An n-gram that this many questions of a benchmark share is phrasing ("which of the following is the most ...")."""


def read_questions(questions: Questions) -> Iterator[list[str]]:
    """The texts of every question of a benchmark.

    Raises:
        DataError: a question has none of the fields; names the place.
    """
    path = Path(questions.path)
    for place, record in _records(path):
        found = [text for name in questions.fields for text in _texts(record.get(name))]
        if not found:
            raise DataError(f"{place}: none of the fields {', '.join(questions.fields)} holds text.")
        yield found


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix != ".json":
        yield from read_records(path)
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}. Give an intact file.") from error
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, record in items:
        if not isinstance(record, dict):
            raise DataError(f"{path}, record {key}: not an object.")
        yield f"{path}, record {key}", record


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def write_index(name: str, questions: Questions, config: NGramsDecontConfig, folder: Path) -> tuple[int, int]:
    """Writes the hashes that datatrove's filter reads; returns the number of questions and of those too short."""
    hash_of = create_hash_func(config.hash_config)
    counts: Counter[int] = Counter()
    total = short = 0
    for texts in read_questions(questions):
        total += 1
        hashes: set[int] = set()
        for text in texts:
            words = simplify_text(text, config.norm_config).split()
            hashes.update(hash_of(" ".join(gram)) for gram in ngrams(words, config.n_grams))
        short += not hashes
        counts.update(hashes)
    kept = sorted(value for value, count in counts.items() if count < BOILERPLATE)
    folder.mkdir(parents=True, exist_ok=True)
    np.array(kept, dtype=config.hash_config.np_descr).tofile(folder / f"{name}.index.hashes")
    return total, short
