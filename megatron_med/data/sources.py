"""Opens the corpora of a configuration, and the side files that tell how they were tokenized."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_med.config.schema import DataConfig, DataSource
from megatron_med.data.blend import BlendedDataset
from megatron_med.data.gpt import PackedDataset
from megatron_med.data.indexed import MAGIC, IndexedDataset, token_paths
from megatron_med.errors import DataError, TargetExistsError
from megatron_med.files import sha256, write_json
from megatron_med.outputs import refuse_existing
from megatron_med.tokenizer import Tokenizer, describe_difference, load_tokenizer


def side_file(prefix: str | Path) -> Path:
    """``prefix.json``."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".json")


def roles_prefix(prefix: str | Path) -> Path:
    """Prefix of the file that says, a byte a token, what each token of a conversation is."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".roles")


def refuse_token_files(prefix: Path, overwrite: bool, reads: Sequence[Path] = (), roles: bool = False) -> None:
    """Refuses to write token files over anything but token files.

    Args:
        prefix: of ``.bin``, ``.idx`` and ``.json``.
        overwrite: token files of an earlier run may be replaced.
        reads: files that are read meanwhile.
        roles: the roles of conversations are written beside them.

    Raises:
        TargetExistsError: a target is there already, is no token file, or is one of ``reads``.
    """
    files = [*token_paths(prefix), *(token_paths(roles_prefix(prefix)) if roles else ()), side_file(prefix)]
    read = {file.resolve() for file in reads}
    for file in files:
        if file.resolve() in read:
            raise TargetExistsError(f"{file} would be written, and is read: name another --output-prefix.")
        if file.is_file() and not _is_token_file(file):
            raise TargetExistsError(f"{file} is there and is no file of token data: name another --output-prefix.")
        refuse_existing(file, overwrite)


def _is_token_file(file: Path) -> bool:
    """Whether a tool of this kind has written a file, as far as its beginning tells; a ``.bin`` has an index."""
    if file.suffix == ".json":
        try:
            return _is_ours(json.loads(file.read_text(encoding="utf-8")))
        except ValueError:
            return False
    index = file.with_suffix(".idx")
    if not index.is_file():
        return False
    with index.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def write_side_file(prefix: Path, tokenizer: Tokenizer, counts: dict[str, Any]) -> None:
    """Records the tokenizer (files relative to the data, with their hashes) and the counts beside the data."""
    folder = side_file(prefix).parent.resolve()
    described = tokenizer.describe()
    described["paths"] = [os.path.relpath(file.resolve(), folder) for file in tokenizer.files]
    content = {"version": 1, "tokenizer": described, **counts}
    write_json(side_file(prefix), content)


def read_side_file(prefix: str | Path) -> dict[str, Any] | None:
    """What is recorded beside the data; None for a foreign prefix without a side file."""
    path = side_file(prefix)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if _is_ours(content) else None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}. Tokenize again, or remove it and set data.tokenizer.") from error


def _is_ours(content: Any) -> bool:
    """Whether a JSON file beside the data is a side file; another tool may have left one of its own."""
    tokenizer = content.get("tokenizer") if isinstance(content, dict) else None
    return isinstance(tokenizer, dict) and {"paths", "files", "vocab_size", "fingerprint"} <= tokenizer.keys()


def recorded_tokenizer(prefix: str | Path) -> Tokenizer | None:
    """The tokenizer a corpus was made with; None where none is recorded.

    Raises:
        DataError: its files are gone or changed.
    """
    side = read_side_file(prefix)
    if side is None:
        return None
    described = side["tokenizer"]
    files = [side_file(prefix).parent / path for path in described["paths"]]
    for file, checksum in zip(files, described["files"].values(), strict=True):
        if not file.is_file():
            raise DataError(
                f"{side_file(prefix)} names the tokenizer file {file}, which is not there. Set "
                "data.tokenizer (tools: --tokenizer)."
            )
        if sha256(file) != checksum:
            raise DataError(
                f"{file} is not the file that {prefix} was tokenized with (its sha256 differs). Set data.tokenizer, "
                "or tokenize again."
            )
    pair = files[0].suffix == ".json" and len(files) > 1 and files[1].suffix == ".txt"
    return load_tokenizer(f"{files[0]},{files[1]}" if pair else files[0])


def find_tokenizer(sources: Sequence[DataSource], override: str | None, vocab_size: int) -> Tokenizer | None:
    """The run's tokenizer: ``override``, else the one recorded beside the data, the same for all corpora.

    Raises:
        DataError: corpora of different tokenizers, or one whose ids go past the model's vocabulary.
    """
    tokenizer = load_tokenizer(override) if override else None
    for source in sources:
        recorded = read_side_file(source.path)
        if recorded is None:
            continue
        tokenizer = tokenizer or recorded_tokenizer(source.path)
        assert tokenizer is not None, "a side file names a tokenizer"
        theirs, ours = recorded["tokenizer"], tokenizer.describe()
        difference = describe_difference(theirs, ours)
        if difference:
            raise DataError(
                f"{source.path} was made with another tokenizer ({theirs['paths'][0]}) than the run uses "
                f"({tokenizer.files[0]}): {difference}. Tokenize all corpora with one."
            )
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"The tokenizer {tokenizer.files[0]} has {tokenizer.vocab_size} pieces and model.vocab_size is "
            f"{vocab_size}: set model.vocab_size: {tokenizer.vocab_size}."
        )
    return tokenizer


def open_corpora(
    sources: Sequence[DataSource], data: DataConfig, seed: int, vocab_size: int, cache: Path
) -> list[PackedDataset]:
    """Opens and checks every corpus.

    Raises:
        DataError: with the faults of all of them.
    """
    corpora, faults = [], []
    for source in sources:
        try:
            tokens = IndexedDataset(source.path)
            side = read_side_file(source.path)
            tokens.check_vocabulary(side["tokenizer"]["vocab_size"] if side else vocab_size)
            corpora.append(PackedDataset(tokens, data.sequence_length, seed, cache, data.isolate_documents))
        except DataError as error:
            faults += error.faults
    if faults:
        raise DataError(faults)
    return corpora


def blend(corpora: Sequence[PackedDataset], sources: Sequence[DataSource], samples: int, cache: Path) -> BlendedDataset:
    """The corpora as one stream."""
    return BlendedDataset(corpora, [source.weight for source in sources], samples, cache)


def one_pass(corpora: Sequence[PackedDataset], sources: Sequence[DataSource]) -> int:
    """Samples that can be drawn before some corpus would repeat."""
    total = sum(source.weight for source in sources)
    return min(int(c.samples_per_epoch * total / s.weight) for c, s in zip(corpora, sources, strict=True))
