"""Trains a byte-level BPE tokenizer, as GPT-2 and BioMedLM have it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers

from megatron_med.errors import ConfigError
from megatron_med.files import write_json, write_text

END_OF_DOCUMENT = "<|endoftext|>"
_BYTES = 256
_LARGEST = 1 << 24


def train_bpe(
    texts: Iterable[str], vocab_size: int, min_frequency: int = 2, show_progress: bool = False
) -> tokenizers.Tokenizer:
    """A byte-level BPE of exactly ``vocab_size`` pieces where the text has that many, the last one <|endoftext|>.

    Args:
        texts: the corpus.
        vocab_size: pieces, the 256 bytes and <|endoftext|> included.
        min_frequency: pairs seen less often are not merged.
        show_progress: bars on standard error.

    Raises:
        ConfigError: ``vocab_size`` does not hold the bytes.
    """
    if vocab_size <= _BYTES:
        raise ConfigError(f"--vocab-size is {vocab_size}: the 256 bytes and {END_OF_DOCUMENT} need at least 257.")
    if vocab_size > _LARGEST:
        raise ConfigError(f"--vocab-size is {vocab_size}: at most {_LARGEST} pieces are possible.")
    if not 0 <= min_frequency <= _LARGEST:
        raise ConfigError(f"--min-frequency is {min_frequency}: it must lie from 0 to {_LARGEST}.")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Writes ``tokenizer.json`` and the ``tokenizer_config.json`` that Hugging Face reads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "bos_token": END_OF_DOCUMENT,
        "unk_token": END_OF_DOCUMENT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)
