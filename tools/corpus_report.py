"""``megatron-med corpus report``."""

from megatron_med.commands.corpus_report import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
