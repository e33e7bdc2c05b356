"""``megatron-med compare``."""

from megatron_med.commands.compare_results import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
