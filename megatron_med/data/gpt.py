"""Samples of fixed length packed from documents, and their order.

The order is a function of (files, sequence length, seed, epoch) and of nothing else. For the first epoch it equals
Megatron's own document, sample and shuffle indices.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_med.data.cache import Arrays, cached_arrays, remembered
from megatron_med.data.index import build_sample_index, shuffled_range
from megatron_med.data.indexed import IndexedDataset
from megatron_med.data.sample import Sample, without_borders
from megatron_med.errors import DataError

_CACHED_EPOCHS = 2
_FINGERPRINT_BYTES = 1 << 20


def epoch_generator(seed: int, epoch: int) -> np.random.RandomState:
    """The generator of an epoch's order; Megatron's for the first one."""
    return np.random.RandomState(seed if epoch == 0 else [seed, epoch])


class PackedDataset:
    """Samples of one corpus, epoch after epoch.

    Args:
        data: the token file.
        sequence_length: tokens of one sample; one more is read as the last label.
        seed: of the order.
        cache: folder for the index arrays.
        isolate_documents: documents packed into one sample do not see each other.
    """

    def __init__(
        self, data: IndexedDataset, sequence_length: int, seed: int, cache: Path, isolate_documents: bool = False
    ) -> None:
        self.data = data
        self.isolate_documents = isolate_documents
        self.sequence_length = sequence_length
        self.seed = seed
        self._cache = cache
        facts = remembered(cache, [data.idx_path, data.bin_path], lambda: _facts(data))
        self.fingerprint: str = facts["fingerprint"]
        self.tokens: int = facts["tokens"]
        self._epochs: dict[int, Arrays] = {}
        self.samples_per_epoch = (facts["tokens"] - 1) // sequence_length if facts["tokens"] else 0
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{data.bin_path} has {facts['tokens']} tokens: one sample of data.sequence_length = "
                f"{sequence_length} needs {sequence_length + 1}. Add text or shorten the samples."
            )

    def sample(self, index: int) -> Sample:
        """Sample ``index``, counted on over all epochs."""
        ids = [part for _, _, part in self.parts(index) if len(part)]
        tokens = np.concatenate(ids)
        if not self.isolate_documents:
            return without_borders(tokens)
        mask = np.ones(self.sequence_length, dtype=np.float32)
        ends = np.cumsum([len(part) for part in ids])
        mask[ends[:-1] - 1] = 0  # no token predicts another document's first
        lengths = [len(part) for part in ids]
        lengths[-1] -= 1  # the last token is a label only
        return Sample(tokens, mask, tuple(length for length in lengths if length))

    def parts(self, index: int) -> list[tuple[int, int, npt.NDArray[np.integer]]]:
        """The documents, or parts of documents, that a sample is packed from: number of the document, the token of it
        that the part begins with, ids."""
        epoch, place = divmod(index, self.samples_per_epoch)
        arrays = self._order(epoch)
        documents, samples = arrays["documents"], arrays["samples"]
        which = int(arrays["shuffle"][place])
        (first, first_offset), (last, last_offset) = samples[which].tolist(), samples[which + 1].tolist()
        numbers = documents[first : last + 1].tolist()
        starts = [first_offset] + [0] * (last - first)
        lengths: list[int | None] = [None] * (last - first) + [last_offset + 1 - starts[-1]]
        return [
            (number, start, self.data.read(number, start, length))
            for number, start, length in zip(numbers, starts, lengths, strict=True)
        ]

    def _order(self, epoch: int) -> Arrays:
        if epoch not in self._epochs:
            while len(self._epochs) >= _CACHED_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
            ingredients = {
                "kind": "packed samples, version 2",
                "data": self.fingerprint,
                "sequence_length": self.sequence_length,
                "seed": self.seed,
                "epoch": epoch,
            }
            self._epochs[epoch] = cached_arrays(self._cache, ingredients, lambda: self._build(epoch))
        return self._epochs[epoch]

    def _build(self, epoch: int) -> Arrays:
        rng = epoch_generator(self.seed, epoch)
        documents = shuffled_range(len(self.data), rng)
        samples = build_sample_index(self.data.sizes, documents, self.sequence_length)
        return {"documents": documents, "samples": samples, "shuffle": shuffled_range(len(samples) - 1, rng)}


def _facts(data: IndexedDataset) -> dict[str, Any]:
    return {"fingerprint": fingerprint(data), "tokens": data.token_count}


def fingerprint(data: IndexedDataset) -> str:
    """Hash of the index file, and of the size and both ends of the token file."""
    size = data.bin_path.stat().st_size
    with data.idx_path.open("rb") as index, data.bin_path.open("rb") as tokens:
        digest = hashlib.file_digest(index, "sha256")
        digest.update(tokens.read(_FINGERPRINT_BYTES))
        tokens.seek(max(0, size - _FINGERPRINT_BYTES))
        digest.update(tokens.read())
    return f"{digest.hexdigest()}-{size}"
