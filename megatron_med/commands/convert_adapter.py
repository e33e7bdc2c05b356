"""Converts LoRA adapters between checkpoints and PEFT folders, and merges them into their base."""

from __future__ import annotations

from pathlib import Path

from megatron_med.checkpoint.huggingface.peft import export_adapter, import_adapter, open_adapter
from megatron_med.checkpoint.merge import merge_adapter
from megatron_med.commands.arguments import Parser


def main() -> None:
    parser = Parser(description=__doc__)
    directions = parser.add_subparsers(dest="direction", required=True)
    exporting = directions.add_parser("export", help="adapters of a run -> PEFT folder")
    importing = directions.add_parser("import", help="PEFT folder -> checkpoint of adapters")
    merging = directions.add_parser("merge", help="adapters and base -> checkpoint of a whole model")
    exporting.add_argument("--base-model", help="Hugging Face's name or folder of the base, for adapter_config.json")
    exporting.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        help="folders of megatron-med evaluate whose scores the model card tells",
    )
    merging.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the merged weights (default fp32)"
    )
    for direction, source in ((exporting, "RUN or step"), (importing, "PEFT_DIR"), (merging, "RUN or step")):
        direction.add_argument("--from", dest="source", type=Path, required=True, metavar=source)
        direction.add_argument("--to", dest="target", type=Path, required=True)
        direction.add_argument("--overwrite", action="store_true", help="replace what is in the target")
        direction.add_argument(
            "--base",
            type=Path,
            required=direction is importing,
            metavar="CHECKPOINT",
            help="the weights that the adapters stand beside"
            + ("" if direction is importing else " (default: where the run found them)"),
        )
    arguments = parser.parse_args()
    source, target, base = arguments.source, arguments.target, arguments.base
    if arguments.direction == "import":
        step = import_adapter(source, target, base, overwrite=arguments.overwrite)
        print(f"imported {source} to {step}")
    elif arguments.direction == "export":
        chosen = {"base_model": arguments.base_model, "results": arguments.results}
        export_adapter(source, target, base=base, overwrite=arguments.overwrite, **chosen)
        print(f"exported {source} to {target}")
    else:
        step, _ = open_adapter(source)
        change = merge_adapter(step, target, base=base, dtype=arguments.dtype, overwrite=arguments.overwrite)
        if arguments.dtype != "fp32":
            print(f"rounding to {arguments.dtype} changes the logits by up to {change:.2g}")
        print(f"merged {step} into {target}")
