"""Reads the micro-batches of a step as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_med.data.sampler import MicroBatchPlace, micro_batch_places
from megatron_med.errors import DataError
from megatron_med.model.batch import MicroBatch
from megatron_med.parallel.context import ParallelContext


class SampleStream(Protocol):
    """What a loader needs of a stream of samples: ``BlendedDataset`` has it."""

    def __len__(self) -> int: ...

    def pieces(self, index: int) -> list[npt.NDArray[np.integer]]:
        """The documents, or parts of documents, that sample ``index`` is packed from."""
        ...

    def source(self, index: int) -> Path:
        """Prefix of the files that sample ``index`` comes from."""
        ...


class BatchLoader:
    """Micro-batches of this data-parallel rank. Every pipeline stage and tensor-parallel rank reads them itself.

    Args:
        dataset: the stream of samples.
        context: the grid.
        sequence_length, micro_batch_size, vocab_size: of the run.
        seed: names the dropout masks.
        isolate_documents: documents packed into one sample do not see each other.
    """

    def __init__(
        self,
        dataset: SampleStream,
        context: ParallelContext,
        *,
        sequence_length: int,
        micro_batch_size: int,
        vocab_size: int,
        seed: int,
        isolate_documents: bool = False,
    ) -> None:
        self.dataset = dataset
        self._context = context
        self._length = sequence_length
        self._micro_batch_size = micro_batch_size
        self._vocab_size = vocab_size
        self._seed = seed
        self._isolate_documents = isolate_documents

    def load(self, consumed: int, batch_size: int, step: int) -> list[MicroBatch]:
        """This rank's part of the global batch of ``batch_size`` samples that begins at sample ``consumed``."""
        axis = self._context.batch
        places = micro_batch_places(consumed, batch_size, self._micro_batch_size, axis.rank, axis.size)
        return [self._micro_batch(place, step) for place in places]

    def _micro_batch(self, place: MicroBatchPlace, step: int) -> MicroBatch:
        """Samples of one place; where there are fewer than a micro-batch, rows without loss fill it up."""
        rows = np.zeros((self._micro_batch_size, self._length + 1), dtype=np.int64)
        documents = np.zeros_like(rows)
        mask = np.zeros((self._micro_batch_size, self._length), dtype=np.float32)
        for row, sample in enumerate(place.samples):
            pieces = self.dataset.pieces(sample)
            rows[row] = self._checked(np.concatenate(pieces), sample)
            documents[row] = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
            mask[row] = 1
        device = self._context.device
        tokens = torch.from_numpy(rows).to(device)
        positions, allowed = torch.arange(self._length).expand(self._micro_batch_size, -1), None
        if self._isolate_documents:
            mask *= documents[:, :-1] == documents[:, 1:]  # no token foretells another document
            positions, allowed = isolation(torch.from_numpy(documents[:, :-1]))
        return MicroBatch(
            tokens=tokens[:, :-1],
            labels=tokens[:, 1:],
            loss_mask=torch.from_numpy(mask).to(device),
            positions=positions.to(device),
            dropout_key=f"{self._seed}.{step}.{place.index}",
            allowed=None if allowed is None else allowed.to(device),
        )

    def _checked(self, ids: np.ndarray, sample: int) -> np.ndarray:
        low, high = ids.min(), ids.max()
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"{self.dataset.source(sample)}.bin holds the id {high if high >= self._vocab_size else low}: "
                f"model.vocab_size is {self._vocab_size}. Tokenize with this model's tokenizer."
            )
        return ids


def isolation(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and attention for packed documents that do not see each other.

    Args:
        documents: ``[batch, seq]``, a number for each document, rising along a row.

    Returns:
        Positions that restart with each document, ``[batch, seq]``, and the keys that each query may see,
        ``[batch, 1, seq, seq]`` bool.
    """
    length = documents.shape[1]
    places = torch.arange(length).expand_as(documents)
    is_start = torch.ones_like(documents, dtype=torch.bool)
    is_start[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = (places * is_start).cummax(dim=1).values
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return places - starts, same.tril().unsqueeze(1)
