"""The commit protocol on real files: crash, damage, pruning, and a malicious metadata file."""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, MetadataIndex

from megatron_med.checkpoint import folder as folders
from megatron_med.checkpoint.folder import CheckpointState
from megatron_med.checkpoint.load import check_model, check_tokenizer, verify_checkpoint
from megatron_med.checkpoint.storage import Reader, write_streaming
from megatron_med.config.presets import PRESETS
from megatron_med.config.schema import ModelConfig
from megatron_med.errors import CheckpointError, ConfigError
from megatron_med.parallel.context import single_process_context
from megatron_med.train.run_folder import RunFolder


def _save(checkpoints: Path, step: int) -> Path:
    final = folders.step_folder(checkpoints, step)
    partial = folders.begin(final)
    make = {"w": lambda: torch.full((3, 2), float(step)), "v": lambda: torch.arange(4.0)}
    write_streaming(partial, {"w": ((3, 2), torch.float32), "v": ((4,), torch.float32)}, make)
    folders.write_state(partial, CheckpointState(model={}, step=step))
    folders.commit(final, folders.describe_files(partial, folders.file_names(partial)))
    return final


def test_run_checkpoints_and_step_all_name_the_latest(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    _save(checkpoints, 10)
    newest = _save(checkpoints, 20)
    for given in (tmp_path, checkpoints, newest):
        assert folders.resolve_checkpoint(given) == newest
    assert (checkpoints / "latest").read_text() == "step-00000020\n"
    assert folders.read_state(newest).step == 20
    verify_checkpoint(newest, single_process_context())
    assert Reader(newest).read("w").tolist() == [[20.0, 20.0]] * 3


def test_a_crash_while_writing_leaves_the_last_good_one(tmp_path: Path) -> None:
    good = _save(tmp_path, 10)
    partial = folders.begin(folders.step_folder(tmp_path, 20))
    (partial / "state.json").write_text("{}")
    assert folders.resolve_checkpoint(tmp_path) == good
    with pytest.raises(CheckpointError, match=r"half-written.*step-00000010"):
        folders.resolve_checkpoint(partial)


def test_missing_checkpoint_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Give a RUN folder"):
        folders.resolve_checkpoint(tmp_path / "nothing")


def test_damage_is_named_and_the_step_before_offered(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    step = _save(tmp_path, 20)
    data = step / "__0_0.distcp"
    raw = data.read_bytes()
    data.write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match=r"distcp has .* bytes instead of .*step-00000010"):
        verify_checkpoint(step, single_process_context())
    data.write_bytes(raw[:100] + b"\x00\x01" + raw[102:])
    with pytest.raises(CheckpointError, match=r"content of __0_0.distcp is not what was written.*step-00000010"):
        verify_checkpoint(step, single_process_context())
    data.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        verify_checkpoint(step, single_process_context())


def test_latest_that_names_nothing_is_told(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    (tmp_path / "latest").write_text("step-00000020\n")
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint.*step-00000010"):
        folders.resolve_checkpoint(tmp_path)


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25):
        _save(tmp_path, step)
    folders.prune(tmp_path, keep=0, keep_every=None, current=25)
    assert folders.complete_steps(tmp_path) == [5, 10, 15, 20, 25]
    folders.prune(tmp_path, keep=2, keep_every=10, current=25)
    assert folders.complete_steps(tmp_path) == [10, 20, 25]


def test_pruning_after_stepping_back_keeps_the_step_just_saved(tmp_path: Path) -> None:
    for step in (2, 4, 6, 3):
        _save(tmp_path, step)
    folders.prune(tmp_path, keep=1, keep_every=None, current=3)
    assert folders.complete_steps(tmp_path) == [3, 4, 6]
    assert folders.resolve_checkpoint(tmp_path).name == "step-00000003"


def test_steps_past_the_one_gone_on_from_are_set_aside_and_never_removed(tmp_path: Path) -> None:
    for _ in range(2):
        for step in (2, 4, 6):
            _save(tmp_path, step)
        aside = folders.set_newer_aside(tmp_path, 2)
        assert folders.complete_steps(tmp_path) == [2]
    assert [path.name for path in aside] == ["step-00000004.newer-2", "step-00000006.newer-2"]
    folders.prune(tmp_path, keep=1, keep_every=None, current=2)
    folders.remove_partials(tmp_path)
    assert len(list(tmp_path.glob("*.newer*"))) == 4
    verify_checkpoint(folders.resolve_checkpoint(aside[0]), single_process_context())


def test_saving_a_step_again_replaces_it_and_leftovers_go(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    step = _save(tmp_path, 10)
    folders.begin(folders.step_folder(tmp_path, 7))
    folders.remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010"]
    verify_checkpoint(step, single_process_context())


def _global(module: str, name: str) -> bytes:
    """A pickle that calls ``module.name("touch ran")``."""
    parts = [pickle.PROTO + b"\x04"]
    for text in (module, name):
        parts.append(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode())
    argument = pickle.SHORT_BINUNICODE + bytes([9]) + b"touch ran"
    return b"".join([*parts, pickle.STACK_GLOBAL, argument, pickle.TUPLE1, pickle.REDUCE, pickle.STOP])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "exec"),
        ("os", "system"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "os"),
        ("torch.distributed.checkpoint.metadata", "field"),
    ],
)
def test_metadata_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    step = _save(tmp_path, 10)
    (step / ".metadata").write_bytes(_global(module, name))
    with pytest.raises(CheckpointError, match=rf"{module}\.{name} does not belong"):
        Reader(step).read_metadata()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04", b"{}", b"\xff" * 9, pickle.dumps([1]), pickle.dumps({"a": 1}), b"cos\n."]
)
def test_metadata_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    step = _save(tmp_path, 10)
    (step / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata is not the metadata of a checkpoint: "):
        Reader(step).shapes()


class _OldPython(pickle.Pickler):
    """Writes members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, thing: object) -> Any:
        return (getattr, (type(thing), thing.name)) if isinstance(thing, Enum) else NotImplemented


def _pickled_by_an_old_python(thing: object) -> bytes:
    file = io.BytesIO()
    _OldPython(file, protocol=4).dump(thing)
    return file.getvalue()


def test_metadata_written_by_another_python_is_read(tmp_path: Path) -> None:
    step = _save(tmp_path, 10)
    metadata = Reader(step).read_metadata()
    written = _pickled_by_an_old_python(metadata)
    assert b"getattr" in written
    (step / ".metadata").write_bytes(written)
    assert Reader(step).read_metadata().state_dict_metadata == metadata.state_dict_metadata
    assert torch.equal(Reader(step).read("w"), torch.full((3, 2), 10.0))


@pytest.mark.parametrize("arguments", [(MetadataIndex, "__init__"), (_MEM_FORMAT_ENCODING, "__members__"), (3, "real")])
def test_no_attribute_but_a_member_of_an_enumeration_is_read(tmp_path: Path, arguments: tuple[Any, str]) -> None:
    class Reduced:
        def __reduce__(self) -> Any:
            return getattr, arguments

    step = _save(tmp_path, 10)
    (step / ".metadata").write_bytes(pickle.dumps(Reduced()))
    with pytest.raises(CheckpointError, match=f"the attribute '{arguments[1]}' of .* does not belong"):
        Reader(step).read_metadata()


@pytest.mark.parametrize(
    "damage", ["truncated", "manifest", "state", "missing file", "half-written", "latest names nothing"]
)
def test_a_damaged_step_is_set_aside_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    run = RunFolder(tmp_path)
    good, step = _save(run.checkpoints, 10), _save(run.checkpoints, 20)
    data = step / "__0_0.distcp"
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:-3])
    elif damage == "manifest":
        (step / "manifest.json").write_text('{"files": ')
    elif damage == "state":
        (step / "state.json").write_text("{}")
    elif damage == "missing file":
        data.unlink()
    elif damage == "half-written":
        (step / "manifest.json").unlink()
    else:
        (run.checkpoints / "latest").write_text("step-00000030\n")
    named = run.resume_point()
    assert named is not None
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(named, single_process_context())
    assert named.name in str(caught.value)
    expected = step if damage == "latest names nothing" else good
    assert run.step_back(named, caught.value) == expected
    assert run.resume_point() == expected
    verify_checkpoint(expected, single_process_context())
    assert step.with_name(f"{step.name}.damaged").exists() == (expected == good)
    (expected / "__0_0.distcp").unlink()
    if expected == good:  # nothing before it: no silent start from random weights
        with pytest.raises(CheckpointError, match="is missing"):
            run.step_back(good, CheckpointError("it is missing"))


def test_a_run_that_was_killed_before_its_first_latest_goes_on_from_the_step_it_had_saved(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    step = _save(run.checkpoints, 10)
    (run.checkpoints / "latest").unlink()
    assert run.resume_point() == step
    run.record_commit(10)  # the save had ended: somebody took the file away, and says which step is meant
    with pytest.raises(ConfigError, match=r"holds steps \[10\] but no file 'latest'"):
        run.resume_point()
    (run.path / "committed.json").unlink()
    _save(run.checkpoints, 20)
    (run.checkpoints / "latest").unlink()
    with pytest.raises(ConfigError, match=r"holds steps \[10, 20\]"):
        run.resume_point()


def test_another_model_is_refused_field_by_field() -> None:
    from dataclasses import asdict

    model = ModelConfig(**PRESETS["llama-tiny"])
    other = asdict(model) | {"hidden_size": 256, "rope_theta": 5e5, "init_std": 0.5}
    with pytest.raises(CheckpointError) as caught:
        check_model(CheckpointState(model=other), model, Path("step"))
    assert len(caught.value.faults) == 2
    assert "model.hidden_size is 256 in the checkpoint and 128" in caught.value.faults[0]
    check_model(CheckpointState(model=asdict(model)), model, Path("step"))


def test_another_vocabulary_is_refused() -> None:
    ours = {"vocab_size": 100, "eod_id": 1, "fingerprint": "x", "files": {"tokenizer.json": "aa"}}
    state = CheckpointState(model={}, tokenizer=ours)
    check_tokenizer(state, dict(ours), Path("step"))
    for change in ({"vocab_size": 101}, {"fingerprint": "y", "files": {"tokenizer.model": "bb"}}):
        with pytest.raises(CheckpointError, match="Tokenize the data with the tokenizer in"):
            check_tokenizer(state, ours | change, Path("step"))
