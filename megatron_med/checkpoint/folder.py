"""The folder of a checkpoint: commit protocol, manifest, ``latest``, pruning. No torch here.

A step is written into ``step-00000020.partial``, described by a manifest with sizes and checksums, renamed to
``step-00000020``, and only then does ``latest`` move. A crash at any point leaves the last good one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from megatron_med.errors import CheckpointError
from megatron_med.files import PARTIAL, sha256_of_all, sync_path, write_json, write_text

LATEST = "latest"
BEST = "best"
"""Names the step with the lowest validation loss, where the run keeps it."""
MANIFEST = "manifest.json"
STATE = "state.json"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"
_PREFIX = "step-"
_STEP_NAME = re.compile(r"step-[0-9]{8,}")
_DAMAGED = ".damaged"
_NEWER = ".newer"
_REPLACED = ".replaced"


@dataclass
class CheckpointState:
    """What a checkpoint says of itself, in ``state.json``.

    Attributes:
        model: the whole ModelConfig.
        tokenizer: ``Tokenizer.describe()``; None where there is none.
        step: optimizer steps of the run, skipped ones included.
        consumed_samples: position in the order of samples.
        optimizer_steps: updates done; None where the checkpoint holds weights only.
        initial_lr: peak learning rate that the run began with (decoupled_adamw divides by it).
        loss_scaler: state of the fp16 loss scale.
        chat: ``template, chat_template, turn_end_id`` of the conversations that it was trained on.
        head: how the sequences that it scores were made (``data/head_form.py``); None for a language model.
        adapter: settings of LoRA and the base, where the checkpoint holds adapters only (``adapter.py``).
        new_rows: first and last + 1 of the tokens that were added to the base's vocabulary and never trained.
        best: ``step, valid_loss`` of the lowest validation loss of the run so far.
        frozen: parameters without moments, since they were not trained.
        moments_since: parameter -> updates done when its moments began, where it was frozen before.
        settings: option -> value of what shapes the loss curve (``train/continuity.py``).
        run: other settings of the run, for information.
    """

    model: dict[str, Any]
    tokenizer: dict[str, Any] | None = None
    step: int = 0
    consumed_samples: int = 0
    optimizer_steps: int | None = None
    initial_lr: float | None = None
    loss_scaler: dict[str, float] | None = None
    chat: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    new_rows: list[int] | None = None
    best: dict[str, Any] | None = None
    frozen: list[str] = field(default_factory=list)
    moments_since: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    version: int = 1


_VERSION = 1
_MOST = 2**53
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "consumed_samples", "version"), (int,)),
    "optimizer_steps": (int, type(None)),
    "initial_lr": (int, float, type(None)),
    **dict.fromkeys(("model", "moments_since", "settings", "run"), (dict,)),
    **dict.fromkeys(("tokenizer", "loss_scaler", "chat", "best", "adapter", "head"), (dict, type(None))),
    "new_rows": (list, type(None)),
    "frozen": (list,),
}


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value of ``state.json`` is of one of these kinds; numbers are never negative."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    return not isinstance(value, int | float) or 0 <= value <= _MOST


def step_folder(checkpoints: Path, step: int) -> Path:
    """``checkpoints/step-00000020``."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a folder's name tells."""
    return int(folder.name.removeprefix(_PREFIX))


def partial_folder(folder: Path) -> Path:
    """Where a step is written before it is committed."""
    return folder.with_name(folder.name + PARTIAL)


def begin(folder: Path) -> Path:
    """An empty ``.partial`` folder beside ``folder``."""
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_state(folder: Path, state: CheckpointState) -> None:
    """Writes ``state.json``."""
    write_json(folder / STATE, asdict(state))


def read_state(folder: Path) -> CheckpointState:
    """Reads ``state.json``."""
    try:
        state = CheckpointState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        wrong = next((name for name, kinds in _KINDS.items() if not _is_of(getattr(state, name), kinds)), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is {str(getattr(state, wrong))[:40]!r}")
        if state.version > _VERSION:
            raise ValueError(f"it is of version {state.version}, and this program reads up to {_VERSION}")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read ({error}). {_offer_previous(folder)}") from error
    return state


def commit(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Turns the ``.partial`` folder into ``folder``: manifest, fsync, rename, ``latest``.

    Args:
        folder: the final name.
        files: size and sha256 of each file, as ``describe_files`` gives them.
    """
    partial = partial_folder(folder)
    write_json(partial / MANIFEST, {"files": files})
    for path in partial.rglob("*"):
        sync_path(path)
    sync_path(partial)
    replaced = folder.with_name(folder.name + _REPLACED)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    _point_latest_to(folder)


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each named file, which are on the disk then."""
    paths = [folder / name for name in names]
    checksums = sha256_of_all(paths, sync=True)
    return {
        name: {"bytes": path.stat().st_size, "sha256": checksum}
        for name, path, checksum in zip(names, paths, checksums, strict=True)
    }


def file_names(folder: Path) -> list[str]:
    """Every file below a folder but the manifest, by relative name, sorted."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if name != MANIFEST)


def prune(checkpoints: Path, keep: int, keep_every: int | None, current: int, best: int | None = None) -> None:
    """Removes all but the newest ``keep`` steps up to ``current``, the multiples of ``keep_every`` and the step
    ``best``; 0 keeps all."""
    if keep == 0:
        return
    steps = [step for step in complete_steps(checkpoints) if step <= current]
    for step in steps[:-keep]:
        if step != best and (keep_every is None or step % keep_every):
            shutil.rmtree(step_folder(checkpoints, step), ignore_errors=True)


def remove_partials(checkpoints: Path) -> None:
    """Removes what crashes left half-written."""
    for pattern in (f"{_PREFIX}*{PARTIAL}", f"{_PREFIX}*{_REPLACED}"):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path) -> Path | None:
    """Renames a damaged step to ``....damaged`` and lets ``latest`` name the whole one before it.

    Returns:
        The step before; None, and nothing is changed, where there is none.
    """
    previous = _previous(folder)
    if previous is None:
        return None
    if folder.is_dir():
        aside = folder.with_name(folder.name + _DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    _point_latest_to(previous)
    return previous


def set_newer_aside(checkpoints: Path, step: int) -> list[Path]:
    """Renames the steps past ``step`` to ``....newer``: they belong to a future that was stepped back from, and
    would be taken for the run's own. An earlier one of that name becomes ``....newer-2`` and so on, nothing is removed.

    Returns:
        Their new names.
    """
    aside = []
    for newer in (step_folder(checkpoints, later) for later in complete_steps(checkpoints) if later > step):
        names = (
            newer.with_name(f"{newer.name}{_NEWER}{ending}") for ending in chain([""], (f"-{n}" for n in count(2)))
        )
        target = next(name for name in names if not name.exists())
        os.replace(newer, target)
        aside.append(target)
    return aside


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps with a manifest, oldest first."""
    if not checkpoints.is_dir():
        return []
    names = [path.name for path in checkpoints.iterdir() if (path / MANIFEST).is_file()]
    return sorted(int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdigit())


def latest_folder(checkpoints: Path) -> Path | None:
    """The step that ``latest`` names; None where there is no ``latest``.

    Raises:
        CheckpointError: it names what is no whole checkpoint.
    """
    folder = named_by_latest(checkpoints)
    if folder is None:
        return None
    pointer = checkpoints / LATEST
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{pointer} names {folder}, which is not a whole checkpoint. {_offer_previous(folder)}")
    return folder


def named_by_latest(checkpoints: Path) -> Path | None:
    """What ``latest`` names, whole or not; None where there is no ``latest``.

    Raises:
        CheckpointError: it holds something else than the name of a step.
    """
    pointer = checkpoints / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_bytes().decode("utf-8", errors="replace").strip()
    if not _STEP_NAME.fullmatch(name):
        steps = [step_folder(checkpoints, step).name for step in complete_steps(checkpoints)]
        there = f"the newest there is {steps[-1]}" if steps else "there is none"
        raise CheckpointError(f"{pointer} holds {name[:40]!r}, not the name of a step; {there}. Write that into it.")
    return checkpoints / name


def resolve_checkpoint(path: str | Path) -> Path:
    """The step folder meant by RUN, RUN/checkpoints or a step folder itself.

    Raises:
        CheckpointError: there is none, or it is half-written.
    """
    given = Path(path)
    if given.name.endswith(PARTIAL) or (
        given.is_dir() and (given / STATE).exists() and not (given / MANIFEST).exists()
    ):
        raise CheckpointError(f"{given} is a half-written checkpoint. {_offer_previous(given)}")
    if (given / MANIFEST).is_file():
        return given
    for checkpoints in (given, given / CHECKPOINTS):
        folder = latest_folder(checkpoints)
        if folder is not None:
            return folder
    raise CheckpointError(
        f"There is no checkpoint at {given}. Give a RUN folder, its checkpoints folder or one step-... folder."
        f"{_foreign_hint(given)}"
    )


def _foreign_hint(given: Path) -> str:
    """What to do with a folder of Hugging Face's."""
    if (given / "adapter_config.json").is_file():
        return f" It is a PEFT folder: megatron-med adapter import --from {given} --base CHECKPOINT --to DIR."
    if (given / "config.json").is_file():
        return f" It is a Hugging Face folder: megatron-med import --from {given} --to DIR."
    return ""


def check_sizes(folder: Path) -> list[str]:
    """Compares the sizes of all files with the manifest and returns their names.

    Raises:
        CheckpointError: a file is missing or has another size; names it and the step before.
    """
    files = _manifest(folder)
    for name, described in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != described["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {described['bytes']}"
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} {found}. {_offer_previous(folder)}")
    return list(files)


def damaged_files(folder: Path, names: list[str]) -> list[str]:
    """Those of ``names`` whose content is not what the manifest says."""
    files = _manifest(folder)
    checksums = sha256_of_all([folder / name for name in names])
    return [name for name, found in zip(names, checksums, strict=True) if found != files[name]["sha256"]]


def checksums(folder: Path) -> dict[str, str]:
    """What the manifest says of each file's content."""
    return {name: described["sha256"] for name, described in _manifest(folder).items()}


def damage_error(folder: Path, names: list[str]) -> CheckpointError:
    """The error for files with wrong content."""
    return CheckpointError(
        f"The checkpoint {folder} is damaged: the content of {', '.join(names)} is not what was written. "
        f"{_offer_previous(folder)}"
    )


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The manifest of {folder} cannot be read ({error}). {_offer_previous(folder)}"
        ) from error


def point_best_to(folder: Path) -> None:
    """Lets ``best`` name a step."""
    write_text(folder.parent / BEST, folder.name + "\n")


def _point_latest_to(folder: Path) -> None:
    write_text(folder.parent / LATEST, folder.name + "\n")
    sync_path(folder.parent)


def _previous(folder: Path) -> Path | None:
    """The newest whole step before ``folder``."""
    folders = [step_folder(folder.parent, step) for step in complete_steps(folder.parent)]
    return max((earlier for earlier in folders if earlier.name < folder.name), default=None)


def _offer_previous(folder: Path) -> str:
    previous = _previous(folder)
    if previous is None:
        return "There is no earlier checkpoint beside it."
    return (
        f"The one before it is {previous}: write '{previous.name}' into {folder.parent / LATEST} to go on from there."
    )
