"""Tokenizers: SentencePiece, Hugging Face ``tokenizer.json``, GPT-2 vocabulary and merges; BPE training."""

from megatron_med.tokenizer.load import Tokenizer, describe_difference, load_tokenizer

__all__ = ["Tokenizer", "describe_difference", "load_tokenizer"]
