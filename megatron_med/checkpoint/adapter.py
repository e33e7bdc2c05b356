"""What a checkpoint of adapters says of itself, and the base that it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_med.checkpoint.folder import CheckpointState, checksums, read_state, resolve_checkpoint
from megatron_med.config.lora import targets_of
from megatron_med.config.schema import LoRAConfig, ModelConfig, QuantizeConfig
from megatron_med.errors import CheckpointError

_FIXED = ("rank", "alpha", "rslora", "targets", "train_rows")
"""Settings without which an adapter's numbers mean something else."""

MERGE = "megatron-med adapter merge --from {adapter} --to DIR"


def describe_adapter(
    lora: LoRAConfig, model: ModelConfig, base: Path, quantize: QuantizeConfig | None = None
) -> dict[str, Any]:
    """``adapter`` of ``state.json``: the settings, path and checksum of the base's weights, and what these were
    quantised to in training."""
    settings = {name: value for name, value in asdict(lora).items() if name != "base"}
    settings["targets"] = [target.module for target in targets_of(model, lora)]
    described = settings | {"base": {"path": str(base.resolve()), "weights": weights_digest(base)}}
    return described | ({} if quantize is None or quantize.base is None else {"quantize": asdict(quantize)})


def lora_of(state: CheckpointState) -> LoRAConfig:
    """The settings that a checkpoint's adapters were made with; rank 0 where it has none."""
    known = {field.name for field in fields(LoRAConfig)} - {"base"}
    return LoRAConfig(**{name: value for name, value in (state.adapter or {}).items() if name in known})


def quantize_of(state: CheckpointState) -> QuantizeConfig:
    """What a base was quantised to while its adapters were trained."""
    return QuantizeConfig(**(state.adapter or {}).get("quantize", {}))


def rows_of(state: CheckpointState) -> range | None:
    """Tokens that were added to a base's vocabulary and that nothing but adapters has trained."""
    return None if state.new_rows is None else range(*state.new_rows)


def weights_digest(step: Path) -> str:
    """Names the weights of a step: a checksum over those of its data files, in whatever order they were written."""
    data = sorted(checksum for name, checksum in checksums(step).items() if name.endswith(".distcp"))
    return hashlib.sha256("\n".join(data).encode()).hexdigest()


def check_settings(state: CheckpointState, lora: LoRAConfig, model: ModelConfig, step: Path) -> None:
    """Refuses adapters that were made with other settings than a run's.

    Raises:
        CheckpointError: one fault for each setting.
    """
    stored = state.adapter or {}
    wanted: Mapping[str, Any] = asdict(lora) | {"targets": [target.module for target in targets_of(model, lora)]}
    different = [name for name in _FIXED if stored.get(name) != wanted[name]]
    if different:
        raise CheckpointError(
            [
                f"The adapters of {step} were made with lora.{name} = {stored.get(name)!r}, the configuration says "
                f"{wanted[name]!r}. Make them equal."
                for name in different
            ]
        )


def base_of(step: Path, state: CheckpointState, given: str | Path | None = None) -> Path:
    """The step folder of the weights that adapters belong to.

    Args:
        step: of the adapters.
        state: of the adapters.
        given: where the base is; None: where it was.

    Raises:
        CheckpointError: it is not there, or holds other weights.
    """
    recorded = (state.adapter or {})["base"]
    path = Path(given or recorded["path"])
    if not path.exists():
        raise CheckpointError(
            f"The adapters of {step} belong to the base {path}, which is not there. Say where it is: lora.base, or "
            "--base."
        )
    base = resolve_checkpoint(path)
    if read_state(base).adapter is not None:
        raise CheckpointError(f"The base {base} holds adapters itself. Merge them first: {MERGE.format(adapter=base)}")
    if weights_digest(base) != recorded["weights"]:
        raise CheckpointError(
            f"The adapters of {step} were made for the weights of {recorded['path']}, and {base} holds others "
            f"(checksum {weights_digest(base)[:12]} instead of {recorded['weights'][:12]}). Give that base."
        )
    return base
