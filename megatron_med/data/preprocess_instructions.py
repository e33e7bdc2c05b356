"""Turns instruction data into token files with the trained tokens beside them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_med.data.conversations import Form, conversations_of, find_first_option, form_of, record_of
from megatron_med.data.indexed import smallest_dtype
from megatron_med.data.indexed_writer import ColumnsWriter
from megatron_med.data.jsonl import BadLine, Line, Shard, check_inputs
from megatron_med.data.pipeline import Encoded, Summary, write_encoded
from megatron_med.data.records import read_records, spans_of
from megatron_med.data.sources import refuse_token_files, roles_prefix, write_side_file
from megatron_med.errors import DataError
from megatron_med.tokenizer import Tokenizer, load_tokenizer
from megatron_med.tokenizer.chat import ChatEncoder
from megatron_med.tokenizer.template import ChatTemplate, load_template

_ROLE_DTYPE = np.uint8


@dataclass(frozen=True)
class InstructionOptions:
    """What ``megatron-med preprocess-instructions`` is asked for.

    Attributes:
        inputs: files of records; plain, ``.gz`` or ``.zst``.
        output_prefix: of ``.bin``, ``.idx``, ``.json`` and ``.roles.bin``, ``.roles.idx``.
        tokenizer: as ``load_tokenizer`` takes it.
        template: as ``load_template`` takes it.
        form: how records are read.
        workers: processes.
        skip_bad_records: leave out records that cannot be used, and count them.
        shard: the part of the input that is read.
        overwrite: replace existing files.
    """

    inputs: list[Path]
    output_prefix: Path
    tokenizer: str
    template: str
    form: Form = field(default_factory=Form)
    workers: int = 1
    skip_bad_records: bool = False
    shard: Shard = field(default_factory=Shard)
    overwrite: bool = False


def preprocess_instructions(options: InstructionOptions) -> Summary:
    """Encodes every conversation in order. Counts of the summary: ``trained`` tokens, ``answers``.

    Raises:
        DataError: an input, the template or a record (file and number are named) cannot be used; nothing is written.
        TargetExistsError: the output exists.
    """
    check_inputs(options.inputs)
    prefix = options.output_prefix
    tokenizer = load_tokenizer(options.tokenizer)
    refuse_token_files(prefix, options.overwrite, [*options.inputs, *tokenizer.files], roles=True)
    template = load_template(options.template, tokenizer)
    turn_end = ChatEncoder(tokenizer, template).turn_end_id
    options = replace(options, form=_settled(options))
    dtype = smallest_dtype(tokenizer.vocab_size)
    encoding = _ConversationEncoding(options.tokenizer, template, options.form, np.dtype(dtype).str)
    columns: list[tuple[Path, type[np.generic]]] = [(prefix, dtype), (roles_prefix(prefix), _ROLE_DTYPE)]
    with ColumnsWriter(columns, _ingredients(options, tokenizer, template)) as writer:
        spans = spans_of(options.inputs, options.shard)
        summary = write_encoded(
            writer, encoding, spans, options.workers, options.skip_bad_records, "--skip-bad-records"
        )
        if writer.documents == 0 and options.shard.count == 1:
            raise DataError(f"{', '.join(map(str, options.inputs))}: no conversation in it. Nothing was written.")
    chat = {"template": template.name, "chat_template": template.jinja, "turn_end_id": turn_end}
    write_side_file(
        prefix, tokenizer, {"documents": summary.documents, "tokens": summary.tokens, **summary.counts, "chat": chat}
    )
    return summary


def _settled(options: InstructionOptions) -> Form:
    """The form with MedMCQA's way of counting, which only all records together tell."""
    form = options.form
    if form.first_option is not None or form.columns or form.name not in ("auto", "medmcqa"):
        return form
    records = (record_of(line) for line in read_records(spans_of(options.inputs, Shard())) if b'"cop"' in line.content)
    try:
        first = next(records, None)
        if first is None or form_of(first, form) != "medmcqa":
            return form
        return replace(form, first_option=find_first_option(itertools.chain([first], records)))
    except BadLine:
        return form  # told with its place when it is encoded


def _ingredients(options: InstructionOptions, tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, Any]:
    """Everything that the files depend on."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in options.inputs]
    return {
        "inputs": files,
        "tokenizer": tokenizer.describe(),
        "template": template.jinja,
        "form": asdict(options.form),
        "skip_bad_records": options.skip_bad_records,
        "shard": asdict(options.shard),
    }


@dataclass(frozen=True)
class _ConversationEncoding:
    """From records to ids and roles."""

    tokenizer: str
    template: ChatTemplate
    form: Form
    dtype: str

    def load(self) -> Callable[[Sequence[Line]], Encoded]:
        encoder = ChatEncoder(load_tokenizer(self.tokenizer), self.template)
        return lambda lines: self._encode(encoder, lines)

    def _encode(self, encoder: ChatEncoder, lines: Sequence[Line]) -> Encoded:
        ids: list[list[int]] = []
        roles: list[bytes] = []
        faults: list[tuple[int, str]] = []
        trained = answers = 0
        for line in lines:
            try:
                conversations = conversations_of(line, self.form)
                encoded = [encoder.encode(one.messages, one.shared) for one in conversations]
            except BadLine as error:
                faults.append((line.offset, str(error)))
                continue
            except DataError as error:
                faults.append((line.offset, error.faults[0]))
                continue
            for one, conversation in zip(encoded, conversations, strict=True):
                ids.append(one.ids)
                roles.append(one.roles.tobytes())
                trained += one.trained
                rest = conversation.messages[conversation.shared :]
                answers += sum(message["role"] == "assistant" for message in rest)
        sizes = np.fromiter(map(len, ids), np.int32, len(ids))
        stored = np.fromiter(itertools.chain.from_iterable(ids), self.dtype, int(sizes.sum(dtype=np.int64)))
        counts = {"trained": trained, "answers": answers}
        return Encoded((stored.tobytes(), b"".join(roles)), sizes, counts, faults)
