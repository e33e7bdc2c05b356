"""``megatron-med preprocess-instructions``."""

from megatron_med.commands.preprocess_instructions import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
