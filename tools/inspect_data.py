"""``megatron-med inspect``."""

from megatron_med.commands.inspect_data import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
