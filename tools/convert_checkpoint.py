"""``megatron-med import`` and ``megatron-med export``."""

from megatron_med.commands.convert_checkpoint import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
