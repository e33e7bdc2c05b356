"""Reads the micro-batches of a step as tensors."""

from __future__ import annotations

import numpy as np
import torch

from megatron_med.data.blend import BlendedDataset
from megatron_med.data.sampler import MicroBatchPlace, micro_batch_places
from megatron_med.errors import DataError
from megatron_med.model.batch import MicroBatch
from megatron_med.parallel.context import ParallelContext


class BatchLoader:
    """Micro-batches of this data-parallel rank. Every pipeline stage and tensor-parallel rank reads them itself.

    Args:
        dataset: the stream of samples.
        context: the grid.
        sequence_length, micro_batch_size, vocab_size: of the run.
        seed: names the dropout masks.
    """

    def __init__(
        self,
        dataset: BlendedDataset,
        context: ParallelContext,
        *,
        sequence_length: int,
        micro_batch_size: int,
        vocab_size: int,
        seed: int,
    ) -> None:
        self.dataset = dataset
        self._context = context
        self._length = sequence_length
        self._micro_batch_size = micro_batch_size
        self._vocab_size = vocab_size
        self._seed = seed

    def load(self, consumed: int, batch_size: int, step: int) -> list[MicroBatch]:
        """This rank's part of the global batch of ``batch_size`` samples that begins at sample ``consumed``."""
        dp = self._context.dp
        places = micro_batch_places(consumed, batch_size, self._micro_batch_size, dp.rank, dp.size)
        return [self._micro_batch(place, step) for place in places]

    def _micro_batch(self, place: MicroBatchPlace, step: int) -> MicroBatch:
        """Samples of one place; where there are fewer than a micro-batch, rows without loss fill it up."""
        rows = np.zeros((self._micro_batch_size, self._length + 1), dtype=np.int64)
        mask = np.zeros((self._micro_batch_size, self._length), dtype=np.float32)
        for row, sample in enumerate(place.samples):
            rows[row] = self._checked(sample)
            mask[row] = 1
        tokens = torch.from_numpy(rows).to(self._context.device)
        positions = torch.arange(self._length, device=self._context.device)
        return MicroBatch(
            tokens=tokens[:, :-1],
            labels=tokens[:, 1:],
            loss_mask=torch.from_numpy(mask).to(self._context.device),
            positions=positions.expand(self._micro_batch_size, -1),
            dropout_key=f"{self._seed}.{step}.{place.index}",
        )

    def _checked(self, sample: int) -> np.ndarray:
        ids = self.dataset.sample(sample)
        low, high = ids.min(), ids.max()
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"{self.dataset.source(sample)}.bin holds the id {high if high >= self._vocab_size else low}: "
                f"model.vocab_size is {self._vocab_size}. Tokenize with this model's tokenizer."
            )
        return ids
