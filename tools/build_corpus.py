"""``megatron-med corpus build``."""

from megatron_med.commands.build_corpus import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
