"""What is asked of a model, and what comes back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_med.errors import CheckpointError, ConfigError
from megatron_med.inference.text import TextStream
from megatron_med.parallel.collectives import Pending
from megatron_med.parallel.random import seed_of
from megatron_med.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
        prompt: ids, at least one.
        max_new_tokens: the answer is cut after this many.
        seed: of what is drawn for this answer; nothing else decides it.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    seed: int = 0


@dataclass
class Answer:
    """What a prompt was answered with.

    Attributes:
        request: index of the prompt.
        tokens: ids, without the one that ends the answer.
        text: of them, up to a stop string; empty where there is no tokenizer.
        end: why it ended: ``end_token``, ``stop_string`` or ``length``; empty while it is written.
        score: log-likelihood of a beam over its length to the power of the length penalty.
    """

    request: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    end: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Stopping:
    """What ends an answer.

    Attributes:
        end_ids: tokens.
        strings: texts.
        tokenizer: makes text of tokens; needed with ``strings``.
    """

    end_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None

    def stream(self, prompt: Sequence[int]) -> TextStream | None:
        """Makes text of an answer; None where there is no tokenizer."""
        return None if self.tokenizer is None else TextStream(self.tokenizer, prompt, self.strings)

    def text_of(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """Text of a whole answer; empty where there is no tokenizer."""
        stream = self.stream(prompt)
        if stream is None:
            return ""
        for token in answer:
            stream.push(token)
        return stream.close()


NEVER = Stopping()
"""Answers end by their length alone."""


class Group(Protocol):
    """Some rows of the cache, which take part in a pass together."""

    def start(self, waiting: deque[int]) -> Pending | None:
        """Begins the next pass, and takes prompts for free rows first; None where there is nothing to do."""

    def absorb(self, chosen: Tensor) -> Iterator[Answer]:
        """Takes in what was chosen. Gives answers that have grown or ended."""


def longest_of(requests: Sequence[Request]) -> int:
    """Tokens of the longest prompt with its answer."""
    return max(len(request.prompt) + request.max_new_tokens for request in requests)


def row_seed(seed: int, index: int) -> int:
    """Seed of the answer to the prompt with this index."""
    return seed_of("generate", seed, index)


def no_language_model(head: str) -> ConfigError:
    """The error for a model that is to write, and scores."""
    return ConfigError(
        f"The model has a head of the kind {head}: it scores texts and writes none (megatron-med evaluate --score "
        "head)."
    )


def not_finite() -> CheckpointError:
    """The error for logits that nothing can be chosen from."""
    return CheckpointError(
        "The model gives logits that are not finite: its weights hold NaN or infinity, or the numbers overflow in this "
        "precision. Choose another checkpoint, or --precision fp32."
    )
