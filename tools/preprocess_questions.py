"""``megatron-med preprocess-questions``."""

from megatron_med.commands.preprocess_questions import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
