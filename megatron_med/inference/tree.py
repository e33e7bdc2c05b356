"""A context with several continuations, read in one pass: the context is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_med.inference.cache import KeyValueCache
from megatron_med.kernels.cached_attention import masked_attention
from megatron_med.kernels.functional import PackedDocuments, attention
from megatron_med.model.cache import AttentionCache


@dataclass(frozen=True)
class Tree:
    """A context and texts that may follow it.

    Attributes:
        context: at least one token.
        continuations: at least one token each.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @cached_property
    def tokens(self) -> list[int]:
        """What the model reads: the context, then every continuation but for its last token, which nobody asks
        what comes after."""
        return [*self.context, *(token for continuation in self.continuations for token in continuation[:-1])]

    def positions(self, first: int = 0) -> list[int]:
        """Of ``tokens``: every continuation begins where the context ends."""
        end = first + len(self.context)
        rest = [end + place for continuation in self.continuations for place in range(len(continuation) - 1)]
        return [*range(first, end), *rest]

    @cached_property
    def places(self) -> list[int]:
        """Index, in ``tokens``, of the token before each token of each continuation."""
        places, start = [], len(self.context)
        for continuation in self.continuations:
            rest = len(continuation) - 1
            places += [len(self.context) - 1, *range(start, start + rest)]
            start += rest
        return places

    @property
    def targets(self) -> list[int]:
        """Tokens of every continuation."""
        return [token for continuation in self.continuations for token in continuation]

    def mask(self, first: int, device: torch.device) -> Tensor:
        """Which keys a token sees, ``[tokens, first + tokens]``: the ``first`` ones in front of the context, the
        context, and its own continuation, never what comes later."""
        lengths = [len(self.context), *(len(continuation) - 1 for continuation in self.continuations)]
        branch = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        seen = (branch == branch[:, None]) | (branch == 0)
        mask = torch.cat((seen.new_ones(len(branch), first), seen.tril()), dim=1)
        return mask.to(device)


class TreeAttention(AttentionCache):
    """Attention over trees, one after the other.

    Args:
        trees: of one pass.
        device: of the model.
        shared: row 0 holds ``shared_length`` tokens that stand in front of all contexts.
        shared_length: how many.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        device: torch.device,
        shared: KeyValueCache | None = None,
        shared_length: int = 0,
    ) -> None:
        self._lengths = [len(tree.tokens) for tree in trees]
        self._shared = shared
        self._first = shared_length
        self._documents: PackedDocuments | None = None
        self._masks: list[Tensor] = []
        if not shared_length and all(len(tree.continuations) <= 1 for tree in trees):
            self._documents = PackedDocuments.of(self._lengths, device)
        else:
            self._masks = [tree.mask(shared_length, device) for tree in trees]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._documents is not None:
            return attention(query, key, value, causal=True, documents=self._documents)
        split = zip(*(tensor[:, 0].split(self._lengths) for tensor in (query, key, value)), strict=True)
        outs = [
            masked_attention(q, *self._with_shared(layer, k, v), mask)
            for (q, k, v), mask in zip(split, self._masks, strict=True)
        ]
        return torch.cat(outs).unsqueeze(1)

    def _with_shared(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._shared is None:
            return key, value
        earlier = (kept[0, :, : self._first].transpose(0, 1) for kept in self._shared.layers[layer])
        keys, values = (torch.cat((kept.to(new.dtype), new)) for kept, new in zip(earlier, (key, value), strict=True))
        return keys, values
