"""The manifest of a corpus: what every shard was made from, what each step removed, checksums, code version."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_med.corpus.records import read_records
from megatron_med.errors import DataError
from megatron_med.files import sha256, write_json

FILE_NAME = "manifest.json"
_ENDS = 1 << 16
STEPS = ("raw records", "language", "personal data", "contamination", "duplicates", "near duplicates")
"""Steps that a document may be removed by, in order."""


def code_version() -> str:
    """Version of the package, with the commit where the source tree has one."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version("megatron_med")
    return f"{version('megatron_med')} ({commit})"


def read_steps(logs: Path, rank: int) -> list[dict[str, Any]]:
    """What each step that reads or removes documents did in one task: before, after, removed by reason, found."""
    path = logs / "stats" / f"{rank:05d}.json"
    steps = []
    for item in json.loads(path.read_text(encoding="utf-8")):
        name = item["name"].rpartition(": ")[2].strip()
        if name not in STEPS:
            continue
        counters = {
            key: int(value["total"] if isinstance(value, dict) else value) for key, value in item["stats"].items()
        }
        removed = {key.removeprefix("dropped_"): n for key, n in counters.items() if key.startswith("dropped_")}
        found = {key.removeprefix("found_"): n for key, n in counters.items() if key.startswith("found_")}
        before, after = counters.get("total", 0), counters.get("forwarded", 0)
        step = {"step": name, "before": before, "after": after, "removed": removed}
        steps.append(step | ({"found": found} if found else {}))
    return steps


def describe_shard(path: Path, root: Path) -> dict[str, Any]:
    """Documents, characters, licences and checksum of one shard of the corpus."""
    licenses: Counter[str] = Counter()
    documents = characters = 0
    for _, record in read_records(path):
        documents += 1
        characters += len(record["text"])
        licenses[record["metadata"].get("license", "unknown")] += 1
    return {
        "file": str(path.relative_to(root)),
        "documents": documents,
        "characters": characters,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "licenses": dict(licenses.most_common()),
    }


def write_manifest(root: Path, content: dict[str, Any]) -> None:
    """Writes ``manifest.json`` in one piece."""
    write_json(root / FILE_NAME, content, indent=1, ensure_ascii=False)


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a finished corpus.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = root / FILE_NAME
    if not path.is_file():
        raise DataError(f"There is no {path}: the corpus is not finished. Run megatron-med corpus build to its end.")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}. Remove it and run megatron-med corpus build again.") from error
    return content


def quick_checksum(path: Path) -> str:
    """Size of a file and a hash of both of its ends: tells whether it was exchanged, without reading all of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_ENDS))
        file.seek(max(0, size - _ENDS))
        digest.update(file.read())
    return f"{size}-{digest.hexdigest()[:16]}"


def verify_manifest(root: Path, hashes: bool = True) -> int:
    """Compares every shard and token file with the manifest and returns how many shards there are.

    Args:
        root: folder of the corpus.
        hashes: compare the content too, not only that the files are there and of their size.

    Raises:
        DataError: with every file that is missing, changed, or not in the manifest.
    """
    manifest = read_manifest(root)
    faults = list(_differences(root, [*manifest["shards"], *manifest["tokens"]], manifest["sources"], hashes))
    if faults:
        raise DataError(faults)
    return len(manifest["shards"])


def _differences(root: Path, files: list[dict[str, Any]], sources: Iterable[str], hashes: bool) -> Iterator[str]:
    remedy = f"Restore it, or remove {root} and build again."
    known = {file["file"] for file in files}
    for file in files:
        path = root / file["file"]
        if not path.is_file():
            yield f"{path} is in {FILE_NAME} and not on disk. {remedy}"
        elif path.stat().st_size != file["bytes"] or (hashes and sha256(path) != file["sha256"]):
            yield f"{path} is not the file that {FILE_NAME} describes. {remedy}"
    for path in sorted(shard for name in sources for shard in root.glob(f"{name}-*/*.jsonl.zst")):
        if str(path.relative_to(root)) not in known:
            yield f"{path} is not in {FILE_NAME}. Remove it."
