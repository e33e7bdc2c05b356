"""``megatron-med plan``."""

from megatron_med.commands.plan import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
