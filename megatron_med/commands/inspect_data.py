"""Shows what a token file holds: counts, lengths, the tokenizer, documents as text, packed samples piece by piece.

megatron-med inspect PREFIX                                     counts
megatron-med inspect PREFIX --document 7                        a document, special tokens in sight
megatron-med inspect PREFIX --sample 0 --sequence-length 2048   what training packs into one sample
megatron-med inspect PREFIX --conversation 7                    a conversation, its trained tokens marked
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable

import numpy as np

from megatron_med.commands.arguments import Parser
from megatron_med.config.schema import DataConfig, DataSource
from megatron_med.data.cache import cache_folder
from megatron_med.data.gpt import PackedDataset
from megatron_med.data.indexed import IndexedDataset
from megatron_med.data.instruct import ConversationStream, open_conversations
from megatron_med.data.sources import read_side_file, recorded_tokenizer, roles_prefix
from megatron_med.data.streams import is_conversations
from megatron_med.errors import ConfigError, DataError
from megatron_med.tokenizer import Tokenizer, load_tokenizer
from megatron_med.tokenizer.chat import ANSWER, SHARED
from megatron_med.words import counted

_IDS_SHOWN = 64
_EXCERPT = 160
_TRAINED = ("[[{}]]", "\x1b[32m{}\x1b[0m")
_REVERSED = "\x1b[7m{}\x1b[0m"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="PREFIX of .bin and .idx")
    parser.add_argument("--document", type=int, help="print this document's ids and text")
    parser.add_argument("--conversation", type=int, help="print this conversation; what is trained stands in [[ ]]")
    parser.add_argument("--sample", type=int, help="print the pieces of this sample of the first epoch and on")
    parser.add_argument("--sequence-length", type=int, help="tokens of a sample")
    parser.add_argument("--seed", type=int, default=1234, help="train.seed of the run (default 1234)")
    parser.add_argument("--tokenizer", help="for a prefix without a side file")
    arguments = parser.parse_args()
    data = IndexedDataset(arguments.prefix)
    if arguments.document is None and arguments.sample is None and arguments.conversation is None:
        _print_summary(data)
        return
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else recorded_tokenizer(data.prefix)
    if arguments.document is not None:
        _print_document(data, arguments.document, tokenizer)
    if arguments.conversation is not None:
        _print_conversation(data, arguments.conversation, tokenizer)
    if arguments.sample is not None:
        if not arguments.sequence_length:
            raise ConfigError("--sample needs --sequence-length: how many tokens a sample has.")
        show = _print_packed_conversations if is_conversations(data.prefix) else _print_sample
        show(data, arguments.sample, arguments.sequence_length, arguments.seed, tokenizer)


def _print_summary(data: IndexedDataset) -> None:
    print(f"{data.prefix}: {counted(len(data), 'document')}, {counted(data.token_count, 'token')}, {data.dtype.name}")
    if len(data):
        low, middle, high = np.percentile(data.sizes, [0, 50, 100]).astype(int)
        print(f"tokens per document: {low:,} to {high:,}, median {middle:,}")
    side = read_side_file(data.prefix)
    if side is None:
        print("no side file: the tokenizer is not recorded")
        return
    tokenizer = side["tokenizer"]
    print(
        f"tokenizer: {tokenizer['paths'][0]}, {tokenizer['vocab_size']:,} pieces, end of document {tokenizer['eod_id']}"
    )
    if "chat" in side:
        print(
            f"conversations: template {side['chat']['template']}, {side['trained']:,} trained tokens "
            f"({100 * side['trained'] / max(1, data.token_count):.1f} %), {side['answers']:,} answers"
        )
    if tokenizer.get("added_tokens"):
        print(f"added tokens: {' '.join(tokenizer['added_tokens'])}")


def _print_document(data: IndexedDataset, document: int, tokenizer: Tokenizer | None) -> None:
    if not 0 <= document < len(data):
        raise DataError(f"--document is {document}: {data.prefix} has documents 0 to {len(data) - 1}.")
    ids = data.read(document)
    print(f"document {document}: {counted(len(ids), 'token')}")
    print(" ".join(map(str, ids[:_IDS_SHOWN].tolist())) + (" ..." if len(ids) > _IDS_SHOWN else ""))
    if tokenizer is None:
        print("give --tokenizer to see the text")
    else:
        print(tokenizer.decode_visibly(ids.tolist(), _mark()))


def _print_conversation(data: IndexedDataset, number: int, tokenizer: Tokenizer | None) -> None:
    if not is_conversations(data.prefix):
        raise DataError(f"{data.prefix} holds text, no conversations: --document shows it.")
    if not 0 <= number < len(data):
        raise DataError(f"--conversation is {number}: {data.prefix} has conversations 0 to {len(data) - 1}.")
    if tokenizer is None:
        raise DataError(f"{data.prefix} records no tokenizer: give --tokenizer.")
    ids, roles = data.read(number).tolist(), IndexedDataset(roles_prefix(data.prefix)).read(number).tolist()
    counts = {name: roles.count(kind) for name, kind in (("trained", ANSWER), ("trained elsewhere", SHARED))}
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    print(f"conversation {number}: {counted(len(ids), 'token')}, {told}")
    print(_marked(ids, roles, tokenizer))


def _marked(ids: list[int], roles: list[int], tokenizer: Tokenizer) -> str:
    """Text with what is trained in ``[[ ]]``, reversed on a terminal."""
    pieces, begin = [], 0
    for kind, run in itertools.groupby(roles):
        end = begin + len(list(run))
        before, through = (tokenizer.decode_visibly(ids[:stop]) for stop in (begin, end))
        text = through[len(before) :] if through.startswith(before) else tokenizer.decode_visibly(ids[begin:end])
        pieces.append(_TRAINED[sys.stdout.isatty()].format(text) if kind == ANSWER else text)
        begin = end
    return "".join(pieces)


def _print_packed_conversations(
    data: IndexedDataset, sample: int, length: int, seed: int, tokenizer: Tokenizer | None
) -> None:
    options = DataConfig(sequence_length=length, truncate="drop")
    cache = cache_folder(None)
    stream = ConversationStream(
        [open_conversations(data.prefix, options, cache)], [DataSource(str(data.prefix))], options, seed, cache
    )
    if sample < 0:
        raise DataError(f"--sample is {sample}: samples are counted from 0.")
    epoch, place = stream.locate(sample)
    parts, mask = stream.parts(sample), stream.sample(sample).loss_mask
    used = sum(int(data.sizes[number]) for _, number in parts)
    print(
        f"sample {sample} of {length} tokens: epoch {epoch}, place {place}, {len(parts)} conversations, "
        f"{max(0, length + 1 - used)} tokens of padding, {int(mask.sum())} trained"
    )
    for _, number in parts:
        _print_conversation(data, number, tokenizer)


def _print_sample(data: IndexedDataset, sample: int, length: int, seed: int, tokenizer: Tokenizer | None) -> None:
    packed = PackedDataset(data, length, seed, cache_folder(None))
    if sample < 0:
        raise DataError(f"--sample is {sample}: samples are counted from 0.")
    epoch, place = divmod(sample, packed.samples_per_epoch)
    parts = packed.parts(sample)
    print(
        f"sample {sample} of {length} tokens: epoch {epoch}, place {place} of {packed.samples_per_epoch}, "
        f"{len(parts)} documents or parts of documents (one token more is read as the last label)"
    )
    begin = 0
    for document, start, ids in parts:
        whole = len(data.read(document))
        print(
            f"tokens {begin} to {begin + len(ids) - 1}: document {document}, its tokens {start} to "
            f"{start + len(ids) - 1} of {whole}"
        )
        if tokenizer is not None:
            text = tokenizer.decode_visibly(ids.tolist(), _mark())
            shown = text if len(text) <= 2 * _EXCERPT else f"{text[:_EXCERPT]} ... {text[-_EXCERPT:]}"
            print("    " + shown.replace("\n", "\n    "))
        begin += len(ids)


def _mark() -> Callable[[str], str]:
    """Special tokens are reversed on a terminal and «quoted» elsewhere."""
    return (_REVERSED if sys.stdout.isatty() else "«{}»").format
