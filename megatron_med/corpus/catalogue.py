"""What the Semantic Scholar "papers" data set knows of each paper, as one SQLite file: the join on corpus id."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from megatron_med.corpus.records import read_records, text_field
from megatron_med.errors import DataError
from megatron_med.files import replacing


@dataclass(frozen=True)
class CatalogueEntry:
    """One paper of PubMed or PubMed Central; unknown ids are empty."""

    corpusid: int
    pmid: str
    pmcid: str
    title: str
    year: int | None
    license: str


def read_papers(path: Path) -> Iterator[CatalogueEntry]:
    """The entries of one file of the "papers" data set that are in PubMed or PubMed Central.

    Raises:
        DataError: a record of another schema; names the field and the line.
    """
    for place, record in read_records(path):
        corpusid = corpus_id(record, place)
        pmid = text_field(record, "externalids.PubMed", place, required=False)
        pmcid = text_field(record, "externalids.PubMedCentral", place, required=False).removeprefix("PMC")
        title = text_field(record, "title", place)
        if pmid or pmcid:
            year = record.get("year")
            license_ = text_field(record, "license", place, required=False)
            yield CatalogueEntry(corpusid, pmid, pmcid, title, year if isinstance(year, int) else None, license_)


def corpus_id(record: dict[str, Any], place: str) -> int:
    """``corpusid`` as a number."""
    value = text_field(record, "corpusid", place)
    if not value.isdigit():
        raise DataError(f"{place}: 'corpusid' is '{value}', not a number.")
    return int(value)


def write_catalogue(path: Path, entries: Iterable[CatalogueEntry]) -> int:
    """Writes the file in one piece and returns the number of papers; of two entries of one id the first stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, closing(sqlite3.connect(partial)) as connection:
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
        connection.execute(
            "CREATE TABLE papers "
            "(corpusid INTEGER PRIMARY KEY, pmid TEXT, pmcid TEXT, title TEXT, year INT, license TEXT)"
        )
        connection.executemany("INSERT OR IGNORE INTO papers VALUES (?, ?, ?, ?, ?, ?)", map(astuple, entries))
        count: int = connection.execute("SELECT count(*) FROM papers").fetchone()[0]
        connection.commit()
    return count


class Catalogue:
    """Looks papers up; many processes may read one file at once."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)

    def find(self, corpusid: int) -> CatalogueEntry | None:
        """The paper of a corpus id; None where the catalogue has none."""
        row = self._connection.execute("SELECT * FROM papers WHERE corpusid = ?", (corpusid,)).fetchone()
        return CatalogueEntry(*row) if row else None
