"""Reads the micro-batches of a step as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_med.data.sample import Sample, pieces
from megatron_med.data.sampler import MicroBatchPlace, micro_batch_places
from megatron_med.errors import DataError
from megatron_med.kernels.functional import PackedDocuments
from megatron_med.model.batch import MicroBatch
from megatron_med.parallel.context import ParallelContext


class SampleStream(Protocol):
    """What a loader needs of a stream of samples: ``BlendedDataset`` has it."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Sample ``index`` of the stream."""
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
        longest: tokens of a document at most; 0: a sample may be one.
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
        longest: int = 0,
    ) -> None:
        self.dataset = dataset
        self._context = context
        self._micro_batch_size = micro_batch_size
        self._vocab_size = vocab_size
        self._seed = seed
        self._filler = _filler(sequence_length, longest or sequence_length)

    def load(self, consumed: int, batch_size: int, step: int) -> list[MicroBatch]:
        """This rank's part of the global batch of ``batch_size`` samples that begins at sample ``consumed``."""
        axis = self._context.batch
        places = micro_batch_places(consumed, batch_size, self._micro_batch_size, axis.rank, axis.size)
        return [self._micro_batch(place, step) for place in places]

    def _micro_batch(self, place: MicroBatchPlace, step: int) -> MicroBatch:
        """Samples of one place; where there are fewer than a micro-batch, rows without loss fill it up."""
        samples = [self._read(number) for number in place.samples]
        missing = self._micro_batch_size - len(samples)
        samples += [self._filler] * missing
        device = self._context.device
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]).astype(np.int64)).to(device)
        lengths = [length for sample in samples for length in sample.document_lengths]
        return MicroBatch(
            tokens=tokens[:, :-1],
            labels=tokens[:, 1:] if samples[0].labels is None else _given_labels(samples).to(device),
            loss_mask=torch.from_numpy(np.stack([sample.loss_mask for sample in samples])).to(device),
            positions=_positions(samples).to(device),
            dropout_key=f"{self._seed}.{step}.{place.index}",
            documents=PackedDocuments.of(lengths, device) if len(lengths) > len(samples) else None,
        )

    def _read(self, number: int) -> Sample:
        sample = self.dataset.sample(number)
        self._check(sample.tokens, number)
        return sample

    def _check(self, ids: npt.NDArray[np.integer], number: int) -> None:
        low, high = ids.min(), ids.max()
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"{self.dataset.source(number)}.bin holds the id {high if high >= self._vocab_size else low}: "
                f"model.vocab_size is {self._vocab_size}. Tokenize with this model's tokenizer."
            )


def _filler(length: int, longest: int) -> Sample:
    """A row that no loss is taken of."""
    documents = tuple(pieces(length, longest))
    return Sample(np.zeros(length + 1, dtype=np.int64), np.zeros(length, dtype=np.float32), documents)


def _given_labels(samples: Sequence[Sample]) -> Tensor:
    """``[batch, seq]``; rows that fill a micro-batch up have none."""
    rows = [np.zeros(len(one.loss_mask), np.int64) if one.labels is None else one.labels for one in samples]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _positions(samples: Sequence[Sample]) -> Tensor:
    """``[batch, seq]``, from 0 in every document."""
    return torch.stack([torch.cat([torch.arange(n) for n in sample.document_lengths]) for sample in samples])
