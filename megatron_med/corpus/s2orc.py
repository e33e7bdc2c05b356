"""Formats a paper of the S2ORC bulk format as Meditron's corpus has it (Chen et al. 2023, arXiv 2311.16079, app. B).

The annotations of a record are character spans. Each character belongs to the last layer that covers it; a run of
characters of one span becomes text, a heading, a reference, a caption, a formula, or nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_med.corpus.text import escape_special_tokens, normalize_whitespace, remove_urls
from megatron_med.errors import DataError

REFERENCE_WORDS = 12
"""Words of a title or caption that are repeated where it is referred to."""

MAIN_HEADINGS = (
    *("abstract", "introduction", "background", "related", "method", "material", "result", "analysis", "discussion"),
    *("conclusion", "contribution", "statement", "declaration", "strength", "limitation", "future research"),
    *("funding", "disclosure", "acknowledgment", "ethical", "tables", "figures", "appendix"),
)
"""A heading of at most three words that holds one of these is a section (#); any other is a subsection (##)."""

_LAYERS = (
    *("authorfirstname", "authorlastname", "authoraffiliation", "bibentry", "formula", "sectionheader"),
    *("bibref", "figureref", "tableref", "figure"),
)
_READ = (*_LAYERS, "abstract", "paragraph", "bibtitle", "bibauthorlastname", "figurecaption")
_LATEX_DOCUMENT = re.compile(r"\\documentclass.*?\\begin\{document\}(.*?)\\end\{document\}", re.DOTALL)
_ACKNOWLEDGEMENT = re.compile(r"(?:\d[\d.]*\s+)?acknowledge?ments?\b[\s:.]*", re.IGNORECASE)
_OPEN, _CLOSE = "\ue000", "\ue001"  # brackets of special tokens while the text is worked on (private use)
_HOLE = "\ue002"  # stands where a reference was, until the brackets around it are looked at
_PRIVATE_USE = str.maketrans(dict.fromkeys(_OPEN + _CLOSE + _HOLE, " "))
_CITED = rf"{_OPEN}bib_ref{_CLOSE}[^{_OPEN}]*{_OPEN}/bib_ref{_CLOSE}"
_CITED_LIST = rf"{_CITED}(?:[\s,;–{_HOLE}-]*{_CITED})*"


@dataclass
class _Run:
    """Characters of one span, or of no span (``kind`` text)."""

    kind: str
    start: int
    text: str
    span: dict[str, Any] = field(default_factory=dict)


class Paper:
    """The text of a record with its annotations.

    Args:
        record: one object of the S2ORC bulk files.
        place: file and line, for messages.

    Raises:
        DataError: the record is not of that schema; names the field and the line.
    """

    def __init__(self, record: dict[str, Any], place: str) -> None:
        content = record.get("content")
        if not isinstance(content, dict):
            raise DataError(f"{place}: 'content' is {type(content).__name__}, not an S2ORC object with 'text'.")
        text = content.get("text")
        if text is not None and not isinstance(text, str):
            raise DataError(f"{place}: 'content.text' is {type(text).__name__}, not text.")
        self.text = (text or "").translate(_PRIVATE_USE)
        annotations = content.get("annotations") or {}
        if not isinstance(annotations, dict):
            raise DataError(f"{place}: 'content.annotations' is {type(annotations).__name__}, not an object.")
        self._spans = {name: self._read_spans(annotations.get(name), name, place) for name in _READ}

    def _read_spans(self, value: Any, name: str, place: str) -> list[dict[str, Any]]:
        where = f"{place}: 'content.annotations.{name}'"
        if value is None:
            return []
        try:
            spans = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error}.") from error
        if not isinstance(spans, list):
            raise DataError(f"{where} is {type(spans).__name__}, not a list of spans.")
        result = []
        for span in spans:
            try:
                start, end = int(span["start"]), int(span["end"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{where} has a span without whole numbers 'start' and 'end'.") from error
            attributes = span.get("attributes") or {}
            if not isinstance(attributes, dict):
                raise DataError(f"{where} has 'attributes' of type {type(attributes).__name__}, not an object.")
            if 0 <= start < end <= len(self.text):  # the bulk files hold a few empty and reversed spans
                result.append({"start": start, "end": end, "attributes": attributes})
        return result

    def _inside(self, name: str, outer: dict[str, Any]) -> dict[str, Any] | None:
        """The first span of an annotation within another span."""
        return next((s for s in self._spans[name] if s["start"] >= outer["start"] and s["end"] <= outer["end"]), None)

    def _named(self, name: str, identifier: str | None) -> dict[str, Any] | None:
        return next((s for s in self._spans[name] if s["attributes"].get("id") == identifier), None)

    def _slice(self, span: dict[str, Any]) -> str:
        return self.text[span["start"] : span["end"]]

    def citation(self, identifier: str | None) -> str | None:
        """``title (at most 12 words), last name`` of a bibliography entry; None where either is unknown."""
        entry = self._named("bibentry", identifier)
        title = self._inside("bibtitle", entry) if entry else None
        author = self._inside("bibauthorlastname", entry) if entry else None
        if title is None or author is None:
            return None
        return f"{_first_words(self._slice(title))}, {self._slice(author)}"

    def caption(self, identifier: str | None, shorten: bool) -> tuple[str, str] | None:
        """``("Figure 2: ", caption)`` of a figure or table; None where it has none."""
        figure = self._named("figure", identifier)
        caption = self._inside("figurecaption", figure) if figure else None
        if figure is None or caption is None:
            return None
        heading = self.text[figure["start"] : caption["start"]].split("\n")
        prefix = heading[1] if len(heading) > 1 else ""
        name = re.sub(r"[:()]", "", prefix.replace(" .", " ")).replace("Fig.", "Figure").replace("Tab.", "Table")
        name = name.replace(" Figure", ", Figure").strip()
        text = self._slice(caption)
        text = (text.replace(prefix, "") if prefix else text).strip()
        if shorten:
            text = _first_words(re.split(r"[.;:()]", text)[0] if len(text) > 20 else text)
        number, _, rest = text.partition(" ")
        if number.isdigit():
            name, text = f"{name} {number}", rest.strip()
        text = text.lstrip(".,) ")
        return (f"{name}: " if name else "", text) if text else None

    def body_start(self) -> int:
        """Where abstract, headings and paragraphs begin; what stands before is the header of the paper."""
        names = ("abstract", "sectionheader", "paragraph")
        return min((span["start"] for name in names for span in self._spans[name]), default=0)

    def body_end(self) -> int:
        """Where the last paragraph ends."""
        return max((span["end"] for span in self._spans["paragraph"]), default=0)

    def runs(self) -> Iterator[_Run]:
        """The paper from the end of its header on, cut where the kind of text changes."""
        marks = np.zeros(len(self.text), dtype=np.int32)
        spans: list[tuple[str, dict[str, Any]]] = [("text", {})]
        for layer in _LAYERS:
            for span in self._spans[layer]:
                start, end = span["start"], span["end"]
                if layer.endswith("ref"):
                    start, end = self._with_brackets(start, end)
                marks[start:end] = len(spans)
                spans.append((layer, span))
        borders = np.flatnonzero(np.diff(marks)) + 1
        begin = self.body_start()
        inner = {*borders[borders > begin].tolist(), self.body_end()} - {0, begin, len(marks)}
        edges = [begin, *sorted(inner), len(marks)] if len(marks) else []
        for start, end in pairwise(edges):
            kind, span = spans[marks[start]]
            yield _Run(kind, start, self.text[start:end], span)

    def _with_brackets(self, start: int, end: int) -> tuple[int, int]:
        """A reference with the round brackets within three characters of it, which the parser often leaves out."""
        opening = self.text.find("(", max(0, start - 3), start)
        closing = self.text.find(")", end, end + 3)
        return opening if opening >= 0 else start, closing + 1 if closing >= 0 else end


def format_paper(record: dict[str, Any], title: str | None, place: str) -> str:
    """The paper as training text: title, abstract, headings, references in words, captions at the end.

    Args:
        record: one object of the S2ORC bulk files.
        title: from the "papers" data set; the annotation of the PDF is often a running head.
        place: file and line, for messages.

    Returns:
        The text; empty where the record has none.

    Raises:
        DataError: the record is not of the S2ORC schema.
    """
    paper = Paper(record, place)
    body = _tidy(remove_urls("".join(_written(paper))))
    body = escape_special_tokens(normalize_whitespace(_without_sections(body)))
    body = body.replace(_OPEN, "[").replace(_CLOSE, "]")
    heading = escape_special_tokens(normalize_whitespace(title or ""))
    return f"{heading}\n\n{body}" if heading and body else body


def _token(name: str) -> str:
    """A special token while the text is worked on: nothing in a paper can be taken for it."""
    return f"{_OPEN}{name}{_CLOSE}"


def _written(paper: Paper) -> Iterator[str]:
    """Every run as it stands in the text. Behind the body come figures and stray lines: their captions stay."""
    at_figures, body_end = False, paper.body_end()
    shown: set[str] = set()
    for run in paper.runs():
        identifier = run.span.get("attributes", {}).get("ref_id")
        if run.kind == "figure":
            at_figures = True
            yield _figure(paper, run.span, shown)
        elif at_figures and run.start >= body_end:
            continue
        elif run.kind == "text":
            yield _LATEX_DOCUMENT.sub(_formula_inside, run.text).replace("•", "- ")
        elif run.kind == "sectionheader":
            yield f"\n\n{_heading(run.text)}\n"
        elif run.kind == "formula":
            yield f"\n{_token('formula')} {_plain_formula(run.text)} {_token('/formula')}\n"
        elif run.kind == "bibref":
            citation = paper.citation(identifier)
            yield f" {_token('bib_ref')} {citation} {_token('/bib_ref')} " if citation else f" {_HOLE} "
        elif run.kind in ("figureref", "tableref"):
            caption = paper.caption(identifier, shorten=True)
            yield f" {_token('fig_ref')} {''.join(caption)} {_token('/fig_ref')} " if caption else f" {_HOLE} "
        else:
            yield _HOLE


def _heading(text: str) -> str:
    """``# Methods`` or ``## Study design``; a heading in capitals alone is written in small letters."""
    heading = " ".join(text.split())
    if heading.isupper() and len(heading) > 5:
        heading = heading.lower()
    words = heading.split(" ")
    main = len(words) <= 3 and any(name in heading.lower() for name in MAIN_HEADINGS)
    if words[0].islower():  # fMRI and mRNA keep their first letter
        heading = heading[0].upper() + heading[1:]
    return f"{'#' if main else '##'} {heading}"


def _figure(paper: Paper, span: dict[str, Any], shown: set[str]) -> str:
    identifier = span["attributes"].get("id")
    caption = paper.caption(identifier, shorten=False)
    if caption is None or not caption[0]:
        return ""
    name, text = caption
    key = re.sub(r"[:,()]", "", name).strip().lower()
    if key in shown or "continued" in f"{name}{text}".lower():
        return ""
    shown.add(key)
    token = "table" if str(identifier).startswith("tab") else "fig"
    return f"\n{_token(token)} {name}{' '.join(text.split())} {_token('/' + token)}\n"


def _plain_formula(text: str) -> str:
    """A formula without the LaTeX document that publishers wrap around it and without its plain-text twin."""
    found = _LATEX_DOCUMENT.search(text)
    return _formula_inside(found) if found else " ".join(text.split())


def _formula_inside(match: re.Match[str]) -> str:
    return " ".join(match.group(1).replace("$$", " ").split())


def _first_words(text: str) -> str:
    words = text.split()
    return " ".join(words[:REFERENCE_WORDS]) + ("..." if len(words) > REFERENCE_WORDS else "")


def _tidy(text: str) -> str:
    """Closes the holes that references leave: brackets around them, empty brackets, space before punctuation."""
    cited, cited_end = f"{_OPEN}bib_ref{_CLOSE}", f"{_OPEN}/bib_ref{_CLOSE}"
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(rf"\[[\s,;–{_HOLE}-]*(?={cited})", " ", text)
    text = re.sub(rf"(?<={cited_end})[\s,;–{_HOLE}-]*\]", "", text)
    text = re.sub(rf"\(\s*({_CITED_LIST})\s*\)", r"\1", text)
    text = re.sub(rf"({_CITED})\s*[,;–-]\s*(?={cited})", r"\1 ", text)
    text = re.sub(rf"[(\[][\s,;.–-]*{_HOLE}[\s,;.–{_HOLE}-]*[)\]]", f" {_HOLE} ", text)
    text = re.sub(rf"[ \t]*{_HOLE}[ \t{_HOLE}]*(?=[.,;:!?)\]])", "", text).replace(_HOLE, " ")
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(rf"(?<=[\w).,;]){cited}", f" {cited}", text)
    text = re.sub(r" +([.,;:!?)\]])(?![\w\[/])", r"\1", text)
    return re.sub(r" *\n *", "\n", re.sub(r"\n+", "\n", re.sub(r"\n+(?=##? )", "\n\n", text.replace("\n\n", "\n"))))


def _sections(text: str) -> list[tuple[str, str]]:
    """(heading line or "", text below it) in order."""
    pieces = re.split(r"^(##? .*)$", text, flags=re.MULTILINE)
    return [("", pieces[0]), *zip(pieces[1::2], pieces[2::2], strict=True)]


def _join(sections: list[tuple[str, str]]) -> str:
    written = [f"{heading}\n{body.strip()}" if heading else body.strip() for heading, body in sections]
    return "\n\n".join(section for section in written if section.strip())


def _without_sections(text: str) -> str:
    """Without acknowledgements (the paper removes them, and they are lists of names) and without a last heading
    that nothing follows. Captions below such a heading stay."""
    kept: list[tuple[str, str]] = []
    sections = _sections(text)
    for number, (heading, body) in enumerate(sections):
        captions = [line for line in body.split("\n") if line.startswith((_token("fig"), _token("table")))]
        stray = number + 1 == len(sections) and "\n".join(captions) == body.strip()
        thanks = _ACKNOWLEDGEMENT.fullmatch(heading.lstrip("# "))
        if not heading or not (stray or thanks):
            kept.append((heading, body))
        elif captions:
            before = kept.pop() if kept else ("", "")
            kept.append((before[0], "\n".join([before[1].strip(), *captions])))
    written = [f"{heading}\n{body.strip()}" if heading else body.strip() for heading, body in kept]
    return "\n\n".join(section for section in written if section.strip())
