"""Builds a training corpus from raw records, as a recipe says: text, manifest and token files."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from megatron_med.commands.arguments import Parser
from megatron_med.errors import ConfigError


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("recipe", type=Path, help="YAML, such as examples/gap_replay/corpus.yaml")
    parser.add_argument("--output", help="folder, in place of the recipe's")
    parser.add_argument("--workers", type=int, help="tasks at once, in place of the recipe's")
    parser.add_argument("--stage", nargs="+", default=["*"], metavar="NAME", help="only these; see --list")
    parser.add_argument("--list", action="store_true", help="print the stages and their tasks, do nothing")
    parser.add_argument("--verify", action="store_true", help="compare the finished corpus with its manifest")
    arguments = parser.parse_args()
    try:
        from megatron_med.corpus.build import Build
        from megatron_med.corpus.manifest import verify_manifest
        from megatron_med.corpus.recipe import load_recipe
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'megatron_med[corpus]'.") from error
    recipe = load_recipe(arguments.recipe)
    recipe.output = arguments.output or recipe.output
    if arguments.workers is not None:
        if arguments.workers < 1:
            raise ConfigError(f"--workers is {arguments.workers}: at least 1 is needed.")
        recipe.execution.workers = arguments.workers
    build = Build(recipe)
    names = [stage.name for stage in build.stages()]
    if arguments.list:
        for stage in build.stages():
            print(f"{stage.name:20} {stage.tasks:,} tasks")
        return
    if arguments.verify:
        print(f"{build.root}: {verify_manifest(build.root):,} shards are as the manifest says")
        return
    unknown = [pattern for pattern in arguments.stage if not fnmatch.filter(names, pattern)]
    if unknown:
        raise ConfigError(f"--stage {' '.join(unknown)} names no stage. There are: {', '.join(names)}.")
    build.run(lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in arguments.stage), print)
