"""Nothing is replaced that a tool has not written itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_med.errors import TargetExistsError
from megatron_med.outputs import MARKER, output_folder, refuse_existing


def _write(target: Path, name: str, overwrite: bool = False) -> None:
    with output_folder(target, overwrite) as folder:
        (folder / "weights").mkdir()
        (folder / "weights" / name).write_text(name)


def _content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_what_a_tool_has_written_is_replaced_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    _write(target, "first")
    with pytest.raises(TargetExistsError, match="pass --overwrite"):
        _write(target, "second")
    assert _content(target) == {"weights/first": "first"}
    _write(target, "second", overwrite=True)
    assert _content(target) == {"weights/second": "second"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_stays(tmp_path: Path, overwrite: bool) -> None:
    thesis = tmp_path / "home" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(TargetExistsError, match="no tool of ours has written it: --overwrite does not replace it"):
        _write(thesis.parent, "weights", overwrite)
    (thesis.parent / "run.json").touch()
    with pytest.raises(TargetExistsError, match="holds a run"):
        _write(thesis.parent, "weights", overwrite)
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("marker", [True, False])
def test_a_file_beside_those_of_the_tool_stays(tmp_path: Path, overwrite: bool, marker: bool) -> None:
    target = tmp_path / "out"
    _write(target, "first")
    (target / "weights" / "notes.txt").write_text("mine")
    if not marker:
        (target / MARKER).write_text("{}")
    with pytest.raises(TargetExistsError, match="notes.txt" if marker else MARKER):
        _write(target, "second", overwrite)
    assert _content(target) == {"weights/first": "first", "weights/notes.txt": "mine"}


def test_what_appears_while_the_tool_works_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write() -> None:
        with output_folder(target, overwrite=True) as folder:
            (folder / "new").touch()
            target.mkdir()
            (target / "theirs").write_text("theirs")

    with pytest.raises(TargetExistsError, match="no tool of ours"):
        write()
    assert _content(target) == {"theirs": "theirs"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_are_followed_and_odd_places_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    _write(tmp_path / "link", "first")
    assert (tmp_path / "link").is_symlink()
    assert _content(tmp_path / "disk") == {"weights/first": "first"}
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(TargetExistsError, match="gone, which is not there"):
        _write(tmp_path / "dangling", "first", overwrite=True)
    monkeypatch.chdir(tmp_path / "disk" / "weights")
    for place in (Path("."), Path(".."), Path("/")):
        with pytest.raises(TargetExistsError, match="is the working folder, or holds it"):
            _write(place, "first", overwrite=True)


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    refuse_existing(path, overwrite=False)
    path.touch()
    with pytest.raises(TargetExistsError, match="pass --overwrite"):
        refuse_existing(path, overwrite=False)
    refuse_existing(path, overwrite=True)
    assert os.listdir(tmp_path) == ["page.html"]
