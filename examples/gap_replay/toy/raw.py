"""The toy sample as raw records of GAP-Replay's four sources: guidelines, S2ORC papers, abstracts, replay.

python examples/gap_replay/toy/raw.py SAMPLE.jsonl RAW
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    sample, raw = Path(sys.argv[1]), Path(sys.argv[2])
    raw.mkdir(parents=True)
    records = [json.loads(line) for line in sample.read_text(encoding="utf-8").splitlines()]
    kinds = (_guideline, _abstract, _paper, _replay)
    for place, kind in enumerate(kinds):
        rows = [kind(record, number) for number, record in enumerate(records) if number % len(kinds) == place]
        name = kind.__name__.removeprefix("_")
        (raw / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _guideline(record: dict[str, Any], number: int) -> dict[str, Any]:
    text = record["text"].replace("\n\n", "\n\n## What to do\n\n", 1)
    return {"id": record["id"], "source": "toy", "title": record["title"], "raw_text": text}


def _abstract(record: dict[str, Any], number: int) -> dict[str, Any]:
    return {"id": str(1000 + number), "title": record["title"], "text": record["text"]}


def _paper(record: dict[str, Any], number: int) -> dict[str, Any]:
    """A paper whose body is cut into two sections, as S2ORC's annotations tell it."""
    head, body = "Background", record["text"]
    text = f"{head}\n{body}\nConclusion\nMore work is needed."
    end = len(head)
    second = text.index("Conclusion", end)
    headings = [{"start": 0, "end": end}, {"start": second, "end": second + len("Conclusion")}]
    paragraphs = [{"start": end + 1, "end": second - 1}, {"start": second + 11, "end": len(text)}]
    annotations = {"sectionheader": json.dumps(headings), "paragraph": json.dumps(paragraphs)}
    identifiers = {"pubmed": str(500000 + number), "pubmedcentral": None}
    return {"corpusid": number + 1, "externalids": identifiers, "content": {"text": text, "annotations": annotations}}


def _replay(record: dict[str, Any], number: int) -> dict[str, Any]:
    return {"text": record["text"], "meta": {"source": "toy", "url": f"toy-{number}"}}


if __name__ == "__main__":
    main()
