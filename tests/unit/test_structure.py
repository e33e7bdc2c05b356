"""The shape of the code: imports point one way, and what must start fast imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "megatron_med"
LEVELS = {
    "__version__": 0,
    "errors": 0,
    "files": 0,
    "progress": 0,
    "words": 0,
    "outputs": 1,
    "page": 1,
    "config": 1,
    "kernels": 2,
    "parallel": 3,
    "launch": 4,
    "tracing": 5,
    "model": 6,
    "tokenizer": 7,
    "data": 7,
    "corpus": 8,
    "optim": 9,
    "checkpoint": 10,
    "inference": 11,
    "train": 12,
    "evaluate": 13,
    "plan": 13,
    "commands": 14,
    "api": 14,
}
ORDERED_WITHIN_A_LEVEL = {("data", "tokenizer")}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)  # modules among them, or names in it
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] == "__init__":
        return
    own = parts[0]
    for module in _imports(path):
        if not module.startswith("megatron_med."):
            continue
        other = module.split(".")[1]
        allowed = LEVELS[other] < LEVELS[own] or other == own or (own, other) in ORDERED_WITHIN_A_LEVEL
        assert allowed, f"{path} imports {module}: {own} must not know {other}"


def test_no_module_imports_itself_by_way_of_another() -> None:
    """Module by module, imports inside functions included: a package, too, can be read in the order of its imports."""
    modules = {_module(path): path for path in _files()}
    graph = {module: {name for name in _imports(path) if name in modules} for module, path in modules.items()}
    TopologicalSorter(graph).prepare()  # names a cycle


def _module(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_files_are_put_in_place_and_hashed_in_one_module() -> None:
    """Beside it only what is more than a file: the commit of a checkpoint, a token file that a killed run goes on with,
    a fingerprint of parts of a file."""
    users: dict[str, set[str]] = {}
    for path in _files():
        for word in ("os.replace(", "file_digest("):
            if word in path.read_text(encoding="utf-8"):
                users.setdefault(word, set()).add(_module(path).removeprefix("megatron_med."))
    assert users == {
        "os.replace(": {"files", "checkpoint.folder", "data.indexed_writer"},
        "file_digest(": {"files", "data.gpt"},
    }


def test_the_fake_world_stays_out_of_real_runs() -> None:
    """torch's fake backend is of its test suite: one module imports it, for what runs without a cluster on purpose."""
    users = [_module(path) for path in _files() if any(name.startswith("torch.testing") for name in _imports(path))]
    assert users == ["megatron_med.launch.fake"]
    code = (
        "import sys\n"
        "import megatron_med.train.loop, megatron_med.train.setup, megatron_med.launch.process_group\n"
        "import megatron_med.inference.load, megatron_med.checkpoint.huggingface.convert\n"
        "assert 'megatron_med.launch.fake' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


WITHOUT_TORCH = [
    "megatron_med",
    "megatron_med.errors",
    "megatron_med.files",
    "megatron_med.kernels",
    "megatron_med.kernels.backend",
    "megatron_med.config",
    "megatron_med.tokenizer",
    "megatron_med.tokenizer.train",
    "megatron_med.tokenizer.special",
    "megatron_med.tokenizer.chat",
    "megatron_med.tokenizer.fast",
    "megatron_med.data",
    "megatron_med.data.indexed",
    "megatron_med.data.preprocess",
    "megatron_med.data.preprocess_instructions",
    "megatron_med.data.indexed_writer",
    "megatron_med.data.prefetch",
    "megatron_med.corpus",
    "megatron_med.corpus.s2orc",
    "megatron_med.corpus.recipe",
    "megatron_med.corpus.build",
    "megatron_med.corpus.page",
    "megatron_med.parallel",
    "megatron_med.parallel.pipeline_parallel.schedule",
    "megatron_med.parallel.pipeline_parallel.simulation",
    "megatron_med.launch",
    "megatron_med.tracing",
    "megatron_med.tracing.trace",
    "megatron_med.plan.cluster",
    "megatron_med.plan.cost_model",
    "megatron_med.model",
    "megatron_med.optim",
    "megatron_med.checkpoint",
    "megatron_med.checkpoint.folder",
    "megatron_med.train",
    "megatron_med.inference",
]


def test_what_must_start_fast_imports_no_torch() -> None:
    """One interpreter imports them one after the other and names the first that brings torch."""
    code = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    assert 'torch' not in sys.modules, module + ' imports torch'"
    )
    command = [sys.executable, "-c", code, *WITHOUT_TORCH]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_can_be_read_in_one_sitting() -> None:
    long = [str(path) for path in _files() if len(path.read_text(encoding="utf-8").splitlines()) > 500]
    assert not long
