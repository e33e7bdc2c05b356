"""Where tools write: nothing that a tool has not written itself is ever replaced. No torch here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_med.errors import TargetExistsError
from megatron_med.files import RUN_IDENTITY, remove_abandoned, replacing, write_json

MARKER = ".megatron_med.json"
"""File in a folder that a tool has written; lists every file of it."""

_NAMED = 3


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuses to write over what is there.

    Args:
        path: a file or folder to be written.
        overwrite: a file may be replaced, and a folder that holds a tool's files and nothing else.

    Raises:
        TargetExistsError: ``path`` holds something that may not be replaced, or cannot be replaced in one piece.
    """
    if not path.is_dir():
        if path.exists() and not overwrite:
            raise TargetExistsError(f"{path} exists: name another target, or pass --overwrite.")
        if path.is_symlink() and not path.exists():
            raise TargetExistsError(
                f"{path} is a link to {os.readlink(path)}, which is not there: name another target."
            )
        return
    _refuse_places(path)
    if not any(path.iterdir()):
        return
    foreign = _foreign_files(path)
    if foreign is None:
        kind = "holds a run" if (path / RUN_IDENTITY).exists() else "is not empty, and no tool of ours has written it"
        raise TargetExistsError(f"{path} {kind}: --overwrite does not replace it. Name another target.")
    if foreign:
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        raise TargetExistsError(
            f"{path} also holds {', '.join(foreign[:_NAMED])}{more}, which no tool of ours has written: --overwrite "
            "does not replace it. Move that away, or name another target."
        )
    if not overwrite:
        raise TargetExistsError(f"{path} exists and is not empty: name another target, or pass --overwrite.")


@contextmanager
def output_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a folder to fill, which takes the place of ``path`` in one piece, with its marker. Links are followed.

    Raises:
        TargetExistsError: see ``refuse_existing``.
    """
    refuse_existing(path, overwrite)
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target)
    with replacing(target) as partial:
        partial.mkdir()
        yield partial
        write_json(partial / MARKER, {"files": _files(partial)})
        refuse_existing(path, overwrite)  # meanwhile somebody may have put something there


def _refuse_places(path: Path) -> None:
    target = path.resolve()
    if target == Path.cwd() or target in Path.cwd().parents:
        raise TargetExistsError(f"{path} is the working folder, or holds it: name a folder in it.")
    if os.path.ismount(target):
        raise TargetExistsError(f"{path} is where a disk is mounted: name a folder in it.")


def _files(folder: Path) -> list[str]:
    """Every file below a folder but the marker, by relative name; links count as files."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [os.path.relpath(os.path.join(root, name), folder) for name in [*names, *links]]
    return sorted(name for name in found if name != MARKER)


def _foreign_files(folder: Path) -> list[str] | None:
    """Files that the marker does not list; None where there is no marker."""
    try:
        listed = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return [name for name in _files(folder) if name not in set(listed)]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return [MARKER]
