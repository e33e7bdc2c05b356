"""What attention sees besides the new tokens, where a model is read from and not trained."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class AttentionCache(ABC):
    """Takes the place of the attention over a batch: it knows which earlier tokens each new one sees."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the new tokens, one after the other in one row, over what they see.

        Args:
            layer: global index.
            query: ``[new, 1, heads/tp, head_dim]``.
            key, value: ``[new, 1, groups/tp, head_dim]``.

        Returns:
            ``[new, 1, heads/tp * head_dim]``.
        """
