"""tools/generate.py: files of prompts that a killed run goes on with, conversations, stop strings, refusals."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_med.tokenizer import load_tokenizer
from tests.cli.processes import environment, python, started_forked, started_ranks
from tests.conftest import REPOSITORY
from tests.small_models import write_small_llama

GENERATE = "tools/generate.py"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA:{% else %}"
    " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SAMPLED = ("--temperature", 1, "--top-k", 50, "--seed", 7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, sample_tokenizer: Path) -> Path:
    """A Hugging Face folder with random weights, the quickstart's tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    write_small_llama(folder, sample_tokenizer, 2, max_position_embeddings=128)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    end = load_tokenizer(folder).eod_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 511]}))
    return folder


def _write_prompts(path: Path, count: int) -> Path:
    lines = [{"id": number, "prompt": f"Patient {number} has" + " a fever" * (number % 7)} for number in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_killed_run_is_gone_on_with_every_line_once(model: Path, tmp_path: Path) -> None:
    prompts = _write_prompts(tmp_path / "in.jsonl", 40)
    common = ("--checkpoint", model, "--input", prompts, "--max-new-tokens", 30, *SAMPLED)
    assert python(GENERATE, *common, "--output", tmp_path / "whole.jsonl").returncode == 0
    out = tmp_path / "out.jsonl"
    command = [GENERATE, *map(str, common), "--output", str(out), "--batch-size", "2"]
    with started_forked(command) as process:
        deadline = time.monotonic() + 60
        while not (out.exists() and out.read_bytes().count(b"\n") >= 5):
            assert process.poll() is None, process.output()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    stood = out.read_bytes()
    assert 5 <= stood.count(b"\n") < 40, "the kill came in the middle"
    with out.open("ab") as file:
        file.write(b'{"id": 99, "prom')  # as a full page of a file that was cut would look
    assert python(*command).returncode == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes(), "neither batches nor kills change an answer"
    assert [record["id"] for record in _records(out)] == list(range(40))
    assert {"output", "output_ids", "end"} < _records(out)[0].keys()
    before = out.stat().st_mtime_ns
    assert python(*command).returncode == 0
    assert out.stat().st_mtime_ns == before


def test_replicas_of_a_grid_share_the_prompts(model: Path, tmp_path: Path) -> None:
    prompts = _write_prompts(tmp_path / "in.jsonl", 19)
    common = ("--checkpoint", model, "--input", prompts, "--max-new-tokens", 12, *SAMPLED)
    assert python(GENERATE, *common, "--output", tmp_path / "one.jsonl").returncode == 0
    options = (*common, "--tensor", 2, "--batch-size", 2, "--output", tmp_path / "four.jsonl")
    with started_ranks(range(4), 4, GENERATE, *options) as processes:
        for process in processes:
            assert process.wait(120) == 0, process.output()
    assert (tmp_path / "four.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_answers_of_other_prompts_or_settings_are_kept_apart(model: Path, tmp_path: Path) -> None:
    prompts, out = _write_prompts(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl"
    common = (GENERATE, "--checkpoint", model, "--output", out, "--max-new-tokens", 4)
    assert python(*common, "--input", prompts).returncode == 0
    answers = out.read_bytes()
    (tmp_path / "other.jsonl").write_text('{"prompt": "Something else"}\n')
    copied = tmp_path / "copied"
    shutil.copytree(model, copied)
    for options, message in (
        (("--input", prompts, "--seed", 3), "holds answers with seed 0, not 3"),
        (("--input", prompts, "--checkpoint", copied), "holds answers with checkpoint"),
        (("--input", tmp_path / "other.jsonl"), "line 1 of"),
        (("--input", prompts, "--output", prompts), "--input and --output are one file"),
    ):
        done = python(*common, *options)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert out.read_bytes() == answers
    assert python(*common, "--input", tmp_path / "other.jsonl", "--overwrite").returncode == 0
    assert len(_records(out)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl:3: broken JSON at column"),
        ('"text"', "in.jsonl:3: the line is no object"),
        ('{"text": "x"}', "in.jsonl:3: none of the fields prompt (text), prompt_ids (numbers), messages"),
        ('{"prompt": ""}', "in.jsonl:3: the prompt is empty"),
        ('{"prompt_ids": [5, 9999]}', "in.jsonl:3: the prompt holds the id 9999"),
        ('{"prompt_ids": [5, true]}', "in.jsonl:3: none of the fields"),
        (json.dumps({"prompt": "fever " * 200}), "max_position_embeddings"),
        ('{"messages": [{"role": "user"}]}', "in.jsonl:3: none of the fields"),
    ],
)
def test_a_line_that_cannot_be_answered_is_named_before_anything_is_written(
    model: Path, tmp_path: Path, line: str, message: str
) -> None:
    path = _write_prompts(tmp_path / "in.jsonl", 2)
    path.write_text(path.read_text() + line + "\n")
    done = python(GENERATE, "--checkpoint", model, "--input", path, "--output", tmp_path / "out.jsonl")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_messages_are_rendered_with_the_models_template(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "Is it a fever?"}]}\n')
    options = ("--checkpoint", model, "--max-new-tokens", 8)
    done = python(GENERATE, *options, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    ids = tokenizer.encode("Q: Is it a fever?\nA:")
    plain = python(GENERATE, *options, "--prompt-ids", *ids)
    (record,) = _records(tmp_path / "out.jsonl")
    assert plain.stdout == tokenizer.decode([*ids, *record["output_ids"]]) + "\n"


def test_stop_strings_end_an_answer_and_do_not_belong_to_it(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "Fever"}\n')
    common = ("--checkpoint", model, "--input", prompts, "--max-new-tokens", 30, *SAMPLED)

    def answer(name: str, *options: object) -> dict[str, Any]:
        done = python(GENERATE, *common, "--output", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
        return _records(tmp_path / name)[0]

    plain = answer("plain.jsonl")
    stop = plain["output"][len(plain["output"]) // 2 :][:3]
    cut = answer("cut.jsonl", "--stop", "never to be seen", stop)
    assert cut["output"] == plain["output"][: plain["output"].index(stop)]
    assert cut["end"] == "stop_string"
    assert len(cut["output_ids"]) < len(plain["output_ids"])
    assert answer("never.jsonl", "--stop", "never to be seen") == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "The prompt is empty"),
        (("--prompt", "x", "--stop", ""), "a stop string is empty"),
        (("--prompt", "x", "--beams", 3, "--stop", "y"), "--beams writes whole answers"),
        (("--prompt", "x", "--beams", 3, "--temperature", 1), "leave out temperature"),
        (("--prompt", "x", "--min-p", 2), "min-p is 2.0"),
        (("--prompt", "x", "--batch-size", 0), "--batch-size is 0"),
        (("--input", "in.jsonl"), "--input and --output belong together"),
        (("--prompt", "x", "--tensor", 0), "--tensor is 0 and --pipeline 1: both must be at least 1"),
        (("--prompt", "x", "--base", "y"), "--base belongs to adapters"),
        (("--input", "absent.jsonl", "--output", "y.jsonl"), "absent.jsonl"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(model: Path, options: tuple[Any, ...], message: str) -> None:
    done = python(GENERATE, "--checkpoint", model, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_grid_that_the_model_cannot_be_cut_into(model: Path) -> None:
    options = ("--checkpoint", model, "--prompt", "x", "--tensor", 4)
    with started_ranks(range(4), 4, GENERATE, *options) as processes:
        for process in processes:
            assert process.wait(120) == 2
        assert "parallel.tensor is 4: it must divide model.num_query_groups" in processes[0].output()
        assert "Traceback" not in processes[0].output()


class _Terminal:
    """``generate.py --interactive`` on a terminal of its own."""

    def __init__(self, *options: object) -> None:
        self._ours, theirs = pty.openpty()
        command = [sys.executable, GENERATE, "--interactive", *map(str, options)]
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment() | {"TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def read_until(self, text: str, seconds: float = 60) -> str:
        """What has come since the last call, up to ``text``."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._ours], [], [], max(0, left))
            assert ready, f"no {text!r} in {seconds} s after {self.seen!r}"
            try:
                self.seen += os.read(self._ours, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:
                break
        found, _, self.seen = self.seen.partition(text)
        return found

    def close(self) -> int:
        os.close(self._ours)
        return self.process.wait(30)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_conversation_on_the_terminal(model: Path, tmp_path: Path) -> None:
    terminal = _Terminal("--checkpoint", model, "--max-new-tokens", 10)
    try:
        assert "keeps the conversation" in terminal.read_until("\n> ")
        messages: list[dict[str, str]] = []
        for question in ("Is it a fever?", "And now?"):
            terminal.type(question + "\n")
            terminal.read_until(question + "\n")
            answer = terminal.read_until("\n> ")
            messages.append({"role": "user", "content": question})
            (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
            files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--overwrite")
            done = python(GENERATE, "--checkpoint", model, "--max-new-tokens", 10, *files)
            assert done.returncode == 0, done.stderr
            (record,) = _records(tmp_path / "out.jsonl")
            assert answer.split() == record["output"].split(), "without the question, which is not repeated"
            messages.append({"role": "assistant", "content": record["output"]})
        terminal.type("/new\n")
        terminal.read_until("\n> ")
        time.sleep(0.3)  # the prompt is printed a moment before its line is read
        terminal.type("\x03")
        assert "Ctrl-C stops an answer" in terminal.read_until("\n> "), "Ctrl-C gives up what was typed"
        terminal.type("/quit\n")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.close()


def test_control_c_stops_an_answer_and_not_the_program(model: Path, tmp_path: Path) -> None:
    long = tmp_path / "long"
    shutil.copytree(model, long)
    settings = json.loads((long / "config.json").read_text()) | {"max_position_embeddings": 100_000}
    (long / "config.json").write_text(json.dumps(settings))
    (long / "tokenizer_config.json").write_text(
        json.dumps(
            {k: v for k, v in json.loads((long / "tokenizer_config.json").read_text()).items() if "chat" not in k}
        )
    )
    terminal = _Terminal("--checkpoint", long, "--max-new-tokens", 90_000, "--temperature", 1.5)
    try:
        assert "has no chat template" in terminal.read_until("\n> ")
        for _ in range(2):
            terminal.type("Fever is\n")
            terminal.read_until("Fever is\n")
            terminal.read_until("a", 30)  # the answer streams
            terminal.type("\x03")
            terminal.read_until("\n> ", 30)
            assert terminal.process.poll() is None
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.close()


def test_prompts_and_foreign_files_are_never_replaced(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Fever"}\n')
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine\n")
    for output in (prompts, foreign):
        arguments = ("--checkpoint", model, "--input", prompts, "--output", output, "--overwrite")
        done = python("tools/generate.py", *arguments, "--max-new-tokens", 2)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
    assert foreign.read_text() == "mine\n"
    assert prompts.read_text() == '{"prompt": "Fever"}\n'
    for line, message in (
        ('{"prompt": "a", "prompt_ids": [1]}', "prompts.jsonl:1: prompt and prompt_ids are both there"),
        ('{"messages": []}', "prompts.jsonl:1: messages is empty"),
        ('{"prompt": "\\ud800"}', "prompts.jsonl:1: a text holds half of a character"),
    ):
        prompts.write_text(line + "\n")
        arguments = ("--checkpoint", model, "--input", prompts, "--output", tmp_path / "answers.jsonl")
        done = python("tools/generate.py", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
