"""Every tokenizer of the shared data as a folder that has ChatML's and Llama-3's tokens."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from megatron_med.tokenizer.special import CHAT_TOKENS, extend_tokenizer

NAMES = ("llama2", "mistral_v1", "mistral_v3", "gpt2", "llama3")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def chat_tokenizer(name: str, shared: Path, folder: Path) -> Path:
    """A folder that ``load_tokenizer`` reads."""
    source = shared / "tokenizers"
    if name == "llama3":
        _write_llama3(source / "llama3_tokenizer.model", folder / "plain")
    elif name == "gpt2":
        (folder / "plain").mkdir(parents=True)
        shutil.copy(source / "gpt2_encoder.json", folder / "plain" / "vocab.json")
        shutil.copy(source / "gpt2_vocab.bpe", folder / "plain" / "merges.txt")
        _configure(folder / "plain", "GPT2Tokenizer", "<|endoftext|>", "<|endoftext|>")
    plain = source / f"{name}_tokenizer.model" if name not in ("llama3", "gpt2") else folder / "plain"
    extend_tokenizer(plain, (*CHAT_TOKENS, *(LLAMA3_TOKENS if name != "llama3" else ())), folder / "chat")
    return folder / "chat"


def _configure(folder: Path, kind: str, bos: str, eos: str) -> None:
    content = {"tokenizer_class": kind, "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def _write_llama3(ranks_file: Path, folder: Path) -> None:
    """Byte-level BPE from ranks: a token's last merge joins the two parts that lower ranks leave of it."""
    pairs = (line.split() for line in ranks_file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    letters = _byte_letters()
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(parts[at] + parts[at + 1], rank) for at in range(len(parts) - 1)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(tuple("".join(letters[byte] for byte in part) for part in parts))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in LLAMA3_TOKENS])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    _configure(folder, "PreTrainedTokenizerFast", "<|begin_of_text|>", "<|end_of_text|>")


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for every byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
