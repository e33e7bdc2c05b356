"""What the server of test processes loads before it forks: seconds that each of them would spend."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from contextlib import suppress

import torch
import torch.distributed.checkpoint
import torch.distributed.tensor

import megatron_med.checkpoint.huggingface.convert
import megatron_med.inference.engine
import megatron_med.inference.load
import megatron_med.inference.scoring
import megatron_med.plan.search
import megatron_med.train.loop
import megatron_med.train.setup

with suppress(ImportError):  # extras
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

with suppress(ImportError):
    import megatron_med.evaluate.language_model
    import megatron_med.evaluate.runner  # noqa: F401

torch.set_num_threads(1)
