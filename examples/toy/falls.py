"""Ends with code 1 where the loss of a run does not fall.

python examples/toy/falls.py RUN
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def main() -> None:
    run = Path(sys.argv[1])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines]
    count = max(1, len(losses) // 5)
    first, last = statistics.fmean(losses[:count]), statistics.fmean(losses[-count:])
    if not last < first:
        sys.exit(f"error: the loss of {run} did not fall: {first:.4f} in the first steps, {last:.4f} in the last ones")
    print(f"{run.name}: loss {first:.4f} -> {last:.4f} in {len(losses)} steps")


if __name__ == "__main__":
    main()
