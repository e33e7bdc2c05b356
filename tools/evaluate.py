"""``megatron-med evaluate``."""

import sys
from pathlib import Path

from megatron_med.commands.evaluate import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path) != here]  # lm-eval imports a library of this file's name
    run_command(main)
