"""The cache of index arrays under real processes: many at once, one killed, a full or read-only disk, damage."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_med.data.cache import cached_arrays
from megatron_med.data.gpt import PackedDataset
from megatron_med.data.indexed import IndexedDataset
from tests.ranks import forkserver

ENTRY = {"x": 1}
EXPECTED = np.arange(100_000)


def _build_and_note(notes: Path) -> dict[str, Any]:
    (notes / f"{os.getpid()}-{time.monotonic_ns()}").touch()
    time.sleep(0.3)  # long enough for every other process to come
    return {"a": EXPECTED.copy(), "b": EXPECTED[::-1].copy()}


def _read_in_process(folder: Path, notes: Path, result: Path) -> None:
    arrays = cached_arrays(folder, ENTRY, lambda: _build_and_note(notes))
    right = bool((arrays["a"] == EXPECTED).all() and (arrays["b"] == EXPECTED[::-1]).all())
    result.write_text(str(right))


def _build_for_ever(folder: Path, ready: Path) -> None:
    def build() -> dict[str, Any]:
        (folder / f"{_key(folder)}.{os.getpid()}.partial").mkdir()
        ready.touch()
        time.sleep(1000)
        return {}

    cached_arrays(folder, ENTRY, build)


def _key(folder: Path) -> str:
    (lock,) = folder.glob("*.lock")
    return lock.name.removesuffix(".lock")


def _run(processes: list[Any]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """One file for every time that the arrays were built."""
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("damaged", [False, True])
def test_eight_processes_at_once_build_once(tmp_path: Path, notes: Path, damaged: bool) -> None:
    cache = tmp_path / "cache"
    if damaged:
        cached_arrays(cache, ENTRY, lambda: {"a": EXPECTED, "b": EXPECTED})
        (array,) = cache.glob("*/b.npy")
        array.write_bytes(array.read_bytes()[:-1] + b"\x55")
    results = [tmp_path / f"result{number}" for number in range(8)]
    _run([forkserver.Process(target=_read_in_process, args=(cache, notes, result)) for result in results])
    assert [result.read_text() for result in results] == ["True"] * 8
    assert len(list(notes.iterdir())) == 1
    assert not list(cache.glob("*.partial"))


def test_eight_processes_agree_on_the_samples_of_a_corpus(sample_data: Path, tmp_path: Path) -> None:
    results = [tmp_path / f"result{number}.npy" for number in range(8)]
    _run([forkserver.Process(target=_samples, args=(sample_data, tmp_path / "cache", r)) for r in results])
    expected = _samples(sample_data, tmp_path / "alone", tmp_path / "alone.npy")
    for result in results:
        np.testing.assert_array_equal(np.load(result), expected)


def _samples(prefix: Path, cache: Path, result: Path) -> np.ndarray:
    data = PackedDataset(IndexedDataset(prefix), 32, 3, cache)
    samples = np.stack([data.sample(index).tokens for index in range(20)])
    np.save(result, samples)
    return samples


def test_a_builder_killed_half_way_leaves_the_next_one_free(tmp_path: Path, notes: Path) -> None:
    cache, ready, result = tmp_path / "cache", tmp_path / "ready", tmp_path / "result"
    victim = forkserver.Process(target=_build_for_ever, args=(cache, ready))
    victim.start()
    waiting = forkserver.Process(target=_read_in_process, args=(cache, notes, result))
    try:
        deadline = time.monotonic() + 30
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        waiting.start()
        time.sleep(0.3)
        assert not result.exists(), "two builders at once"
    finally:
        victim.kill()
        victim.join(10)
    waiting.join(60)
    assert result.read_text() == "True"
    assert len(list(notes.iterdir())) == 1
    assert not list(cache.glob("*.partial")), "what the killed one left is gone"


@contextmanager
def _disk(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own on ``folder``."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine forbids mounting: {getattr(error, 'stderr', None) or error}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


def _remount_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, capture_output=True, timeout=30)


def test_a_read_only_disk_serves_what_it_has_and_memory_the_rest(
    tmp_path: Path, notes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, result = tmp_path / "disk", tmp_path / "result"
    with _disk(cache, "size=16m"):
        cached_arrays(cache, ENTRY, lambda: _build_and_note(notes))
        _remount_read_only(cache)
        _run([forkserver.Process(target=_read_in_process, args=(cache, notes, result))])
        assert result.read_text() == "True"
        assert len(list(notes.iterdir())) == 1, "the entry is there"
        assert not caplog.text
        np.testing.assert_array_equal(cached_arrays(cache, {"x": 2}, lambda: {"a": np.arange(3)})["a"], [0, 1, 2])
        assert "Read-only file system" in caplog.text
        assert "indices are kept in memory" in caplog.text


def test_a_full_disk_keeps_indices_in_memory_and_leaves_nothing(
    tmp_path: Path, notes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "disk"
    with _disk(cache, "size=400k"):
        arrays = cached_arrays(cache, ENTRY, lambda: _build_and_note(notes))
        np.testing.assert_array_equal(arrays["a"], EXPECTED)
        assert "cannot be written" in caplog.text
        assert "0.4 MB are free" in caplog.text, "numpy hides the system's words: this tells why"
        assert len(list(notes.iterdir())) == 1, "built once, not again for memory"
        assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def test_a_folder_that_is_a_file_keeps_indices_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    arrays = cached_arrays(tmp_path / "file" / "cache", ENTRY, lambda: {"a": np.arange(3)})
    np.testing.assert_array_equal(arrays["a"], np.arange(3))


@pytest.mark.parametrize("damage", ["content", "truncated", "manifest", "missing"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, notes: Path, damage: str) -> None:
    for _ in range(2):
        cached_arrays(tmp_path / "cache", ENTRY, lambda: _build_and_note(notes))
    assert len(list(notes.iterdir())) == 1
    (array,) = (tmp_path / "cache").glob("*/a.npy")
    if damage == "content":
        array.write_bytes(array.read_bytes()[:-1] + b"\x55")
    elif damage == "truncated":
        array.write_bytes(array.read_bytes()[:1000])
    elif damage == "manifest":
        (array.parent / "manifest.json").write_text('{"sha256": ')
    else:
        array.unlink()
    for _ in range(2):
        arrays = cached_arrays(tmp_path / "cache", ENTRY, lambda: _build_and_note(notes))
        np.testing.assert_array_equal(arrays["a"], EXPECTED)
    assert len(list(notes.iterdir())) == 2
