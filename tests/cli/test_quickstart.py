"""What the README promises first: one command from text to a Hugging Face model and generated text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.processes import read_metrics
from tests.conftest import REPOSITORY, SAMPLE

RUN = REPOSITORY / "examples" / "quickstart" / "run.sh"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_runs_on_the_users_own_text(tmp_path: Path, forked_environment: dict[str, str]) -> None:
    """With ``--data``, from another folder, in this environment."""
    if not list(Path(sys.prefix).glob(".megatron_med-*")):
        pytest.skip("this environment was not made by tools/setup_env.sh: run.sh would make another one")
    own = tmp_path / "own text.jsonl"
    shutil.copy(SAMPLE, own)
    output = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(RUN), "--data", str(own), "--output", str(output)],
        cwd=tmp_path,
        env=forked_environment,
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    metrics = read_metrics(output / "run")
    assert [line["step"] for line in metrics] == list(range(1, 121))
    assert metrics[-1]["valid_loss"] < 3.5
    assert "verified: logits" in done.stdout
    text = done.stdout.split("== generation")[1]
    assert "People with heart failure may notice" in text

    tokenizer = AutoTokenizer.from_pretrained(output / "huggingface")
    model = AutoModelForCausalLM.from_pretrained(output / "huggingface")
    ids = tokenizer("The main causes are", return_tensors="pt").input_ids
    continued = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0])
    assert continued.startswith("The main causes are")
    assert json.loads((output / "huggingface" / "config.json").read_text())["vocab_size"] == 1024


def test_wrong_options_are_told(tmp_path: Path) -> None:
    for arguments, message in (
        (["--dat", "x"], "unknown option --dat"),
        (["--data", "absent.jsonl"], "no file absent"),
    ):
        done = subprocess.run(["bash", str(RUN), *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert message in done.stderr
