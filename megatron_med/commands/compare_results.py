"""Puts results of megatron-med evaluate side by side, with the published tables of the four systems.

    megatron-med compare results/base results/tuned --output comparison

Writes comparison.md, comparison.png and comparison.json. Runs that share a task must have been asked the same
questions; McNemar's exact test tells whether one of two is better on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_med.commands.arguments import Parser
from megatron_med.errors import ConfigError
from megatron_med.outputs import output_folder


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="--output folders of megatron-med evaluate")
    parser.add_argument("--output", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--overwrite", action="store_true", help="replace a comparison that stands there")
    arguments = parser.parse_args()
    try:
        from megatron_med.evaluate.compare import read_runs
        from megatron_med.evaluate.comparison import write_comparison
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'megatron_med[evaluate]'.") from error
    runs = read_runs(arguments.results)
    with output_folder(arguments.output, arguments.overwrite) as folder:
        text = write_comparison(runs, folder)
    print(text)
    print(f"comparison: {arguments.output}")
