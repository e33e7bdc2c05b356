"""Loads a tokenizer from a folder or its files. Special-token strings inside raw text stay text."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from megatron_med.errors import DataError

_PROBE = (
    "Tokenizers differ: 37.5 °C, HbA1c 8.1 %, β-blockers (metoprolol 50 mg/d) \u2013 acetylcholinesterase, Crohn's;\n"
    "  immunohistochemistry of adenocarcinoma; pharmacokinetics, electroencephalography; COVID-19 RT-PCR was negative."
)
_END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        files: what it was loaded from, first the file that says its kind.
        vocab_size: ids are below this.
        eod_id: end-of-document id, None where the vocabulary has none.
        bos_id: begin-of-sequence id, None where the vocabulary has none.
    """

    files: list[Path]
    vocab_size: int
    eod_id: int | None
    bos_id: int | None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of raw text, without begin or end ids."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]

    def file_hashes(self) -> dict[str, str]:
        """sha256 of every file, by name."""
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in self.files}

    def describe(self) -> dict[str, Any]:
        """What is recorded beside data and checkpoints. Equal fingerprints mean equal ids, whatever the files."""
        probe = json.dumps(self.encode(_PROBE)).encode()
        return {
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
            "fingerprint": hashlib.sha256(probe).hexdigest()[:16],
            "files": self.file_hashes(),
        }

    def copy_to(self, folder: Path) -> None:
        """Copies the files under the names that ``load_tokenizer`` and Hugging Face look for in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [file.name for file in self.files]
        if names[0].endswith(".model"):
            names[0] = "tokenizer.model"
        elif len(names) > 1 and names[1].endswith((".txt", ".bpe")):
            names[:2] = ["vocab.json", "merges.txt"]
        elif names[0].endswith(".json"):
            names[0] = "tokenizer.json"
        for file, name in zip(self.files, names, strict=True):
            if not (folder / name).exists():
                shutil.copyfile(file, folder / name)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file (Llama, Llama-2, Mistral)."""

    def __init__(self, model: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{model} is not a SentencePiece model ({str(error).splitlines()[0]}). Give a SentencePiece .model, "
                "a tokenizer.json or vocab.json,merges.txt."
            ) from error
        self.files = [model]
        self.vocab_size = self._processor.vocab_size()
        eos, bos = self._processor.eos_id(), self._processor.bos_id()
        self.eod_id = eos if eos >= 0 else None
        self.bos_id = bos if bos >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(token) for token in ids])


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizers`` pipeline: ``tokenizer.json``, or byte-level BPE from a GPT-2 vocabulary and merges."""

    def __init__(self, backend: tokenizers.Tokenizer, files: list[Path]) -> None:
        self._backend = backend
        backend.encode_special_tokens = True  # a special token's string in raw text is ordinary text
        self.files = files
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        config = _read_json(files[0].parent / "tokenizer_config.json")
        self.eod_id = _named_token(config, "eos_token", vocabulary)
        self.bos_id = _named_token(config, "bos_token", vocabulary)
        if self.eod_id is None:
            self.eod_id = next((vocabulary[name] for name in _END_OF_DOCUMENT if name in vocabulary), None)
        if self.bos_id is None:
            self.bos_id = vocabulary.get("<s>")

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a folder, a ``.model`` or ``tokenizer.json`` file, or ``vocab.json,merges.txt``.

    Raises:
        DataError: nothing usable is there.
    """
    names = str(path).split(",")
    if len(names) == 2:
        return _byte_level_bpe(Path(names[0]), Path(names[1]))
    source = Path(path)
    if source.is_dir():
        return _from_folder(source)
    _need_file(source)
    if source.suffix == ".model":
        return _with_companions(SentencePieceTokenizer(source))
    if source.suffix == ".json":
        return _with_companions(_from_tokenizer_json(source))
    raise DataError(
        f"{source}: no tokenizer ends in '{source.suffix}'. Give a folder, a .model file, a tokenizer.json, or "
        "vocab.json,merges.txt."
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds files that ``load_tokenizer`` takes."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return any((folder / name).is_file() for name in names)


def _from_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _with_companions(_from_tokenizer_json(folder / "tokenizer.json"))
    if (folder / "tokenizer.model").is_file():
        return _with_companions(SentencePieceTokenizer(folder / "tokenizer.model"))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_level_bpe(folder / "vocab.json", folder / "merges.txt")
    raise DataError(
        f"{folder} holds no tokenizer: a tokenizer.json, a tokenizer.model, or vocab.json with merges.txt is needed."
    )


def _from_tokenizer_json(file: Path) -> Tokenizer:
    content = _read_json(file)
    if "model" not in content:
        raise DataError(
            f"{file} is not a Hugging Face tokenizer.json (it has no 'model'). A GPT-2 vocabulary is given together "
            f"with its merges: {file},MERGES.txt."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file} is not a tokenizer.json that can be read: {error}. Give an intact file.") from error
    return HuggingFaceTokenizer(backend, [file])


def _byte_level_bpe(vocabulary: Path, merges: Path) -> Tokenizer:
    _need_file(vocabulary)
    _need_file(merges)
    try:
        model = tokenizers.models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{vocabulary} and {merges} are not a GPT-2 vocabulary with its merges: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return _with_companions(HuggingFaceTokenizer(backend, [vocabulary, merges]))


def _with_companions(tokenizer: Tokenizer) -> Tokenizer:
    """Adds the files beside a tokenizer that belong to it."""
    folder = tokenizer.files[0].parent
    names = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    if tokenizer.files[0].name == "tokenizer.json":
        names += ["tokenizer.model", "vocab.json", "merges.txt"]
    tokenizer.files += [folder / name for name in names if (folder / name).is_file()]
    return tokenizer


def _named_token(config: dict[str, Any], key: str, vocabulary: dict[str, int]) -> int | None:
    name = config.get(key)
    if isinstance(name, dict):
        name = name.get("content")
    return vocabulary.get(name) if isinstance(name, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not JSON: {error}. Give an intact file.") from error
    return content if isinstance(content, dict) else {}


def _need_file(file: Path) -> None:
    if not file.is_file():
        raise DataError(f"There is no tokenizer file {file}. Check the path.")
