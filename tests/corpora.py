"""Small pieces of corpus recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def recipe_source(kind: str, files: list[Path], license_: str, **more: Any) -> dict[str, Any]:
    """A source of a recipe."""
    return {"kind": kind, "input": [str(file) for file in files], "license": license_, **more}
