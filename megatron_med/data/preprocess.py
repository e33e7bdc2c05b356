"""Turns text into token files, on many processes. A killed run goes on where it stopped."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_med.data.indexed import smallest_dtype
from megatron_med.data.indexed_writer import ColumnsWriter
from megatron_med.data.jsonl import BadLine, Line, Shard, check_inputs, text_of
from megatron_med.data.pipeline import Encoded, write_encoded
from megatron_med.data.records import spans_of
from megatron_med.data.sources import refuse_token_files, write_side_file
from megatron_med.errors import ConfigError, DataError
from megatron_med.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class PreprocessOptions:
    """What ``megatron-med preprocess`` is asked for.

    Attributes:
        inputs: files of records, of any kind that ``records`` reads.
        output_prefix: of ``.bin``, ``.idx`` and ``.json``.
        tokenizer: as ``load_tokenizer`` takes it.
        workers: processes.
        append_eod: end each document with the end-of-document id.
        json_key: field that holds the text.
        markup: added tokens that are read as such where they stand in the text; all else stays text.
        skip_bad_lines: leave out lines without usable text, and count them.
        shard: the part of the input that is read.
        overwrite: replace existing files.
    """

    inputs: list[Path]
    output_prefix: Path
    tokenizer: str
    workers: int = 1
    append_eod: bool = False
    json_key: str = "text"
    markup: tuple[str, ...] = ()
    skip_bad_lines: bool = False
    shard: Shard = field(default_factory=Shard)
    overwrite: bool = False


@dataclass
class PreprocessSummary:
    """What was written.

    Attributes:
        words: between white space.
        skipped: number of lines left out, by reason.
        resumed_at: documents that an earlier run had written.
    """

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    words: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    resumed_at: int = 0


def preprocess(options: PreprocessOptions) -> PreprocessSummary:
    """Tokenizes every document in order and writes ``prefix.bin``, ``.idx`` and ``.json``.

    Raises:
        DataError: an input is missing or a line is bad (file and line number are named); nothing is written.
        TargetExistsError: the output exists.
    """
    check_inputs(options.inputs)
    if options.workers < 1:
        raise ConfigError(f"--workers is {options.workers}: at least 1 process is needed.")
    prefix = options.output_prefix
    tokenizer = load_tokenizer(options.tokenizer)
    refuse_token_files(prefix, options.overwrite, [*options.inputs, *tokenizer.files])
    eod = _end_of_document(tokenizer, options)
    dtype = smallest_dtype(tokenizer.vocab_size)
    encoding = _TextEncoding(options.tokenizer, options.json_key, options.markup, eod, np.dtype(dtype).str)
    spans = spans_of(options.inputs, options.shard)
    with ColumnsWriter([(prefix, dtype)], _ingredients(options, tokenizer)) as writer:
        written = write_encoded(writer, encoding, spans, options.workers, options.skip_bad_lines, "--skip-bad-lines")
        if writer.documents == 0 and options.shard.count == 1:
            raise DataError(f"{', '.join(map(str, options.inputs))}: no document with text. Nothing was written.")
    summary = PreprocessSummary(
        documents=written.documents,
        tokens=written.tokens,
        characters=written.counts["characters"],
        words=written.counts["words"],
        skipped=written.skipped,
        resumed_at=written.resumed_at,
    )
    counts = {name: getattr(summary, name) for name in ("documents", "tokens", "characters", "words")}
    write_side_file(prefix, tokenizer, {**counts, "append_eod": options.append_eod, "markup": list(options.markup)})
    return summary


def _ingredients(options: PreprocessOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that the token files depend on."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in options.inputs]
    named = {name: getattr(options, name) for name in ("append_eod", "json_key", "markup", "skip_bad_lines")}
    return {"inputs": files, "tokenizer": tokenizer.describe(), "shard": asdict(options.shard), **named}


def _end_of_document(tokenizer: Tokenizer, options: PreprocessOptions) -> int | None:
    if not options.append_eod:
        return None
    if tokenizer.eod_id is None:
        raise DataError(
            f"--append-eod: {options.tokenizer} has no end-of-document token (such as <|endoftext|> or </s>). "
            "Leave the option out, or add the token to the tokenizer."
        )
    return tokenizer.eod_id


@dataclass(frozen=True)
class _TextEncoding:
    """From lines of text to ids."""

    tokenizer: str
    json_key: str
    markup: tuple[str, ...]
    eod: int | None
    dtype: str

    def load(self) -> Callable[[Sequence[Line]], Encoded]:
        tokenizer = load_tokenizer(self.tokenizer)
        return lambda lines: self._encode(tokenizer, lines)

    def _encode(self, tokenizer: Tokenizer, lines: Sequence[Line]) -> Encoded:
        texts, faults = [], []
        for line in lines:
            try:
                texts.append(text_of(line, self.json_key))
            except BadLine as error:
                faults.append((line.offset, str(error)))
        ids = tokenizer.encode_markup_batch(texts, self.markup) if self.markup else tokenizer.encode_batch(texts)
        if self.eod is not None:
            for document in ids:
                document.append(self.eod)
        sizes = np.fromiter(map(len, ids), np.int32, len(ids))
        stored = np.fromiter(itertools.chain.from_iterable(ids), self.dtype, int(sizes.sum(dtype=np.int64)))
        words = sum(len(text.split()) for text in texts)
        counts = {"characters": sum(map(len, texts)), "words": words}
        return Encoded((stored.tobytes(),), sizes, counts, faults)
