"""``megatron-med adapter``."""

from megatron_med.commands.convert_adapter import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
