"""Samples of texts to classify and of questions to choose in: whole ones side by side, each with its labels.

A document is a text, or all options of a question one after the other. ``PREFIX.labels`` tells, a byte a token, where
a sequence ends and what it is: 0 within a sequence, 1 + class at the end of a text, 1 at the end of an option, 2 at
that of the right one. The order is that of conversations (``instruct.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_med.config.schema import MULTIPLE_CHOICE, DataConfig, DataSource
from megatron_med.data.instruct import ConversationSet, ConversationStream, Numbers, open_beside
from megatron_med.data.sample import Sample, pieces
from megatron_med.errors import DataError
from megatron_med.words import counted

_WRONG, _RIGHT = 1, 2


def labels_prefix(prefix: str | Path) -> Path:
    """Prefix of the file that says where sequences end, and what they are."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".labels")


def open_labelled(prefix: str | Path, data: DataConfig, cache: Path) -> ConversationSet:
    """Opens a corpus and settles what is too long for a sample.

    Raises:
        DataError: files that do not belong together, or a document that is too long.
    """
    found = open_beside(prefix, labels_prefix(prefix), cache)
    lengths = found.lengths
    long = np.flatnonzero(lengths > data.sequence_length)
    if len(long) and data.truncate != "drop":
        raise DataError(
            f"{prefix}: {len(long):,} of {len(lengths):,} documents do not fit into data.sequence_length = "
            f"{data.sequence_length}; the longest has {int(lengths.max()):,} tokens. Raise it, set data.truncate to "
            "drop, or make the files with a smaller --max-length."
        )
    if len(long):
        found.told.append(f"{prefix}: left out, too long: {counted(len(long), 'document')}")
    keep = np.setdiff1d(np.arange(len(lengths)), long)
    if not len(keep):
        raise DataError(f"{prefix} has no document of at most data.sequence_length tokens. Raise it.")
    found.numbers, found.lengths = keep, lengths[keep]
    return found


class LabelledStream(ConversationStream):
    """Samples of some corpora, epoch after epoch.

    Args:
        kind: ``classification`` or ``multiple_choice``.
        longest: tokens of a sequence at most; what fills a sample up is cut, too.
    """

    version = "labelled, version 1"

    def __init__(
        self,
        sets: Sequence[ConversationSet],
        sources: Sequence[DataSource],
        data: DataConfig,
        seed: int,
        cache: Path,
        kind: str,
        longest: int,
    ) -> None:
        super().__init__(sets, sources, data, seed, cache)
        self._kind = kind
        self._longest = longest

    @property
    def room(self) -> int:
        return self._data.sequence_length

    def sample(self, index: int) -> Sample:
        """Sample ``index``, counted on over all epochs."""
        documents = [(self._sets[which], number) for which, number in self.parts(index)]
        pairs = [(found.data.read(number), found.roles.read(number)) for found, number in documents]
        length = self._data.sequence_length
        tokens = np.zeros(length + 1, np.int64)
        labels, mask = np.zeros(length, np.int64), np.zeros(length, np.float32)
        lengths: list[int] = []
        begin = 0
        for question, (ids, ends) in enumerate(pairs):
            end = begin + len(ids)
            tokens[begin:end] = ids
            labels[begin:end], mask[begin:end] = self._labels(ends.astype(np.int64), question)
            lengths += np.diff(np.flatnonzero(ends), prepend=-1).tolist()
            begin = end
        lengths += pieces(length - begin, self._longest)
        return Sample(tokens, mask, tuple(lengths), labels)

    def _labels(self, ends: Numbers, question: int) -> tuple[Numbers, Numbers]:
        """Labels as ``model/score.py`` wants them, and where the loss is counted: once a text or question."""
        if self._kind == MULTIPLE_CHOICE:
            return np.where(ends > 0, 2 * question + ends, 0), (ends == _RIGHT).astype(np.int64)
        return ends, (ends > 0).astype(np.int64)
