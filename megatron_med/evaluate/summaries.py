"""Texts with their summaries, and how near a model's summaries come to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_med.errors import DataError
from megatron_med.evaluate.records import Record, read_records
from megatron_med.evaluate.results import Key, Sample, key_of
from megatron_med.evaluate.statistics import interval
from megatron_med.inference.sampling import Sampling

SAMPLING = Sampling(no_repeat_ngram_size=6, beams=5, length_penalty=-0.5)
"""BioMedLM's: 5 beams, no 6 tokens in a row twice, length penalty -0.5 (its finetune/README.md)."""
TOKENS = 400
"""Of a summary at most, as BioMedLM has it."""
ROUGE = ("rouge1", "rouge2", "rougeL")

_SOURCES = ("dialogue", "CHQ", "source", "text", "question", "document")
_TARGETS = ("section_text", "Summary", "summary", "target")


@dataclass(frozen=True)
class Summary:
    """A text and its summary.

    Attributes:
        id: unlike any other of its file.
        source: what is summed up.
        target: a person's summary.
    """

    id: str
    source: str
    target: str

    def fields(self) -> dict[str, Any]:
        """What lm-eval's prompts are made of."""
        return {"id": self.id, "source": self.source, "summary": self.target}


def read_summaries(path: Path) -> list[Summary]:
    """The texts of a file: lines of SPLIT.source with SPLIT.target beside it, or records (CSV, JSON) with a source
    (dialogue, CHQ, source, text) and a summary (section_text, Summary, summary, target).

    Raises:
        DataError: the file cannot be read, or a record lacks one of both; names the place.
    """
    if path.suffix == ".source":
        return _beside(path)
    found = [_summary(record, number) for number, record in enumerate(read_records(path))]
    names = [summary.id for summary in found]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise DataError(f"{path}: two records have the id {twice}. Make them different.")
    return found


def _summary(record: Record, number: int) -> Summary:
    named = record.fields.get("id") or record.fields.get("ID") or record.key or number
    return Summary(str(named), record.text(*_SOURCES).strip(), record.text(*_TARGETS).strip())


def _beside(path: Path) -> list[Summary]:
    target = path.with_suffix(".target")
    if not path.is_file() or not target.is_file():
        missing = target if path.is_file() else path
        raise DataError(f"There is no file {missing}: texts and summaries stand line by line in two files.")
    texts, summaries = (file.read_text(encoding="utf-8").rstrip("\n").split("\n") for file in (path, target))
    if len(texts) != len(summaries):
        raise DataError(f"{path} has {len(texts)} lines and {target} {len(summaries)}: they do not belong together.")
    pairs = enumerate(zip(texts, summaries, strict=True))
    return [Summary(f"{path.stem}-{number}", text.strip(), summary.strip()) for number, (text, summary) in pairs]


def rouge(written: str, target: str) -> dict[str, float]:
    """F-measures of ROUGE-1, -2 and -L with stemming (Lin 2004), by Google's library."""
    from rouge_score.rouge_scorer import RougeScorer  # brings NLTK: a second at every start

    scores = RougeScorer(list(ROUGE), use_stemmer=True).score(target, written)
    return {name: float(scores[name].fmeasure) for name in ROUGE}


def rouge_table(samples: Iterable[Sample], wanted: set[Key]) -> dict[str, dict[str, Any]]:
    """Mean of each measure with a bootstrap interval over the texts; what was too long counts as 0.

    Args:
        samples: of one task.
        wanted: keys that belong to this run.
    """
    mine = [sample for sample in samples if key_of(sample) in wanted]
    too_long = sum(bool(sample.get("too_long")) for sample in mine)
    table = {}
    for name in ROUGE:
        values = [sample["rouge"][name] for sample in mine]
        counts = {"count": len(mine), "unparsed": 0} | ({"too_long": too_long} if too_long else {})
        table[name] = {"value": float(np.mean(values)), "interval": interval(values), **counts}
    return table


def with_scores(summary: Summary, prompt: str, output: str | None) -> Sample:
    """A sample; None where the text was too long to be read."""
    scores = rouge(output, summary.target) if output is not None else dict.fromkeys(ROUGE, 0.0)
    outputs: Sequence[str] = [] if output is None else [output]
    told = {"too_long": True} if output is None else {}
    return {"prompt": prompt, "outputs": outputs, "reference": summary.target, "rouge": scores, **told}
