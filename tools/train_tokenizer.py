"""``megatron-med train-tokenizer``."""

from megatron_med.commands.train_tokenizer import main
from megatron_med.errors import run_command

if __name__ == "__main__":
    run_command(main)
