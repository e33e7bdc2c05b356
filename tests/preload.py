"""What the server of test processes loads before it forks: seconds that each of them would spend."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from contextlib import suppress
from importlib import import_module

import torch

OURS = (
    "checkpoint.huggingface.convert",
    "inference.engine",
    "inference.load",
    "inference.scoring",
    "plan.search",
    "train.loop",
    "train.setup",
)
OTHERS = (
    "torch.distributed.checkpoint",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "torch.utils.serialization.config",
    "hypothesis",  # test modules that hold a function of the ranks bring them
    "pytest",
)
EXTRAS = (
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "peft",
    "torch.utils.tensorboard",
    "matplotlib.backends.backend_svg",
    "matplotlib.pyplot",
    "mpl_toolkits.axes_grid1",
    "megatron_med.evaluate.language_model",
    "megatron_med.evaluate.runner",
)

for name in (*(f"megatron_med.{module}" for module in OURS), *OTHERS):
    import_module(name)
for name in EXTRAS:
    with suppress(ImportError):
        import_module(name)

torch.set_num_threads(1)
