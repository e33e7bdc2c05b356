"""Samples of conversations: which ones come in an epoch, how they share samples, and which tokens count.

The order is a function of (files, options, sequence length, seed, epoch) and of nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_med.config.schema import DataConfig, DataSource
from megatron_med.data.cache import Arrays, cached_arrays, remembered
from megatron_med.data.gpt import epoch_generator, fingerprint
from megatron_med.data.index import build_blending_index
from megatron_med.data.indexed import IndexedDataset
from megatron_med.data.packing import best_fit
from megatron_med.data.sample import Sample
from megatron_med.data.sources import roles_prefix
from megatron_med.errors import DataError
from megatron_med.tokenizer.chat import ANSWER, SHARED
from megatron_med.words import counted

Numbers = npt.NDArray[np.int64]

_CACHED_EPOCHS = 2
_PAD = 0  # never read: its label does not count, and no document sees it


@dataclass
class ConversationSet:
    """The conversations of one corpus that can be trained.

    Attributes:
        numbers: of the conversations that are kept.
        lengths: tokens of each of them, after truncation.
        told: what was left out or cut, in words.
    """

    data: IndexedDataset
    roles: IndexedDataset
    fingerprint: str
    numbers: Numbers
    lengths: Numbers
    told: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.numbers)


def open_beside(prefix: str | Path, other: Path, cache: Path) -> ConversationSet:
    """Opens token files and the file that says, a byte a token, what each token is; all documents are kept.

    Raises:
        DataError: they do not belong together.
    """
    tokens, roles = IndexedDataset(prefix), IndexedDataset(other)
    if len(tokens) != len(roles) or not np.array_equal(tokens.sizes, roles.sizes):
        raise DataError(f"{roles.bin_path} does not belong to {tokens.bin_path}: write both again.")
    files = [tokens.idx_path, tokens.bin_path, roles.idx_path, roles.bin_path]
    facts = remembered(cache, files, lambda: {"fingerprint": f"{fingerprint(tokens)}+{fingerprint(roles)}"})
    lengths = tokens.sizes.astype(np.int64)
    return ConversationSet(tokens, roles, facts["fingerprint"], np.arange(len(lengths)), lengths)


def open_conversations(prefix: str | Path, data: DataConfig, cache: Path) -> ConversationSet:
    """Opens a corpus and settles what is too long for a sample.

    Raises:
        DataError: files that do not belong together, or a conversation that is too long.
    """
    found = open_beside(prefix, roles_prefix(prefix), cache)
    lengths = found.lengths
    long = np.flatnonzero(lengths > data.sequence_length + 1)
    if len(long):
        _settle_long(found, long, data)
    if not len(found):
        raise DataError(f"{prefix} has no conversation of at most data.sequence_length + 1 tokens. Raise it.")
    return found


def _settle_long(found: ConversationSet, long: Numbers, data: DataConfig) -> None:
    prefix, room = found.data.prefix, data.sequence_length + 1
    if data.truncate == "error":
        raise DataError(
            f"{prefix}: {len(long):,} of {len(found.lengths):,} conversations do not fit into data.sequence_length = "
            f"{data.sequence_length}; the first is conversation {int(long[0])} with {int(found.lengths[long[0]]):,} "
            "tokens, the longest has "
            f"{int(found.lengths.max()):,}. Raise it, or set data.truncate to drop, left or right."
        )
    lost = long
    if data.truncate != "drop":
        is_kept = np.array([trained_labels(_read(found, int(number), data)[1], data.loss).any() for number in long])
        lost = long[~is_kept]
        cut = sum(_is_answer_cut(found, int(number), data) for number in long[is_kept])
        found.told.append(
            f"{prefix}: cut on the {data.truncate} to {counted(room, 'token')}: "
            f"{counted(len(long) - len(lost), 'conversation')}, in {cut:,} of them a part of an answer"
        )
    if len(lost):
        why = "too long" if data.truncate == "drop" else "nothing that is trained would be kept"
        found.told.append(f"{prefix}: left out, {why}: {counted(len(lost), 'conversation')}")
    keep = np.setdiff1d(found.numbers, lost)
    found.numbers, found.lengths = keep, np.minimum(found.lengths[keep], room)


def _is_answer_cut(found: ConversationSet, number: int, data: DataConfig) -> bool:
    roles, room = found.roles.read(number), data.sequence_length + 1
    cut = roles[room:] if data.truncate == "right" else roles[:-room]
    return bool((cut == ANSWER).any())


def _read(
    found: ConversationSet, number: int, data: DataConfig
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Ids and roles of a conversation, cut where it is too long."""
    size, room = int(found.data.sizes[number]), data.sequence_length + 1
    start = size - room if data.truncate == "left" and size > room else 0
    length = min(size, room)
    return found.data.read(number, start, length), found.roles.read(number, start, length)


def trained_labels(roles: npt.NDArray[np.integer], loss: str) -> npt.NDArray[np.bool_]:
    """Which tokens of a conversation count as labels; the first one is nobody's."""
    trained = roles == ANSWER if loss == "answers" else roles != SHARED
    trained[:1] = False
    return trained


class ConversationStream:
    """Samples of some corpora, epoch after epoch.

    Args:
        sets: the corpora.
        sources: as they stand in the configuration.
        data: packing, loss and mixture.
        seed: of the order.
        cache: folder for the index arrays.
    """

    version = "conversations, version 1"

    def __init__(
        self, sets: Sequence[ConversationSet], sources: Sequence[DataSource], data: DataConfig, seed: int, cache: Path
    ) -> None:
        self._sets = list(sets)
        self._sources = list(sources)
        self._data = data
        self._seed = seed
        self._cache = cache
        self._epochs: dict[int, Arrays] = {}
        self._ends: list[int] = []  # samples up to the end of each epoch that was asked for so far

    @property
    def room(self) -> int:
        """Tokens of a sample: its last one is a label only."""
        return self._data.sequence_length + 1

    def samples_up_to(self, epochs: int) -> int:
        """Samples of that many epochs."""
        while len(self._ends) < epochs:
            count = len(self._order(len(self._ends))["starts"]) - 1
            self._ends.append((self._ends[-1] if self._ends else 0) + count)
        return self._ends[epochs - 1] if epochs else 0

    def sample(self, index: int) -> Sample:
        """Sample ``index``, counted on over all epochs."""
        parts = self.parts(index)
        return _sample([_read(self._sets[which], number, self._data) for which, number in parts], self._data)

    def source(self, index: int) -> Path:
        """Prefix of the files that the first conversation of a sample comes from."""
        return self._sets[self.parts(index)[0][0]].data.prefix

    def parts(self, index: int) -> list[tuple[int, int]]:
        """Corpus and number of each conversation in a sample."""
        epoch, place = self.locate(index)
        order = self._order(epoch)
        begin, end = order["starts"][place : place + 2].tolist()
        return list(zip(order["sets"][begin:end].tolist(), order["numbers"][begin:end].tolist(), strict=True))

    def locate(self, index: int) -> tuple[int, int]:
        """Epoch of a sample, and its place there."""
        epoch = int(np.searchsorted(self._ends, index, side="right"))
        while epoch == len(self._ends):
            self.samples_up_to(epoch + 1)
            epoch += int(self._ends[epoch] <= index)
        return epoch, index - (self._ends[epoch - 1] if epoch else 0)

    def _order(self, epoch: int) -> Arrays:
        if epoch not in self._epochs:
            while len(self._epochs) >= _CACHED_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
            ingredients = self._ingredients() | {"seed": self._seed, "epoch": epoch}
            self._epochs[epoch] = cached_arrays(self._cache, ingredients, lambda: self._build(epoch))
        return self._epochs[epoch]

    def _ingredients(self) -> dict[str, object]:
        data = self._data
        return {
            "kind": self.version,
            "data": [found.fingerprint for found in self._sets],
            "mixture": [[source.weight, source.repeat] for source in self._sources],
            "options": [data.sequence_length, data.packing, data.truncate, data.loss, data.samples_per_epoch],
        }

    def _build(self, epoch: int) -> Arrays:
        rng = epoch_generator(self._seed, epoch)
        sets, places = draw_epoch(
            [len(found) for found in self._sets], self._sources, self._data, rng, epoch, self._seed
        )
        lengths = np.empty(len(sets), np.int64)
        numbers = np.empty(len(sets), np.int64)
        for which, found in enumerate(self._sets):
            own = sets == which
            numbers[own], lengths[own] = found.numbers[places[own]], found.lengths[places[own]]
        if not self._data.packing:
            return {"sets": sets, "numbers": numbers, "starts": np.arange(len(sets) + 1)}
        items, starts = best_fit(lengths, self.room)
        order = rng.permutation(len(starts) - 1)
        sizes = np.diff(starts)[order]
        shuffled = np.concatenate([items[starts[number] : starts[number + 1]] for number in order])
        return {
            "sets": sets[shuffled],
            "numbers": numbers[shuffled],
            "starts": np.concatenate([[0], np.cumsum(sizes)]),
        }


def draw_epoch(
    counts: Sequence[int],
    sources: Sequence[DataSource],
    data: DataConfig,
    rng: np.random.RandomState,
    epoch: int,
    seed: int,
) -> tuple[Numbers, Numbers]:
    """Which conversations an epoch holds, in the order they are read without packing.

    By ``repeat``: each conversation that many times, of a fraction a random part. By ``weight``: as many as there are,
    each corpus with its share, in its own order that goes on over the epochs. With ``samples_per_epoch``: that many,
    drawn with replacement.

    Args:
        counts: conversations of each corpus.
        sources: weight and repeat of each.
        data: ``samples_per_epoch``.
        rng: of this epoch.
        epoch: from 0.
        seed: of the corpora's own orders.

    Returns:
        Corpus and place in it, of each conversation.
    """
    shares = shares_of(counts, sources)
    if data.samples_per_epoch is not None:
        sets = rng.choice(len(counts), size=data.samples_per_epoch, p=shares).astype(np.int64)
        places = (rng.random_sample(len(sets)) * np.array(counts)[sets]).astype(np.int64)
        return sets, places
    if any(source.repeat is not None for source in sources) or len(sources) == 1:
        drawn = [_repeated(count, source.repeat or 1.0, rng) for count, source in zip(counts, sources, strict=True)]
        sets = np.concatenate([np.full(len(places), which) for which, places in enumerate(drawn)])
        order = rng.permutation(len(sets))
        return sets[order].astype(np.int64), np.concatenate(drawn)[order]
    which, index = build_blending_index([source.weight for source in sources], sum(counts))
    sets, places = np.asarray(which, np.int64), np.asarray(index, np.int64).copy()
    for number, count in enumerate(counts):
        own = sets == number
        places[own] = _in_own_order(places[own] + epoch * int(own.sum()), count, seed, number)
    return sets, places


def shares_of(counts: Sequence[int], sources: Sequence[DataSource]) -> npt.NDArray[np.float64]:
    """Share of each corpus in the conversations that are read."""
    if any(source.repeat is not None for source in sources):
        parts = np.array([count * (source.repeat or 1.0) for count, source in zip(counts, sources, strict=True)])
    elif len(sources) == 1:
        parts = np.ones(1)
    else:
        parts = np.array([source.weight for source in sources], np.float64)
    return parts / parts.sum()


def _repeated(count: int, times: float, rng: np.random.RandomState) -> Numbers:
    """All conversations ``times`` times; of a fraction a random part, each at most once more."""
    whole = int(times)
    rest = rng.permutation(count)[: round(count * (times - whole))]
    return np.concatenate([np.tile(np.arange(count), whole), rest]).astype(np.int64)


def _in_own_order(index: Numbers, count: int, seed: int, corpus: int) -> Numbers:
    """Places of a corpus' numbers ``index``, counted on over all its passes; each pass has an order of its own."""
    passes, places = np.divmod(index, count)
    for number in np.unique(passes).tolist():
        own = passes == number
        places[own] = np.random.RandomState([seed, corpus, number]).permutation(count)[places[own]]
    return places


def _sample(
    conversations: Sequence[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]], data: DataConfig
) -> Sample:
    """Conversations side by side, padded at the end. Each is a document of its own, and so is the padding."""
    room = data.sequence_length + 1
    tokens = np.full(room, _PAD, np.int64)
    mask = np.zeros(room, np.float32)
    lengths, begin = [], 0
    for ids, roles in conversations:
        end = begin + len(ids)
        tokens[begin:end] = ids
        trained = trained_labels(roles, data.loss)
        mask[begin:end] = trained / max(1, trained.sum()) if data.loss_average == "conversation" else trained
        lengths.append(len(ids))
        begin = end
    if not data.packing:  # nothing stands in front of the padding that it could disturb
        lengths = [room]
    elif begin < room:
        lengths.append(room - begin)
    lengths[-1] -= 1  # the last token is a label only
    return Sample(tokens, mask[1:], tuple(length for length in lengths if length))
