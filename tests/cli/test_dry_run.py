"""The dry run: every recipe on ranks of a cluster that is not there, and what it refuses."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from megatron_med.checkpoint.folder import step_folder
from megatron_med.config import load_config
from megatron_med.plan.cluster import GIB, parse_cluster
from megatron_med.plan.predict import plan
from tests.cli.processes import TIMEOUT, TRAIN, started_forked, train, write_config
from tests.conftest import REPOSITORY

RECIPES = sorted(
    path.with_suffix(".yaml")
    for path in (REPOSITORY / "examples").glob("*/*.sbatch")
    if path.parent.name != "meditron" and path.stem != "13b"  # a link, and the same as 7b but for its size
)
LAPTOP = [
    *sorted((REPOSITORY / "examples" / "quickstart").glob("*.yaml")),
    REPOSITORY / "examples" / "gap_replay" / "sample_run.yaml",
]
PLAN_COMMAND = re.compile(r"python tools/plan\.py (\S+) --cluster (\S+)(?: --nics (\d+))?")


def _cluster_of(recipe: Path) -> tuple[str, int | None]:
    """Cluster and network cards of the plan command in a recipe's first lines."""
    found = PLAN_COMMAND.search(recipe.read_text())
    assert found is not None, f"{recipe} does not say for which cluster it is"
    assert REPOSITORY / found[1] == recipe
    return found[2], int(found[3]) if found[3] else None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_passes_on_the_first_a_middle_and_the_last_rank(recipe: Path) -> None:
    """Without a pipeline all ranks run the same, and so do all layers: the last one, whose slices may be shorter, is
    started, with one micro-batch and some layers."""
    world_size = parse_cluster(_cluster_of(recipe)[0]).world_size
    config = load_config([str(recipe)], world_size)
    ranks, batches = [0, world_size // 2 + 5, world_size - 1], "2"
    layers: tuple[str, ...] = ()
    if config.parallel.pipeline == 1:
        ranks, batches, layers = ranks[-1:], "1", ("--model.num_layers", "8")
    with ExitStack() as stack:
        commands = (
            [*TRAIN, str(recipe), *map(str, _world(world_size, rank)), "--micro-batches", batches, *layers]
            for rank in ranks
        )
        processes = [stack.enter_context(started_forked(command)) for command in commands]
        done = [process.communicate(TIMEOUT) for process in processes]
    sources = config.data.train
    for rank, one in zip(ranks, done, strict=True):
        assert one.returncode == 0, one.stderr[-3000:]
        assert one.stderr == ""
        assert f"rank {rank} of {world_size}" in one.stdout
        assert "step 2: peak memory" in one.stdout
        assert all(f"absent: {source.path}.bin" in one.stdout for source in sources)


@pytest.mark.parametrize("recipe", LAPTOP, ids=lambda path: path.stem)
def test_every_laptop_recipe_passes_on_a_first_a_middle_and_its_last_rank(recipe: Path) -> None:
    world_size, ranks = (1, [0]) if recipe.stem == "tuning" else (8, [0, 5, 7])
    for rank in ranks:
        world = _world(world_size, rank)
        done = train(recipe, "--data.train", "[{path: none}]", "--data.valid", "[{path: none}]", *world)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_fits_its_cluster(recipe: Path) -> None:
    name, nics = _cluster_of(recipe)
    cluster = parse_cluster(name, nics)
    assert plan(load_config([str(recipe)], cluster.world_size), cluster).fits


def test_rank_77_of_the_70b_takes_the_memory_that_is_planned() -> None:
    recipe = REPOSITORY / "examples" / "gap_replay" / "70b.yaml"
    done = train(recipe, *_world(128, 77))
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = [float(peak) for peak in re.findall(r"peak memory ([\d.]+) GiB", done.stdout)]
    cluster = parse_cluster("a100-80g:16x8")
    stage = plan(load_config([str(recipe)], 128), cluster).stages[77 // 16]
    assert len(peaks) == 2
    assert peaks == pytest.approx([stage.memory.total / GIB] * 2, rel=0.05)
    assert f"{stage.parameters:,} parameters" in done.stdout


def test_what_is_there_is_used_and_checked(sample_data: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        sample_data,
        model={"preset": "llama-tiny", "vocab_size": 512},
        data={"sequence_length": 64},
        train={"steps": 1, "global_batch_size": 4, "micro_batch_size": 1},
    )
    done = train(config)
    assert done.returncode == 0, done.stderr[-2000:]
    checkpoint = step_folder(tmp_path / "run" / "checkpoints", 1)
    load = ("--checkpoint.load", checkpoint, "--checkpoint.load_state", "all")
    other = tmp_path / "other"
    done = train(config, *load, "--parallel.tensor", 2, "--train.output_dir", other, *_world(4, 3))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "absent" not in done.stdout
    assert f"{checkpoint} fits" in done.stdout
    assert not other.exists(), "a dry run writes nothing"

    done = train(config, *load, "--model.num_layers", 3, *_world(4, 3))
    assert done.returncode == 2
    assert "num_layers is 4 in the checkpoint and 3" in done.stderr

    done = train(config, "--model.vocab_size", 256, *_world(4, 3))
    assert done.returncode == 2
    assert "512 pieces" in done.stderr


def test_a_checkpoint_whose_tensors_are_of_another_shape_is_refused(sample_data: Path, tmp_path: Path) -> None:
    """Its description was changed by hand, the tensors were not."""
    model = {"preset": "llama-tiny", "vocab_size": 512}
    config = write_config(
        tmp_path,
        sample_data,
        model=model,
        data={"sequence_length": 64},
        train={"steps": 1, "global_batch_size": 4, "micro_batch_size": 1},
    )
    assert train(config).returncode == 0
    checkpoint = step_folder(tmp_path / "run" / "checkpoints", 1)
    state = json.loads((checkpoint / "state.json").read_text())
    state["model"]["ffn_hidden_size"] = 704
    (checkpoint / "state.json").write_text(json.dumps(state))
    done = train(config, "--checkpoint.load", checkpoint, "--model.ffn_hidden_size", 704, *_world(2, 0))
    assert done.returncode == 2
    assert "mlp.down.weight as [128, 352], the model as [128, 704]" in done.stderr


def test_bad_places_in_the_world_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    tree = {
        "model": {"preset": "llama-tiny"},
        "data": {"sequence_length": 64, "train": [{"path": "none"}]},
        "train": {"steps": 1, "global_batch_size": 8, "output_dir": str(tmp_path / "run")},
    }
    config.write_text(yaml.safe_dump(tree))
    done = train(config, *_world(8, 8))
    assert done.returncode == 2
    assert "--rank is 8: it must lie between 0 and --world-size - 1 = 7" in done.stderr
    done = train(config, "--parallel.tensor", 3, *_world(8, 0))
    assert done.returncode == 2
    assert "parallel.tensor x parallel.pipeline" in done.stderr
    done = train(config, *_world(0, 0))
    assert "--world-size is 0" in done.stderr
    done = train(config, *_world(8, 0), "--micro-batches", -3)
    assert done.returncode == 2
    assert "--micro-batches -3" in done.stderr
    done = train(config, "--dry-run")
    assert done.returncode == 2
    assert "--world-size" in done.stderr


def _world(size: int, rank: int) -> tuple[object, ...]:
    return "--dry-run", "--world-size", size, "--rank", rank
