"""What a head scores, and how the texts that it scores were made: in side files, checkpoints and configurations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_med.config.schema import CLASSIFICATION, LANGUAGE_MODEL, ModelConfig
from megatron_med.errors import ConfigError, DataError

SEPARATOR = "[SEP]"


@dataclass(frozen=True)
class HeadForm:
    """How a question becomes sequences.

    Attributes:
        kind: ``classification`` or ``multiple_choice``.
        labels: names of the classes; none for a choice, whose options are its own.
        separator: token behind both parts of a sequence; empty: none.
        max_length: tokens of a sequence; of what is longer the longer part is cut at its end.
    """

    kind: str
    labels: tuple[str, ...]
    separator: str
    max_length: int

    def described(self) -> dict[str, Any]:
        """For side files and checkpoints."""
        return asdict(self) | {"labels": list(self.labels)}

    @classmethod
    def of(cls, described: dict[str, Any]) -> HeadForm:
        """From ``described``."""
        return cls(**described | {"labels": tuple(described["labels"])})

    def class_of(self, label: str, place: str) -> int:
        """Number of a class by its name.

        Args:
            label: its name.
            place: what has it, for the message.

        Raises:
            DataError: the head does not have it.
        """
        if label not in self.labels:
            raise DataError(
                f"{place} has the label {label!r}, and the head has {', '.join(self.labels)}: name all labels when the "
                "data is made (--labels), or leave that out."
            )
        return self.labels.index(label)


def check_head(model: ModelConfig, described: dict[str, Any] | None) -> None:
    """Refuses data for another head than the model's.

    Raises:
        ConfigError: says what to set.
    """
    if described is None:
        if model.head != LANGUAGE_MODEL:
            raise ConfigError(
                f"model.head is {model.head}, and the data holds texts or conversations: make it with "
                "megatron-med preprocess-questions, or leave model.head out."
            )
        return
    if described["max_length"] > model.max_position_embeddings:
        raise ConfigError(
            f"the data has sequences of up to {described['max_length']} tokens, and model.max_position_embeddings is "
            f"{model.max_position_embeddings}: make it with a smaller --max-length."
        )
    kind, labels = described["kind"], described["labels"]
    classes = len(labels) if kind == CLASSIFICATION else 1
    if (kind, classes) != (model.head, model.num_labels):
        named = f" of {classes} labels ({', '.join(labels)})" if labels else ""
        raise ConfigError(
            f"the data is for a head of the kind {kind}{named}, and model.head is {model.head} with "
            f"{model.num_labels} labels: set model.head: {kind}"
            + (f" and model.num_labels: {classes}." if kind == CLASSIFICATION else ".")
        )


def check_same_labels(head: dict[str, Any] | None, other: dict[str, Any] | None, named: str) -> None:
    """Refuses labels in another order than those of the training data: a class is a number.

    Args:
        head: of the training data.
        other: of a checkpoint, which may be a language model, or of other data.
        named: what the other one is.

    Raises:
        ConfigError: they differ.
    """
    if head is None or other is None:
        return
    for name in ("kind", "labels"):
        if head[name] != other[name]:
            raise ConfigError(
                f"{named} has a head with {name} {other[name]}, and data.train {head[name]}: make all data with "
                "the same --labels in the same order."
            )
