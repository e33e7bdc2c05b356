"""Abstracts from the XML of the National Library of Medicine (PubMed baseline and update files)."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megatron_med.errors import DataError


@dataclass(frozen=True)
class Citation:
    """One ``PubmedArticle``.

    Attributes:
        pmid: PubMed id.
        pmcid: PubMed Central id without "PMC", or "".
        title: of the article, as given.
        abstract: its parts with their labels, "" where there is none.
        language: the NLM's code of the article ("eng").
        copyright: as printed below the abstract, or "".
    """

    pmid: str
    pmcid: str
    title: str
    abstract: str
    language: str
    journal: str
    year: int | None
    copyright: str


def read_citations(stream: BinaryIO, name: str) -> Iterator[Citation]:
    """Every article of a ``PubmedArticleSet``, one in memory at a time.

    Raises:
        DataError: not XML, cut short, or an article without a PMID; names the file and the place.
    """
    articles = 0
    try:
        events = ElementTree.iterparse(stream, events=("start", "end"))
        _, root = next(events)
        if root.tag != "PubmedArticleSet":
            raise DataError(f"{name} begins with <{root.tag}>, not <PubmedArticleSet>: it is no PubMed baseline file.")
        for event, element in events:
            if event == "end" and element.tag == "PubmedArticle":
                articles += 1
                yield _citation(element, f"{name}, article {articles}")
                root.clear()
    except ElementTree.ParseError as error:
        line = error.position[0]
        raise DataError(
            f"{name}:{line}: broken XML after {articles:,} articles ({error}). Fetch the file again."
        ) from error


def _citation(article: ElementTree.Element, place: str) -> Citation:
    pmid = article.findtext("MedlineCitation/PMID")
    if not pmid:
        raise DataError(f"{place}: no 'MedlineCitation/PMID'.")
    year = article.findtext("MedlineCitation/Article/Journal/JournalIssue/PubDate/Year")
    identifiers = article.findall("PubmedData/ArticleIdList/ArticleId")
    pmcid = next((e.text or "" for e in identifiers if e.get("IdType") == "pmc"), "")
    return Citation(
        pmid=pmid.strip(),
        pmcid=pmcid.strip().removeprefix("PMC"),
        title=_text(article.find("MedlineCitation/Article/ArticleTitle")),
        abstract="\n".join(filter(None, map(_part, article.findall("MedlineCitation/Article/Abstract/AbstractText")))),
        language=article.findtext("MedlineCitation/Article/Language") or "",
        journal=article.findtext("MedlineCitation/Article/Journal/Title") or "",
        year=int(year) if year and year.isdigit() else None,
        copyright=_text(article.find("MedlineCitation/Article/Abstract/CopyrightInformation")),
    )


def _part(element: ElementTree.Element) -> str:
    label, text = element.get("Label"), _text(element)
    return f"{label.capitalize()}: {text}" if label and text and label != "UNLABELLED" else text


def _text(element: ElementTree.Element | None) -> str:
    """All text below an element: italics, subscripts and the like are inline markup."""
    return " ".join("".join(element.itertext()).split()) if element is not None else ""
