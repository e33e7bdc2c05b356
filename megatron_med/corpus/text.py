"""Cleaning that every source shares: URLs out, white space normalised, special-token strings left as text."""

from __future__ import annotations

import re
import unicodedata

from megatron_med.tokenizer.special import CORPUS_TOKENS

_URL = re.compile(
    r"(?:\b(?:https?|ftp)://|\bwww\.(?=\w))[^\s<>\[\]()\"'|]*(?:\([^\s()]*\)[^\s<>\[\]()\"'|]*)*", re.IGNORECASE
)
_TRAILING = ".,;:!?"
_HOLE = "\ue003"  # stands where an address was, until the brackets around it are looked at (private use)
_EMPTY_BRACKETS = re.compile(
    rf"[(\[<]\s*(?:(?:available\s+)?(?:at|from|see|via)\s*:?\s*)?{_HOLE}\s*[)\]>]", re.IGNORECASE
)
_DANGLING = re.compile(rf"\s*[,;:]\s*{_HOLE}\s*\)")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SPECIAL = re.compile("|".join(re.escape(token) for token in CORPUS_TOKENS))
_LAYOUT = re.compile(r"[\W_]+")
_SPACES = re.compile(r"[^\S\n]+")
_BLANK_LINES = re.compile(r"\n{3,}")


def remove_urls(text: str) -> str:
    """Text without web addresses and without the brackets that held nothing else; a closing full stop stays."""
    without = _URL.sub(_hole, text.replace(_HOLE, " "))
    if _HOLE not in without:
        return text
    without = _EMPTY_BRACKETS.sub("", without)
    return _DANGLING.sub(")", without).replace(_HOLE, "")


def _hole(match: re.Match[str]) -> str:
    address = match.group()
    return _HOLE + address[len(address.rstrip(_TRAILING)) :]


def escape_special_tokens(text: str) -> str:
    """Raw text in which ``[table]`` is an ordinary word: round brackets in place of square ones, same length.

    Only a formatter of this package writes the corpus tokens, so that whatever stands in its output was meant.
    """
    return _SPECIAL.sub(lambda match: f"({match.group()[1:-1]})", text) if "[" in text else text


def normalize_characters(text: str) -> str:
    """NFC, one kind of line end, no control or invisible characters; spaces stay as they are."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    return _INVISIBLE.sub("", unicodedata.normalize("NFC", text.replace("\x85", "\n")))


def normalize_whitespace(text: str) -> str:
    """``normalize_characters``, one space between words, at most one blank line between paragraphs."""
    text = _SPACES.sub(" ", normalize_characters(text))
    lines = [line.strip(" ") for line in text.split("\n")]
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()


def normalized_key(text: str) -> str:
    """Letters and digits only, in lower case and NFKC: equal for texts that differ in layout alone."""
    return _LAYOUT.sub("", unicodedata.normalize("NFKC", text).lower())
