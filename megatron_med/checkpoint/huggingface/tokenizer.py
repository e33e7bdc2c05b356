"""The tokenizer of an exported folder, as transformers and the servers built on it read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_med.files import write_json, write_text
from megatron_med.tokenizer import Tokenizer
from megatron_med.tokenizer.fast import fast_tokenizer
from megatron_med.tokenizer.load import SentencePieceTokenizer


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, longest: int, chat: dict[str, Any] | None, pad: int | None = None
) -> None:
    """Writes the tokenizer's files, and what they leave open.

    Args:
        folder: of the export.
        tokenizer: of the model.
        longest: sequence that the model takes.
        chat: ``chat_template, turn_end_id`` of the conversations that the model was trained on.
        pad: id that fills texts of a batch up, where the model classifies.
    """
    tokenizer.copy_to(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        fast = fast_tokenizer(tokenizer)
        if fast is not None:
            write_text(folder / "tokenizer.json", fast.to_str(pretty=True))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else _described(folder)
    config["model_max_length"] = longest
    if isinstance(tokenizer, SentencePieceTokenizer) and "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = _control_tokens(tokenizer) | config["added_tokens_decoder"]
    if pad is not None:
        config["pad_token"] = tokenizer.special_tokens()[pad]
    if chat is not None:
        config["chat_template"] = chat["chat_template"]
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # of the model before; it would win
        if "legacy" in config:
            config["legacy"] = False  # texts behind special tokens are no texts of their own
    write_json(path, config, ensure_ascii=False)


def padding_of(tokenizer: Tokenizer) -> int | None:
    """The id that fills texts up: [PAD] where there is one, else the end of a document, which ends no text here."""
    named = {name: number for number, name in tokenizer.special_tokens().items()}
    return named.get("[PAD]", tokenizer.eod_id)


def generation_config(tokenizer: Tokenizer | None, chat: dict[str, Any] | None) -> dict[str, Any]:
    """Where generation begins and ends: at the turn-end token of the conversations, where there were some."""
    end = tokenizer.eod_id if tokenizer else None
    return {
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": chat["turn_end_id"] if chat is not None else end,
    }


def _control_tokens(tokenizer: SentencePieceTokenizer) -> dict[str, dict[str, Any]]:
    """What transformers reads in the model itself where it is not told of any added token."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {str(number): {"content": name, **flags} for number, name in tokenizer.special_tokens().items()}


def _described(folder: Path) -> dict[str, Any]:
    """What a bare SentencePiece model or GPT-2 vocabulary is."""
    if (folder / "tokenizer.model").exists():
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True, **tokens}
    if (folder / "merges.txt").exists():
        return {
            "tokenizer_class": "GPT2Tokenizer",
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        }
    return {}
