"""The samples of a run, whatever kind its corpora are of: texts packed without a gap, or conversations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megatron_med.config.schema import DataConfig, DataSource
from megatron_med.data.gpt import PackedDataset
from megatron_med.data.indexed import token_paths
from megatron_med.data.instruct import ConversationSet, ConversationStream, open_conversations
from megatron_med.data.labelled import LabelledStream, labels_prefix, open_labelled
from megatron_med.data.loader import SampleStream
from megatron_med.data.sources import blend, one_pass, open_corpora, read_side_file, roles_prefix
from megatron_med.errors import ConfigError, DataError

_CONVERSATION_OPTIONS = ("packing", "truncate", "loss", "loss_average", "samples_per_epoch")


class Corpora(Protocol):
    """The corpora of one split, open."""

    def stream(self, samples: int) -> SampleStream:
        """So many samples; a longer stream begins with the shorter one."""
        ...

    def one_pass(self) -> int:
        """Samples that can be drawn before some text comes again."""
        ...

    def samples_of(self, epochs: float) -> int:
        """Samples of so many epochs.

        Raises:
            ConfigError: nobody can say what an epoch of these corpora is.
        """
        ...

    def held(self) -> str:
        """How much there is of what, in words."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the order and the content of the samples depend on."""
        ...

    def told(self) -> list[str]:
        """What was left out or cut, in words."""
        ...

    def chat(self) -> dict[str, Any] | None:
        """The template of the conversations: ``template, chat_template, turn_end_id``."""
        ...

    def head(self) -> dict[str, Any] | None:
        """How sequences to score were made, ``kind`` and ``labels`` among it; None for what is written."""
        ...


def open_split(sources: Sequence[DataSource], data: DataConfig, seed: int, vocab_size: int, cache: Path) -> Corpora:
    """Opens and checks every corpus of a split.

    Raises:
        DataError: with the faults of all of them; also where texts and conversations are mixed.
    """
    labelled = [is_labelled(source.path) for source in sources]
    if all(labelled) and sources:
        return _Labelled(sources, data, seed, vocab_size, cache)
    if any(labelled):
        others = [source.path for source, is_one in zip(sources, labelled, strict=True) if not is_one]
        raise DataError(f"{', '.join(others)} has no labels, the other corpora have: one run trains on one kind.")
    conversations = [is_conversations(source.path) for source in sources]
    if all(conversations) and sources:
        return _Conversations(sources, data, seed, vocab_size, cache)
    if any(conversations):
        texts = [source.path for source, is_one in zip(sources, conversations, strict=True) if not is_one]
        raise DataError(
            f"{', '.join(texts)} holds text, the other corpora hold conversations: one run trains on one kind. Make "
            "conversations of it, or leave it out."
        )
    return _Texts(sources, data, seed, vocab_size, cache)


def is_labelled(prefix: str | Path) -> bool:
    """Whether a corpus was made by ``megatron-med preprocess-questions``."""
    return token_paths(labels_prefix(prefix))[1].is_file()


def is_conversations(prefix: str | Path) -> bool:
    """Whether a corpus was made by ``megatron-med preprocess-instructions``."""
    return token_paths(roles_prefix(prefix))[1].is_file()


@dataclass
class _Split:
    """What every split is opened with; see ``open_split``."""

    sources: Sequence[DataSource]
    data: DataConfig
    seed: int
    vocab_size: int
    cache: Path


@dataclass
class _Texts(_Split):
    def __post_init__(self) -> None:
        repeated = [source.path for source in self.sources if source.repeat is not None]
        if repeated or self.data.samples_per_epoch is not None:
            what = f"{repeated[0]} has repeat" if repeated else "data.samples_per_epoch is set"
            raise DataError(f"{what}, and holds text: both are for conversations. Mix texts by weight.")
        self.corpora: list[PackedDataset] = open_corpora(
            self.sources, self.data, self.seed, self.vocab_size, self.cache
        )

    def stream(self, samples: int) -> SampleStream:
        return blend(self.corpora, self.sources, samples, self.cache)

    def one_pass(self) -> int:
        return one_pass(self.corpora, self.sources)

    def samples_of(self, epochs: float) -> int:
        if len(self.corpora) > 1:
            raise ConfigError(
                f"train.epochs is {epochs}: corpora of text that are mixed by weight end at different times. Set "
                f"train.steps; the first of them comes again after {self.one_pass():,} samples."
            )
        return math.ceil(epochs * self.corpora[0].samples_per_epoch)

    def held(self) -> str:
        return f"{sum(corpus.tokens for corpus in self.corpora):,} tokens of text{_in(self.corpora)}"

    def identity(self) -> dict[str, Any]:
        train = [
            {"path": source.path, "weight": source.weight, "content": corpus.fingerprint}
            for source, corpus in zip(self.sources, self.corpora, strict=True)
        ]
        return {"isolate_documents": self.data.isolate_documents, "train": train}

    def told(self) -> list[str]:
        return []

    def chat(self) -> None:
        return None

    def head(self) -> None:
        return None


@dataclass
class _Conversations(_Split):
    unit: ClassVar[str] = "conversations"

    def __post_init__(self) -> None:
        self.sets: list[ConversationSet] = []
        faults: list[str] = []
        for source in self.sources:
            try:
                found = self.open(source)
                side = read_side_file(source.path)
                found.data.check_vocabulary(side["tokenizer"]["vocab_size"] if side else self.vocab_size)
                self.sets.append(found)
            except DataError as error:
                faults += error.faults
        if faults:
            raise DataError(faults)
        self._epochs = self.epochs()

    def open(self, source: DataSource) -> ConversationSet:
        """Opens one corpus."""
        return open_conversations(source.path, self.data, self.cache)

    def epochs(self) -> ConversationStream:
        """The samples of all of them."""
        return ConversationStream(self.sets, self.sources, self.data, self.seed, self.cache)

    def stream(self, samples: int) -> SampleStream:
        return _Limited(self._epochs, samples)

    def one_pass(self) -> int:
        return self._epochs.samples_up_to(1)

    def samples_of(self, epochs: float) -> int:
        whole = int(epochs)
        done = self._epochs.samples_up_to(whole)
        if epochs == whole:
            return done
        return done + math.ceil((epochs - whole) * (self._epochs.samples_up_to(whole + 1) - done))

    def held(self) -> str:
        tokens = sum(int(found.lengths.sum()) for found in self.sets)
        return f"{sum(map(len, self.sets)):,} {self.unit} of {tokens:,} tokens{_in(self.sets)}"

    def identity(self) -> dict[str, Any]:
        train = [
            {"path": source.path, "weight": source.weight, "repeat": source.repeat, "content": found.fingerprint}
            for source, found in zip(self.sources, self.sets, strict=True)
        ]
        return {"train": train, "conversations": {name: getattr(self.data, name) for name in _CONVERSATION_OPTIONS}}

    def told(self) -> list[str]:
        return [line for found in self.sets for line in found.told]

    def chat(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = None
        for source in self.sources:
            side = read_side_file(source.path)
            chat = side.get("chat") if side else None
            if not isinstance(chat, dict) or not {"template", "chat_template", "turn_end_id"} <= chat.keys():
                raise DataError(
                    f"{source.path}.json does not tell the template: run megatron-med preprocess-instructions again."
                )
            if found is not None and chat["chat_template"] != found["chat_template"]:
                raise DataError(
                    f"{source.path} was made with the template {chat['template']}, {self.sources[0].path} with "
                    f"{found['template']}: a model speaks one. Make all with one template."
                )
            found = chat
        return found

    def head(self) -> dict[str, Any] | None:
        return None


class _Labelled(_Conversations):
    unit = "questions"

    def open(self, source: DataSource) -> ConversationSet:
        return open_labelled(source.path, self.data, self.cache)

    def epochs(self) -> ConversationStream:
        head = self.head()
        kind, longest = head["kind"], head["max_length"]
        return LabelledStream(self.sets, self.sources, self.data, self.seed, self.cache, kind, longest)

    def identity(self) -> dict[str, Any]:
        told = super().identity()
        return {"train": told["train"], "labelled": {"packing": self.data.packing, "truncate": self.data.truncate}}

    def chat(self) -> None:
        return None

    def head(self) -> dict[str, Any]:
        heads = []
        for source in self.sources:
            side = read_side_file(source.path)
            if side is None or not isinstance(side.get("head"), dict):
                raise DataError(
                    f"{source.path}.json does not tell the head: run megatron-med preprocess-questions again."
                )
            heads.append(side["head"])
        for source, head in zip(self.sources, heads, strict=True):
            different = [name for name in head if head[name] != heads[0].get(name)]
            if different:
                raise DataError(
                    f"{source.path} was made with {different[0]} {head[different[0]]!r}, {self.sources[0].path} with "
                    f"{heads[0].get(different[0])!r}: one head reads one kind. Make all alike."
                )
        return heads[0]


def _in(corpora: Sequence[Any]) -> str:
    return f" in {len(corpora)} corpora" if len(corpora) > 1 else ""


@dataclass
class _Limited:
    """The beginning of a stream without end."""

    epochs: ConversationStream
    samples: int

    def __len__(self) -> int:
        return self.samples

    def sample(self, index: int) -> Any:
        """Sample ``index`` of the stream."""
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of a stream of {self.samples}")
        return self.epochs.sample(index)

    def source(self, index: int) -> Path:
        """Prefix of the files that sample ``index`` comes from."""
        return self.epochs.source(index)
