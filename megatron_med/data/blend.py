"""Several corpora as one stream of samples, mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_med.data.cache import cached_arrays
from megatron_med.data.gpt import PackedDataset
from megatron_med.data.index import build_blending_index
from megatron_med.data.sample import Sample


class BlendedDataset:
    """``samples`` samples of several corpora; within a corpus the order is its own.

    Args:
        corpora: the packed corpora.
        weights: their shares, relative to each other.
        samples: length of the stream. A longer stream begins with the shorter one.
        cache: folder for the index arrays.
    """

    def __init__(self, corpora: Sequence[PackedDataset], weights: Sequence[float], samples: int, cache: Path) -> None:
        self._corpora = list(corpora)
        self._samples = samples
        self._blend = None
        if len(self._corpora) > 1:
            ingredients = {"kind": "blend, version 1", "weights": list(weights), "samples": samples}
            self._blend = cached_arrays(cache, ingredients, lambda: self._build(list(weights)))

    def _build(self, weights: list[float]) -> dict[str, npt.NDArray[np.generic]]:
        set_of, index_of = build_blending_index(weights, self._samples)
        return {"set": set_of, "index": index_of}

    def __len__(self) -> int:
        return self._samples

    def locate(self, index: int) -> tuple[int, int]:
        """Corpus of sample ``index`` and its number within that corpus."""
        if not 0 <= index < self._samples:
            raise IndexError(f"sample {index} of a stream of {self._samples}")
        if self._blend is None:
            return 0, index
        return int(self._blend["set"][index]), int(self._blend["index"][index])

    def sample(self, index: int) -> Sample:
        """Sample ``index`` of the stream."""
        corpus, number = self.locate(index)
        return self._corpora[corpus].sample(number)

    def source(self, index: int) -> Path:
        """Prefix of the files that sample ``index`` comes from."""
        return self._corpora[self.locate(index)[0]].data.prefix
