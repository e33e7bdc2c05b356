"""A tokenizer trained on some text against others, on text it has not seen: words that are one piece, compression.

    python tools/benchmark/compression.py --input abstracts.jsonl [...] --vocab-size 28896 \\
        --against gpt2=encoder.json,vocab.bpe llama2=tokenizer.model

Documents whose id hashes into the last twentieth are held out.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path

from megatron_med.data.jsonl import BadLine, read_lines, text_of
from megatron_med.errors import run_command
from megatron_med.tokenizer import Tokenizer, load_tokenizer
from megatron_med.tokenizer.train import save_tokenizer, train_bpe

WORDS = ("chromatography", "cytotoxicity", "Immunohistochemistry", "photosynthesis", "probiotic")
"""Words that BioMedLM's model card names as single pieces of its tokenizer."""
HELD_OUT = 1 / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=28896)
    parser.add_argument("--against", nargs="*", default=[], metavar="NAME=TOKENIZER")
    arguments = parser.parse_args()
    seen, unseen = _split(arguments.input)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(train_bpe(seen, arguments.vocab_size), Path(folder))
        tokenizers = {"trained": load_tokenizer(folder)}
        for item in arguments.against:
            name, _, path = item.partition("=")
            tokenizers[name] = load_tokenizer(path)
        print(f"trained on {len(seen):,} texts, {sum(map(len, seen)):,} characters; held out: {len(unseen):,} texts\n")
        _print_table(tokenizers, unseen)


def _split(files: list[Path]) -> tuple[list[str], list[str]]:
    seen, unseen = [], []
    for line in read_lines(files):
        try:
            text = text_of(line, "text")
        except BadLine:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        (unseen if int.from_bytes(digest[:8], "big") >= (1 - HELD_OUT) * 2**64 else seen).append(text)
    return seen, unseen


def _print_table(tokenizers: dict[str, Tokenizer], texts: list[str]) -> None:
    words = sum(len(text.split()) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    print(f"| | {' | '.join(tokenizers)} |\n|---|{'---|' * len(tokenizers)}")
    print(f"| pieces | {' | '.join(f'{t.vocab_size:,}' for t in tokenizers.values())} |")
    tokens = [sum(map(len, t.encode_batch(texts))) for t in tokenizers.values()]
    print(f"| tokens of the held-out text | {' | '.join(f'{n:,}' for n in tokens)} |")
    print(f"| bytes per token | {' | '.join(f'{size / n:.2f}' for n in tokens)} |")
    print(f"| tokens per word | {' | '.join(f'{n / words:.3f}' for n in tokens)} |")
    for word in WORDS:
        print(f"| {word} | {' | '.join(_pieces(t, word) for t in tokenizers.values())} |")


def _pieces(tokenizer: Tokenizer, word: str) -> str:
    """Pieces of a word as it stands inside a sentence, with the space in front, and alone: the fewer."""
    both = [tokenizer.encode(f"the {word}")[len(tokenizer.encode("the")) :], tokenizer.encode(word)]
    ids = min(both, key=len)
    return "**one piece**" if len(ids) == 1 else "/".join(tokenizer.decode([token]).strip() for token in ids)


if __name__ == "__main__":
    run_command(main)
