"""Loads a tokenizer from a folder or its files. Special-token strings inside raw text stay text."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from megatron_med.errors import DataError
from megatron_med.files import sha256, write_text

_PROBE = (
    "Tokenizers differ: 37.5 °C, HbA1c 8.1 %, β-blockers (metoprolol 50 mg/d) \u2013 acetylcholinesterase, Crohn's;\n"
    "  immunohistochemistry of adenocarcinoma; pharmacokinetics, electroencephalography; COVID-19 RT-PCR was negative."
)
ADDED_TOKENS = "added_tokens.json"
"""File beside a SentencePiece model that names the tokens after its vocabulary, as Hugging Face has it."""

_GUARDS = ("\n", "\u00a7", "\x00")
_END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        files: what it was loaded from, first the file that says its kind.
        vocab_size: ids are below this.
        added_tokens: special tokens after the vocabulary, in the order of their ids.
        eod_id: end-of-document id, None where the vocabulary has none.
        bos_id: begin-of-sequence id, None where the vocabulary has none.
    """

    files: list[Path]
    vocab_size: int
    added_tokens: tuple[str, ...] = ()
    eod_id: int | None
    bos_id: int | None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of raw text, without begin or end ids."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    @abstractmethod
    def special_tokens(self) -> dict[int, str]:
        """Names of the ids that stand for no text of their own: control tokens and added ones."""

    def decode_visibly(self, ids: Sequence[int], mark: Callable[[str], str] = "«{}»".format) -> str:
        """Text of ids with the special tokens in sight, each through ``mark``: «[fig]» is a token, [fig] is text."""
        names = self.special_tokens()
        pieces: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if token in names:
                pieces += [self._decode_continuation(run, first=not pieces), mark(names[token])]
                run = []
            else:
                run.append(token)
        return "".join([*pieces, self._decode_continuation(run, first=not pieces)])

    def _decode_continuation(self, ids: Sequence[int], first: bool) -> str:
        """Text of ids that stand after a token, or at the beginning."""
        guard = [] if first else self.encode("\n")
        text = self.decode([*guard, *ids]) if ids else ""
        return text[1:] if guard and ids else text

    @abstractmethod
    def encode_part(self, text: str, is_first: bool) -> list[tuple[int, int, int]]:
        """Ids of a part of a text that special tokens cut, as the exported tokenizer has them.

        Returns:
            Id, first character and character after the last, of every token; tokens without text of their own
            (a space in front, the first bytes of a character) end where they begin.
        """

    def special_margins(self) -> dict[int, tuple[bool, bool]]:
        """Special tokens that swallow the white space in front of them, or behind."""
        return {}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]

    def encode_markup_batch(self, texts: Sequence[str], tokens: Collection[str]) -> list[list[int]]:
        """Ids of texts that a formatter wrote: of the added tokens, ``tokens`` are read as such, the rest is text.

        Raises:
            DataError: a token is not one of the added ones.
        """
        known = {token: self.vocab_size - len(self.added_tokens) + i for i, token in enumerate(self.added_tokens)}
        unknown = [token for token in tokens if token not in known]
        if unknown:
            raise DataError(
                f"{self.files[0]} has no token {', '.join(unknown)}: add it with megatron-med extend-tokenizer."
            )
        pattern = re.compile("(" + "|".join(map(re.escape, tokens)) + ")")
        parts = [pattern.split(text) for text in texts]
        first = iter(self.encode_batch([pieces[0] for pieces in parts]))
        rest = iter(self._encode_continuations([piece for pieces in parts for piece in pieces[2::2]]))
        encoded = []
        for pieces in parts:
            ids = next(first)
            for token in pieces[1::2]:
                ids = [*ids, known[token], *next(rest)]
            encoded.append(ids)
        return encoded

    def _encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that follow a token: without the space that some vocabularies put in front of a text."""
        guard = self.encode("\n")
        if self.encode("\nx")[len(guard) :] == self.encode("x"):
            return self.encode_batch(texts)
        return [ids[len(guard) :] for ids in self.encode_batch([f"\n{text}" for text in texts])]

    def file_hashes(self) -> dict[str, str]:
        """sha256 of every file, by name."""
        return {file.name: sha256(file) for file in self.files}

    def describe(self) -> dict[str, Any]:
        """What is recorded beside data and checkpoints. Equal fingerprints mean equal ids, whatever the files."""
        probe = json.dumps(self.encode(_PROBE)).encode()
        return {
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
            "added_tokens": list(self.added_tokens),
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
        self._pieces = self._processor.vocab_size()
        self.added_tokens = _read_added_tokens(model.parent / ADDED_TOKENS, self._pieces)
        self.vocab_size = self._pieces + len(self.added_tokens)
        eos, bos = self._processor.eos_id(), self._processor.bos_id()
        self.eod_id = eos if eos >= 0 else None
        self.bos_id = bos if bos >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def encode_part(self, text: str, is_first: bool) -> list[tuple[int, int, int]]:
        if is_first:
            return _placed(self._processor.encode(text, return_type="offset_mapping"))
        for guard in _GUARDS:  # in place of the space in front of a text; it must not melt into what follows
            found = _placed(self._processor.encode(guard + text, return_type="offset_mapping"), len(guard))
            length = len(self._processor.encode(guard))
            if all(end <= 0 for _, _, end in found[:length]) and all(start >= 0 for _, start, _ in found[length:]):
                return found[length:]
        raise DataError(f"{self.files[0]}: no text can be cut off in front of {text[:20]!r}. Take another tokenizer.")

    def decode(self, ids: Sequence[int]) -> str:
        numbers = [int(token) for token in ids]
        starts = [place for place, token in enumerate(numbers) if token >= self._pieces]
        text = self._processor.decode(numbers[: starts[0]] if starts else numbers)
        guard = self._processor.encode("\n")
        for start, end in pairwise([*starts, len(numbers)] if starts else []):
            text += self.added_tokens[numbers[start] - self._pieces]
            text += self._processor.decode([*guard, *numbers[start + 1 : end]])[1:]
        return text

    def special_tokens(self) -> dict[int, str]:
        control = {i: self._processor.id_to_piece(i) for i in range(self._pieces) if self._processor.is_control(i)}
        return control | {self._pieces + number: token for number, token in enumerate(self.added_tokens)}


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizers`` pipeline: ``tokenizer.json``, or byte-level BPE from a GPT-2 vocabulary and merges."""

    def __init__(self, backend: tokenizers.Tokenizer, files: list[Path]) -> None:
        self._backend = backend
        self._independent: bool | None = None
        backend.encode_special_tokens = True  # a special token's string in raw text is ordinary text
        self.files = files
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.added_tokens = _added_behind(backend)
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

    def encode_part(self, text: str, is_first: bool) -> list[tuple[int, int, int]]:
        guard = "" if is_first or self._parts_are_texts() else "\n"
        encoded = self._backend.encode(guard + text, add_special_tokens=False)
        first = len(self.encode(guard)) if guard else 0
        placed = zip(encoded.ids[first:], encoded.offsets[first:], strict=True)
        return [(token, start - len(guard), end - len(guard)) for token, (start, end) in placed]

    def _parts_are_texts(self) -> bool:
        """Whether the pipeline treats what follows a special token like a text of its own."""
        added = [t for t in self._backend.get_added_tokens_decoder().values() if t.special and not t.rstrip]
        if not added:
            return True
        if self._independent is None:
            self._backend.encode_special_tokens = False
            behind = self._backend.encode(f"{added[0].content}x", add_special_tokens=False).ids[1:]
            self._backend.encode_special_tokens = True
            self._independent = behind == self.encode("x")
        return self._independent

    def special_margins(self) -> dict[int, tuple[bool, bool]]:
        added = self._backend.get_added_tokens_decoder()
        return {number: (token.lstrip, token.rstrip) for number, token in added.items() if token.lstrip or token.rstrip}

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def special_tokens(self) -> dict[int, str]:
        added = self._backend.get_added_tokens_decoder()
        names = {number: token.content for number, token in added.items() if token.special}
        if self.eod_id is not None:
            names[self.eod_id] = self._backend.id_to_token(self.eod_id) or ""
        return names

    def save_with(self, tokens: Sequence[str], folder: Path) -> None:
        """Writes ``tokenizer.json`` and its configuration with tokens after the vocabulary."""
        folder.mkdir(parents=True, exist_ok=True)
        extended = tokenizers.Tokenizer.from_str(self._backend.to_str())
        extended.add_special_tokens(list(tokens))
        write_text(folder / "tokenizer.json", extended.to_str(pretty=True))
        for file in self.files:
            if file.name == "tokenizer_config.json":
                shutil.copyfile(file, folder / file.name)


def _placed(mapping: Mapping[str, Any], skipped: int = 0) -> list[tuple[int, int, int]]:
    pairs = zip(mapping["ids"], mapping["offsets"], strict=True)
    return [(token, start - skipped, end - skipped) for token, (start, end) in pairs]


def describe_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """How two tokenizers differ, from what ``Tokenizer.describe`` says of them; None where they give equal ids."""
    tokens = [list(described.get("added_tokens", [])) for described in (first, second)]
    places = range(min(map(len, tokens)))
    if first["vocab_size"] != second["vocab_size"]:
        return f"{first['vocab_size']} pieces against {second['vocab_size']}"
    for place in places:
        if tokens[0][place] != tokens[1][place]:
            return f"added token {place} is {tokens[0][place]} against {tokens[1][place]}"
    if first["fingerprint"] != second["fingerprint"]:
        return "they give different ids to the same text"
    return None


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
    names = ["tokenizer_config.json", "special_tokens_map.json", ADDED_TOKENS, "chat_template.jinja"]
    if tokenizer.files[0].name == "tokenizer.json":
        names += ["tokenizer.model", "vocab.json", "merges.txt"]
    tokenizer.files += [folder / name for name in names if (folder / name).is_file()]
    return tokenizer


def _read_added_tokens(file: Path, pieces: int) -> tuple[str, ...]:
    """Tokens of an ``added_tokens.json`` in the order of their ids, which follow the vocabulary without a gap."""
    ids: dict[str, Any] = _read_json(file)
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != list(range(pieces, pieces + len(tokens))):
        raise DataError(
            f"{file}: the ids {sorted(ids.values())} do not follow the vocabulary of {pieces} pieces one by one. "
            "Write it again with megatron-med extend-tokenizer."
        )
    return tuple(tokens)


def _added_behind(backend: tokenizers.Tokenizer) -> tuple[str, ...]:
    """Added tokens of a ``tokenizer.json`` that stand after its vocabulary, which may hold others itself."""
    pieces = backend.get_vocab_size(with_added_tokens=False)
    added = backend.get_added_tokens_decoder()
    return tuple(added[number].content for number in sorted(added) if number >= pieces)


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
    with file.open("rb"):  # the libraries tell a file without permission as one of another kind
        pass
