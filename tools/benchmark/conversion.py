"""Import and export of a model against transformers' load and save of the same folder: seconds in turns, and memory.

    python tools/benchmark/conversion.py --scratch /scratch --repeat 3

The model has the shape of TinyLlama 1.1B, in bf16, with random weights. Every turn is a process of its own, timed from
its start to its end, after a sync; the order turns round, since new files cost more or less by what was freed before.
Memory is the growth of anonymous memory over the level after the imports. It takes five times the model's size.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import Report, add_json_argument

from megatron_med.errors import run_command

GIB = 2**30

_MAKE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers={layers},
                     num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048)
LlamaForCausalLM(config).save_pretrained("{folder}/hf")
"""

_TURNS = {
    "import": (
        "from megatron_med.checkpoint.huggingface.convert import import_huggingface",
        'import_huggingface(Path("{folder}/hf"), Path("{folder}/import"))',
    ),
    "export": (
        "from megatron_med.checkpoint.huggingface.convert import export_huggingface",
        'export_huggingface(Path("{folder}/import"), Path("{folder}/export"))',
    ),
    "transformers": (
        "from transformers import LlamaForCausalLM",
        'LlamaForCausalLM.from_pretrained("{folder}/hf", dtype="auto").save_pretrained("{folder}/transformers")',
    ),
}

_TIMED = """
import threading
from pathlib import Path
import torch
{imports}

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

before, most, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.01):
        most[0] = max(most[0], anonymous())
watching = threading.Thread(target=watch, daemon=True)
watching.start()
{call}
done.set()
watching.join()
print(most[0] - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="gets a folder of its own")
    parser.add_argument("--repeat", type=int, default=3)
    add_json_argument(parser)
    arguments = parser.parse_args()
    arguments.folder = Path(tempfile.mkdtemp(prefix="conversion-", dir=arguments.scratch))
    _run(_MAKE.format(folder=arguments.folder, layers=arguments.layers))
    seconds: dict[str, list[float]] = {name: [] for name in _TURNS}
    memory = dict.fromkeys(_TURNS, 0.0)
    _run(_TIMED.format(imports=_TURNS["import"][0], call=_TURNS["import"][1].format(folder=arguments.folder)))
    names = list(_TURNS)
    for turn in range(arguments.repeat * len(names)):
        name = names[(turn + turn // len(names)) % len(names)]
        imports, call = _TURNS[name]
        shutil.rmtree(arguments.folder / name, ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        held = _run(_TIMED.format(imports=imports, call=call.format(folder=arguments.folder)))
        seconds[name].append(time.perf_counter() - start)
        memory[name] = max(memory[name], float(held))
    shutil.rmtree(arguments.folder)
    report = Report("conversion", {"layers": arguments.layers, "rounds": arguments.repeat})
    report.add_turns({name: seconds[name] for name in ("transformers", "import", "export")})
    for row in report.rows:
        row["GiB"] = memory[row["contestant"]] / GIB
    report.show()
    if arguments.json:
        report.write(arguments.json)


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


if __name__ == "__main__":
    run_command(main)
