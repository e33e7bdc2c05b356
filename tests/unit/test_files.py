"""Files appear in one piece, or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_med.errors import run_command
from megatron_med.files import remove_abandoned, remove_leftovers, replacing, sha256, write_json, write_text


def test_what_fails_on_the_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    write_json(path, {"ü": 1})
    before = path.read_bytes()
    assert json.loads(before) == {"ü": 1}

    def fill_the_disk() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            assert path.read_bytes() == before
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        fill_the_disk()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("first", "second"):
        with replacing(target) as partial:
            partial.mkdir()
            write_text(partial / name, name)
    assert [path.name for path in target.iterdir()] == ["second"]

    def interrupt() -> None:
        with replacing(target) as partial:
            partial.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    with pytest.raises(FileNotFoundError), replacing(target):
        pass  # nothing was made
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "second").read_text() == "second"


def test_leftovers_of_killed_processes_are_removed_by_whoever_owns_the_folder(tmp_path: Path) -> None:
    names = ("latest.71.partial", "run.json.9.partial", "step-00000020.partial", "notes.json")
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[2:])
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "run.json")
    assert {path.name for path in tmp_path.iterdir()} == {names[0], *names[2:]}


def test_what_dead_processes_have_left_of_a_folder_is_removed_when_it_is_written_again(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    old, fresh, alive, other = (
        tmp_path / name
        for name in (
            f"hf.{dead.pid}.partial",
            f"ckpt.{dead.pid}.partial",
            f"hf.{os.getpid()}.partial",
            f"hf2.{dead.pid}.partial",
        )
    )
    for folder in (old, fresh, alive, other):
        folder.mkdir()
        (folder / "weights").touch()
        if folder != fresh:
            for path in (folder / "weights", folder):
                os.utime(path, (1.0, 1.0))
    remove_abandoned(tmp_path / "hf")
    remove_abandoned(tmp_path / "ckpt")
    assert set(tmp_path.iterdir()) == {fresh, alive, other}


def test_checksums_are_sha256(tmp_path: Path) -> None:
    write_text(tmp_path / "abc", "abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_full_disk_names_the_file_and_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        with replacing(tmp_path / "notes.json"), Path("/dev/full").open("w") as full:
            full.write("x" * 100_000)

    with pytest.raises(SystemExit) as ended:
        run_command(write)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/notes.json: No space left on device. Make room and start the same command again.\n"
    )


def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def read() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "in.jsonl"))

    with pytest.raises(SystemExit) as ended:
        run_command(read)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/in.jsonl: Permission denied. Change its permissions, or name another.\n"
    )
