"""Times of contestants that took turns: medians, ratios of pairs, and how far these spread. As a table and as JSON.

python tools/benchmark/report.py FILE      the tables of a file that all.sh has written
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

BUSY = 0.15
"""Half of the ratios of a quiet machine lie closer together than this share of their median."""


@dataclass(frozen=True)
class Ratio:
    """How often faster the first is than the others, round by round.

    Attributes:
        median: of the rounds' ratios.
        spread: distance of their quartiles, as a share of the median.
    """

    median: float
    spread: float

    @classmethod
    def of(cls, seconds: Sequence[float], other: Sequence[float]) -> Ratio:
        """Of two contestants' rounds, in the order in which they took turns."""
        ratios = [theirs / mine for mine, theirs in zip(seconds, other, strict=True)]
        median = statistics.median(ratios)
        if len(ratios) < 2:
            return cls(median, 0.0)
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, (high - low) / median)


@dataclass
class Report:
    """What a benchmark measured.

    Attributes:
        name: of the benchmark.
        settings: that it ran with.
        rows: a table, each row by column name.
        left_out: contestants that could not take part, and why.
    """

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add_turns(self, seconds: Mapping[str, Sequence[float]], **more: Any) -> None:
        """A row for every contestant; ratios are those of the first one over it."""
        first = next(iter(seconds.values()))
        for name, times in seconds.items():
            ratio = Ratio.of(first, times)
            row = {"contestant": name, "ms": 1e3 * statistics.median(times), "ratio": ratio.median}
            self.rows.append(row | {"spread": ratio.spread} | more)

    def show(self) -> None:
        """The settings in a line, and the table."""
        print(", ".join(f"{name} {value}" for name, value in self.settings.items()))
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for row in self.rows:
            print("| " + " | ".join(_told(row.get(column)) for column in columns) + " |")
        for contestant, reason in self.left_out.items():
            print(f"left out: {contestant}, {reason}")
        spread = max((row.get("spread", 0.0) for row in self.rows), default=0.0)
        if spread > BUSY:
            print(f"the machine is busy: half of the ratios of a pair lie {spread:.0%} apart; measure again")

    def write(self, path: Path) -> None:
        """Puts it into a file beside what other benchmarks have put there."""
        whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": machine(), "results": {}}
        whole["results"][self.name] = asdict(self)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _told(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def machine() -> dict[str, Any]:
    """What it ran on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": model,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """``--json FILE``: results are added to a file of several benchmarks."""
    parser.add_argument("--json", type=Path, help="adds the results to this file")


def read(path: Path) -> tuple[dict[str, Any], list[Report]]:
    """The machine, and what was measured on it."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    return whole["machine"], [Report(**result) for result in whole["results"].values()]


def in_own_process(arguments: Sequence[str]) -> dict[str, Any]:
    """Runs a benchmark's script again in a process of its own and reads the JSON object of its last line."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"code {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    found, reports = read(parser.parse_args().file)
    print(", ".join(f"{name} {value}" for name, value in found.items() if value is not None))
    for report in reports:
        print(f"\n### {report.name}\n")
        report.show()


if __name__ == "__main__":
    main()
