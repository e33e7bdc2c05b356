"""Keys and values of the tokens so far, row by row, and the passes that write and read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_med.kernels.cached_attention import cache_dtype, decode_attention
from megatron_med.kernels.functional import PackedDocuments, attention
from megatron_med.model.cache import AttentionCache
from megatron_med.model.transformer import Transformer


class KeyValueCache:
    """Memory for a number of rows, of the layers of this stage.

    Args:
        chunks: of this rank.
        rows: sequences that are written at the same time.
        capacity: tokens of the longest of them.
        dtype: of the activations.
    """

    def __init__(self, chunks: Iterable[Transformer], rows: int, capacity: int, dtype: torch.dtype) -> None:
        self.rows = rows
        self.capacity = capacity
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        for chunk in chunks:
            config, context = chunk.config, chunk.context
            self.device = context.device
            self.dtype = cache_dtype(self.device, dtype)
            shape = (rows, config.num_query_groups // context.tp.size, self.capacity, config.head_dim)
            for layer in chunk.chunk.layers:  # zeros: a masked key still takes part in the arithmetic, times 0
                key, value = (torch.zeros(shape, dtype=self.dtype, device=context.device) for _ in range(2))
                self.layers[layer] = key, value

    def move(self, source: int, target: int, length: int) -> None:
        """Puts a row of ``length`` tokens into the place of another."""
        for pair in self.layers.values():
            for tensor in pair:
                tensor[target, :, :length] = tensor[source, :, :length]

    def reorder(self, rows: Sequence[int], sources: Sequence[int], length: int) -> None:
        """Puts rows ``sources`` of up to ``length`` tokens into the places ``rows``; a source may come twice."""
        places, origins = torch.tensor([rows, sources], device=self.device)
        for pair in self.layers.values():
            for tensor in pair:
                tensor[places, :, :length] = tensor[origins, :, :length]


class Prefill(AttentionCache):
    """The first tokens of some rows, all of a row at once.

    Args:
        cache: takes their keys and values.
        rows: that they fill.
        lengths: tokens of each.
        padding: tokens behind them that mean nothing.
    """

    def __init__(self, cache: KeyValueCache, rows: Sequence[int], lengths: Sequence[int], padding: int) -> None:
        self._cache = cache
        self._rows = rows
        self._documents = PackedDocuments.of([*lengths, *([padding] if padding else [])], cache.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for kept, new in zip(self._cache.layers[layer], (key, value), strict=True):
            texts = new[:, 0].split(self._documents.lengths)
            for row, tokens in zip(self._rows, texts, strict=False):  # behind them only padding
                kept[row, :, : len(tokens)] = tokens.transpose(0, 1)
        return attention(query, key, value, causal=True, documents=self._documents)


class Decode(AttentionCache):
    """One more token of each of the first rows.

    Args:
        cache: of these rows.
        lengths: tokens that each has already.
    """

    def __init__(self, cache: KeyValueCache, lengths: Sequence[int]) -> None:
        assert max(lengths) < cache.capacity, "a row is longer than the cache"
        self._cache = cache
        self._lengths = lengths
        self._places = torch.tensor(lengths, device=cache.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = slice(len(self._lengths))
        new = query[rows, 0], key[rows, 0], value[rows, 0]
        out = decode_attention(*new, self._cache.layers[layer], self._places, self._lengths)
        padding = out.new_zeros(len(query) - len(out), out.shape[1])
        return (torch.cat((out, padding)) if len(padding) else out).unsqueeze(1)
