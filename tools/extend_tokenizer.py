"""``megatron-med extend-tokenizer``."""

from megatron_med.commands.extend_tokenizer import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
