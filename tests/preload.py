"""What the server of test processes loads before it forks: seconds that each of them would spend."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from contextlib import suppress
from importlib import import_module

from megatron_med.launch.collection import uncollected

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
    "torch._subclasses.schema_check_mode",  # of the first backward pass
    "torch.profiler._cupti_monitor",
    "torch.utils.serialization.config",
    "hypothesis",  # test modules that hold a function of the ranks bring them
    "pytest",
)
EXTRAS = (
    "megatron_med.kernels.fused",  # which is built where there is a compiler
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

with uncollected():
    for name in (*(f"megatron_med.{module}" for module in OURS), *OTHERS):
        import_module(name)
    for name in EXTRAS:
        with suppress(ImportError, AssertionError):
            import_module(name)

import_module("torch").set_num_threads(1)
