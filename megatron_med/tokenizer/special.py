"""The tokens that Meditron adds to Llama-2's vocabulary (Chen et al. 2023, arXiv 2311.16079), and those that BioMedLM's
fine-tuning adds to its own (stanford-crfm/BioMedLM), in their fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_med.errors import ConfigError
from megatron_med.files import write_json
from megatron_med.tokenizer.load import ADDED_TOKENS, HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer

CORPUS_TOKENS = (
    *("[bib_ref]", "[/bib_ref]", "[fig_ref]", "[/fig_ref]", "[bib]", "[/bib]"),
    *("[fig]", "[/fig]", "[table]", "[/table]", "[formula]", "[/formula]"),
)
"""What the corpus builder writes into papers: 32,000 pieces become 32,012."""

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
"""ChatML's message borders, after the corpus tokens: 32,014."""

HEAD_TOKENS = ("[PAD]", "[CLS]", "[SEP]")
"""BioMedLM's for heads: [SEP] stands behind both parts of an input; 28,896 pieces become 28,899."""

SUMMARY_TOKENS = ("[PAD]", "<|startoftext|>")
"""BioMedLM's for summaries: the summary begins behind <|startoftext|>."""

TOKEN_SETS = {
    "gap_replay": CORPUS_TOKENS,
    "chatml": CHAT_TOKENS,
    "biomedlm_heads": HEAD_TOKENS,
    "biomedlm_summary": SUMMARY_TOKENS,
}
"""Names for the command line."""


def tokens_of(sets: Sequence[str]) -> tuple[str, ...]:
    """The tokens of named sets, in order.

    Raises:
        ConfigError: no set of that name.
    """
    unknown = [name for name in sets if name not in TOKEN_SETS]
    if unknown:
        raise ConfigError(f"there is no token set {', '.join(unknown)}: there are {', '.join(TOKEN_SETS)}.")
    return tuple(token for name in sets for token in TOKEN_SETS[name])


def refuse_source(path: str | Path, output: Path) -> None:
    """Raises ConfigError where a tokenizer would be written over itself."""
    if output.is_dir() and any(file.resolve().parent == output.resolve() for file in load_tokenizer(path).files):
        raise ConfigError(f"{output} is the folder of {path}: name another output.")


def extend_tokenizer(path: str | Path, tokens: Sequence[str], output: Path) -> int:
    """Writes a tokenizer folder with tokens after the vocabulary, and returns its new size.

    Args:
        path: as ``load_tokenizer`` takes it.
        tokens: in the order of their ids.
        output: new folder that ``load_tokenizer`` and Hugging Face read.

    Raises:
        ConfigError: a token is there already.
    """
    tokenizer = load_tokenizer(path)
    again = [token for token in tokens if token in tokenizer.added_tokens]
    twice = sorted({token for token in tokens if tokens.count(token) > 1})
    if again or twice or not tokens:
        fault = f"{path} has {', '.join(again)} already." if again else f"named twice: {', '.join(twice)}."
        raise ConfigError(fault if again or twice else "no token to add was named.")
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.copy_to(output)
        _write_added_tokens(tokenizer, (*tokenizer.added_tokens, *tokens), output)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save_with(tokens, output)
    return load_tokenizer(output).vocab_size


def _write_added_tokens(tokenizer: SentencePieceTokenizer, tokens: Sequence[str], folder: Path) -> None:
    """``added_tokens.json``, which we read, and ``tokenizer_config.json``, which Hugging Face reads."""
    first = tokenizer.vocab_size - len(tokenizer.added_tokens)
    ids = {token: first + number for number, token in enumerate(tokens)}
    _write(folder / ADDED_TOKENS, ids)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    decoder = {str(number): {"content": token, **flags} for token, number in ids.items()}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **named}
    _write(folder / "tokenizer_config.json", {**config, "added_tokens_decoder": decoder})


def _write(path: Path, content: dict[str, object] | dict[str, int]) -> None:
    path.unlink(missing_ok=True)
    write_json(path, content)
