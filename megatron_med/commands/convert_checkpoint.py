"""Converts between Hugging Face folders and checkpoints."""

from __future__ import annotations

from pathlib import Path

from megatron_med.checkpoint.huggingface.convert import export_huggingface, import_huggingface
from megatron_med.commands.arguments import Parser


def main() -> None:
    parser = Parser(description=__doc__)
    directions = parser.add_subparsers(dest="direction", required=True)
    told = "A Hugging Face folder becomes a checkpoint that any grid loads."
    importing = directions.add_parser("import", help="Hugging Face folder -> checkpoint", description=told)
    importing.add_argument("--tokenizer", help="used instead of the folder's own")
    told = "A run or checkpoint becomes a Hugging Face folder, with a model card."
    exporting = directions.add_parser("export", help="checkpoint -> Hugging Face folder", description=told)
    exporting.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: as trained)")
    exporting.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        help="folders of megatron-med evaluate whose scores the model card tells",
    )
    from_hub = ("HF_DIR", "folder with config.json and weights")
    from_run = ("RUN", "RUN, RUN/checkpoints or one step")
    for direction, (source, what) in ((importing, from_hub), (exporting, from_run)):
        direction.add_argument("--from", dest="source", type=Path, required=True, metavar=source, help=what)
        direction.add_argument("--to", dest="target", type=Path, required=True, metavar="DIR", help="folder to write")
        direction.add_argument("--verify", action="store_true", help="compare the logits of both models first")
        direction.add_argument("--overwrite", action="store_true", help="replace what is in the target")
    arguments = parser.parse_args()
    options = {"verify": arguments.verify, "overwrite": arguments.overwrite}
    if arguments.direction == "import":
        step = import_huggingface(arguments.source, arguments.target, tokenizer=arguments.tokenizer, **options)
        print(f"imported {arguments.source} to {step}")
    else:
        export_huggingface(
            arguments.source, arguments.target, dtype=arguments.dtype, results=arguments.results, **options
        )
        print(f"exported {arguments.source} to {arguments.target}")
