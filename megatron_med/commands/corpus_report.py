"""Writes one HTML page about a corpus that megatron-med corpus build has built, with pictures and examples."""

from __future__ import annotations

from pathlib import Path

from megatron_med.commands.arguments import Parser
from megatron_med.errors import ConfigError
from megatron_med.outputs import refuse_existing


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="folder with manifest.json")
    parser.add_argument("--output", type=Path, help="the page (default: CORPUS/report.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    arguments = parser.parse_args()
    try:
        from megatron_med.corpus.page import render
        from megatron_med.corpus.report import gather
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'megatron_med[corpus,plot]'.") from error
    target = arguments.output or arguments.corpus / "report.html"
    refuse_existing(target, arguments.overwrite)
    facts = gather(arguments.corpus)
    target.write_text(render(facts), encoding="utf-8")
    print(f"{target}: {sum(s.kept for s in facts.sources.values()):,} documents of {len(facts.sources)} sources")
