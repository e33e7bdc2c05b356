"""Cleans clinical guidelines written in Markdown or scraped from web pages."""

from __future__ import annotations

import html
import re

from megatron_med.corpus.text import normalize_whitespace, remove_urls

MAX_HEADING_LEVEL = 3

_LINK = re.compile(
    r"!?\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"  # [text](address)
    r"|\[((?:[^\[\]\n])+)\]\[[^\[\]\n]*\]"  # [text][name]
)
_LINK_TARGET = re.compile(r"^[ \t]*\[[^\[\]\n]+\]:[ \t]*\S+.*$", re.MULTILINE)
_TAG = re.compile(
    r"</?(?:a|abbr|article|b|blockquote|br|button|code|div|em|figcaption|figure|font|footer|form|h[1-6]|header|hr|i|iframe"
    r"|img|input|label|li|nav|ol|p|pre|section|small|span|strong|sub|sup|table|tbody|td|th|thead|tr|u|ul)\b[^<>\n]*>",
    re.IGNORECASE,
)
_REFERENCE = re.compile(
    r"(?<!CI )(?<!IQR )(?<!range )\s?\[\s*\d{1,3}(?:\s*[,;–-]\s*\d{1,3})*\s*\](?=\s*[.,;:)]|\s*$)"  # ends a clause
    r"|(?<=[\w.,;)])\[\s*\d{1,3}(?:\s*[,;–-]\s*\d{1,3})*\s*\]"  # stuck to a word
    r"|\[\^[^\]]+\]",
    re.MULTILINE,
)
_BULLET = re.compile(r"^[ \t]*(?:[•◦▪■□◆●○‣⁃·*+]|o(?=\s+[A-Z])|-|–|\uf0b7|\uf0a7)[ \t]+(?=\S)")
_JOINED_ITEMS = re.compile(r"(?<=[.!?;]) - (?=\S)")
_EMPHASIS = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1")
_HEADING = re.compile(r"^(#+)\s*(.*?)\s*#*$")
_RULE = re.compile(r"^[\s=*_|~.-]*$")
_REFERENCE_SECTION = re.compile(
    r"(?:selected |key |further )?(?:references?|bibliography|literature cited|works cited|citations?)[\s:.]*",
    re.IGNORECASE,
)


def clean_guideline(text: str, title: str | None) -> str:
    """A guideline without links, reference marks, reference lists and page furniture.

    Headings are renumbered to begin at one ``#`` and end at three, each after an empty line; every bullet is ``- ``,
    one item a line. ``title`` goes first where the text does not begin with it.
    """
    text = html.unescape(_TAG.sub("", _LINK_TARGET.sub("", text)))
    text = remove_urls(_LINK.sub(lambda match: match.group(1) or match.group(2) or "", text))
    text = _EMPHASIS.sub(r"\2", _REFERENCE.sub("", text))
    lines = _levelled(_without_references(_lines(normalize_whitespace(text))))
    body = normalize_whitespace("\n".join(f"\n{line}" if line.startswith("#") else line for line in lines))
    if not body or not title or body.lstrip("# ").lower().startswith(title.strip().lower()):
        return body
    return f"# {title.strip()}\n\n{body}"


def _lines(text: str) -> list[str]:
    lines = []
    for line in text.split("\n"):
        bullet = _BULLET.sub("- ", line)
        if bullet.startswith("- "):
            lines += [f"- {item.strip()}" for item in _JOINED_ITEMS.split(bullet[2:]) if item.strip()]
        elif line == "" or not _RULE.match(line):
            lines.append(line)
    return lines


def _without_references(lines: list[str]) -> list[str]:
    """Without a references section: from its heading to the next heading of the same or a higher level."""
    kept, dropped_level = [], 0
    for line in lines:
        heading = _HEADING.match(line)
        if heading:
            level = len(heading.group(1))
            if dropped_level and level > dropped_level:
                continue
            dropped_level = level if _REFERENCE_SECTION.fullmatch(heading.group(2)) else 0
        elif _REFERENCE_SECTION.fullmatch(line):  # a bold line that serves as a heading
            dropped_level = MAX_HEADING_LEVEL * 3
        if not dropped_level:
            kept.append(line)
    return kept


def _levelled(lines: list[str]) -> list[str]:
    headings = [heading for heading in map(_HEADING.match, lines) if heading and heading.group(2)]
    lowest = min((len(heading.group(1)) for heading in headings), default=1)
    levelled = []
    for line in lines:
        heading = _HEADING.match(line)
        if heading is None:
            levelled.append(line)
        elif heading.group(2):
            level = min(len(heading.group(1)) - lowest + 1, MAX_HEADING_LEVEL)
            levelled.append(f"{'#' * level} {heading.group(2)}")
    return levelled
