"""``megatron-med draw-schedule``."""

from megatron_med.commands.draw_schedule import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
