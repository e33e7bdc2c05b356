"""What an evaluation is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_med.errors import ConfigError
from megatron_med.evaluate.ways import WITHOUT_SHOTS


@dataclass(frozen=True)
class Options:
    """What is asked, and how; the names are those of ``megatron-med evaluate``'s options."""

    checkpoint: str
    tasks: Sequence[str]
    output: Path
    data: Path | None = None
    overwrite: bool = False
    score: Sequence[str] = ("letter",)
    shots: int = 0
    shots_from: Path | None = None
    seeds: Sequence[int] = (1234, 432, 32)
    samples: int = 5
    limit: int | None = None
    truncate: str | None = None
    orders: int = 1
    contamination: Path | None = None
    seed: int = 0
    batch_size: int = 16
    max_length: int | None = None
    tensor: int = 1
    pipeline: int = 1
    precision: str = "fp32"
    base: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        needed = ("checkpoint", "tasks", "output")
        faults = [f"--{name} is missing: it is needed." for name in needed if not vars(self)[name]]
        if self.data is None and any("=" not in task for task in self.tasks):
            faults.append("--data is missing: name the folder with the files, or every file as --tasks TASK=FILE.")
        for name in ("samples", "limit", "batch_size", "max_length", "orders"):
            value = vars(self)[name]
            if value is not None and value < 1:
                faults.append(f"--{name.replace('_', '-')} is {value}: it must be at least 1.")
        names = [task.partition("=")[0] for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            faults.append(f"--tasks names {twice} twice: each has one file in a folder of results.")
        faults += [f"--tasks is {task}: a file is missing behind '='." for task in self.tasks if task.endswith("=")]
        faults += [f"--seeds holds {seed}: it must be at least 0." for seed in self.seeds if seed < 0]
        for name in ("tensor", "pipeline"):
            if vars(self)[name] < 1:
                faults.append(f"--{name} is {vars(self)[name]}: it must be at least 1.")
        if self.shots < 0:
            faults.append(f"--shots is {self.shots}: it must be at least 0.")
        without = [way for way in self.score if way in WITHOUT_SHOTS]
        if self.shots and without:
            faults.append(f"--score {without[0]} is asked without examples: leave out --shots.")
        if len(set(self.seeds)) < len(self.seeds):
            faults.append("--seeds holds a seed twice: each is one run.")
        if faults:
            raise ConfigError(faults)
