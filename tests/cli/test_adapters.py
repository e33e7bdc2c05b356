"""LoRA from the command line: a base, adapters on one grid and another, PEFT folders, merging, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_med.checkpoint.folder import resolve_checkpoint
from megatron_med.checkpoint.huggingface.verify import logits_of
from megatron_med.checkpoint.load import load_stage
from megatron_med.parallel.context import single_process_context
from megatron_med.tokenizer.special import CHAT_TOKENS, extend_tokenizer
from tests.cli.processes import python, read_metrics, train, train_on_ranks, write_config
from tests.training import stored_entries

CONVERT, ADAPTER = "tools/convert_checkpoint.py", "tools/convert_adapter.py"
LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"]}


def _succeeded(*arguments: object) -> str:
    done = python(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _refused(message: str, *arguments: object) -> None:
    done = python(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as the hub has them."""
    folder = tmp_path_factory.mktemp("hub") / "hf"
    torch.manual_seed(1)
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes = {"intermediate_size": 704, "vocab_size": 512, "max_position_embeddings": 640}
    LlamaForCausalLM(LlamaConfig(**shape, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(huggingface: Path, sample_tokenizer: Path) -> Path:
    """The same as a checkpoint."""
    target = huggingface.parent / "base"
    _succeeded(CONVERT, "import", "--from", huggingface, "--tokenizer", sample_tokenizer, "--to", target)
    return target


@pytest.fixture(scope="module")
def chat_tokenizer(sample_tokenizer: Path, huggingface: Path) -> Path:
    extend_tokenizer(sample_tokenizer, CHAT_TOKENS, huggingface.parent / "chat")
    return huggingface.parent / "chat"


@pytest.fixture(scope="module")
def data(shared: Path, sample_tokenizer: Path, chat_tokenizer: Path, huggingface: Path) -> Path:
    """Real questions and answers in two templates: ``alpaca``, and ``chatml`` with two tokens that the base lacks."""
    folder = huggingface.parent / "data"
    folder.mkdir()
    lines = (shared / "instruct" / "medquad_qa.jsonl").read_text().split("\n")[:330]
    short = [line for line in lines if line and len(line) < 1500][:160]
    (folder / "raw.jsonl").write_text("\n".join(short) + "\n")
    for template, tokenizer in (("alpaca", sample_tokenizer), ("chatml", chat_tokenizer)):
        options = ("--template", template, "--tokenizer", tokenizer, "--output-prefix", folder / template)
        _succeeded("tools/preprocess_instructions.py", "--input", folder / "raw.jsonl", *options)
    return folder


def _config(folder: Path, data: Path, base: Path, **lora: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(
        folder,
        data / "alpaca",
        model={
            "family": "llama",
            "num_layers": 4,
            "hidden_size": 256,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "ffn_hidden_size": 704,
            "vocab_size": 512,
            "max_position_embeddings": 640,
            "norm_eps": 1e-6,
        },
        data={"sequence_length": 320, "truncate": "right"},
        train={"steps": 6, "micro_batch_size": 2},
        optimizer={"lr": 5e-3, "weight_decay": 0.0},
        lr_schedule={"name": "constant"},
        lora=LORA | lora,
        checkpoint={"load": str(base), "interval": 2, "keep": 0},
    )


@pytest.fixture(scope="module")
def tuned(data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one rank; ``run`` of it."""
    folder = tmp_path_factory.mktemp("tuned")
    done = train(_config(folder, data, base))
    assert done.returncode == 0, done.stderr
    assert "(base, frozen)" in done.stdout
    trained = 4 * 4 * (256 + 256 + 256 + 128 + 704 + 256)
    assert f"adapters of rank 4 on q_proj, v_proj, down_proj: {trained:,} parameters are trained" in done.stdout
    return folder / "run"


def _logits(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    return logits_of(load_stage(resolve_checkpoint(checkpoint), single_process_context(), torch.float32), ids)


IDS = torch.randint(512, (2, 60), generator=torch.Generator().manual_seed(2))


def test_only_adapters_are_saved_and_a_resume_on_another_grid_is_exact(
    tuned: Path, data: Path, base: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path, data, base)
    losses = [line["loss"] for line in read_metrics(tuned)]
    assert losses[-1] < losses[0] - 0.05
    grid = ("--parallel.tensor", 2, "--parallel.pipeline", 2)
    train_on_ranks(4, config, *grid, "--train.steps", 3)
    train_on_ranks(2, config, "--parallel.sharding", "full")
    again = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert again == pytest.approx(losses, rel=1e-5)
    step = resolve_checkpoint(tmp_path / "run")
    names = stored_entries(step)
    assert all(".lora." in name for name in names)
    assert len(names) == 3 * 2 * 3 * 4
    size, whole = (
        sum(path.stat().st_size for path in folder.rglob("*.distcp")) for folder in (step, resolve_checkpoint(base))
    )
    assert size < 0.05 * whole
    state = json.loads((step / "state.json").read_text())
    assert state["adapter"]["base"]["path"] == str(resolve_checkpoint(base).resolve())
    assert state["frozen"] == []


def test_beside_few_bits_a_run_goes_on_and_says_what_its_base_was(data: Path, base: Path, tmp_path: Path) -> None:
    """With the 8-bit optimizer; a resumed run is bitwise the one that went on, and a change is told."""
    smaller = ("--train.global_batch_size", 2, "--data.sequence_length", 256)
    options = ("--lora.rank", 16, "--optimizer.name", "adamw8bit", *smaller)
    config = _config(tmp_path, data, base)
    curves = []
    for name, stops in (("whole", [6]), ("stopped", [3, 6])):
        for stop in stops:
            run = ("--train.output_dir", tmp_path / name, "--train.steps", stop)
            done = train(config, *options, "--quantize.base", "int8", *run)
            assert done.returncode == 0, done.stderr
            assert "(base, frozen, its matrices in int8)" in done.stdout
        curves.append([line["loss"] for line in read_metrics(tmp_path / name)])
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0] - 0.05
    state = json.loads((resolve_checkpoint(tmp_path / "whole") / "state.json").read_text())
    assert state["adapter"]["quantize"] == {"base": "int8", "threshold": 6.0, "outliers": "bitsandbytes"}
    names = stored_entries(resolve_checkpoint(tmp_path / "whole"))
    assert any(name.startswith("optimizer.exp_avg_max.") for name in names)
    run = ("--train.output_dir", tmp_path / "stopped", "--train.steps", 7)
    done = train(config, *options, "--quantize.base", "nf4", "--optimizer.name", "adamw", *run)
    assert done.returncode == 0, done.stderr
    assert "changed from step 7 on: quantize.base int8 -> nf4" in done.stdout
    assert "were in 8 bit and go on in 32 bit" in done.stdout


def test_dropout_masks_are_those_of_a_run_that_was_never_stopped(data: Path, base: Path, tmp_path: Path) -> None:
    curves = []
    for name, stops in (("whole", [4]), ("stopped", [2, 4])):
        config = _config(tmp_path / name, data, base, dropout=0.2)
        for stop in stops:
            assert train(config, "--train.steps", stop).returncode == 0
        curves.append([line["loss"] for line in read_metrics(tmp_path / name / "run")])
    assert curves[0] == curves[1]


def test_peft_loads_ours_and_ours_loads_pefts(tuned: Path, huggingface: Path, base: Path, tmp_path: Path) -> None:
    _succeeded(ADAPTER, "export", "--from", tuned, "--to", tmp_path / "peft", "--base-model", huggingface)
    stored = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert stored["modules_to_save"] is None
    assert stored["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    template = AutoTokenizer.from_pretrained(tmp_path / "peft").chat_template
    assert "### Instruction" in template
    model = AutoModelForCausalLM.from_pretrained(huggingface, dtype=torch.float32)
    with torch.no_grad():
        alone = model(IDS).logits.clone()
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "peft")(IDS).logits
    ours = _logits(tuned, IDS)
    assert (ours - alone).abs().max() > 1e-2
    assert (ours - theirs).abs().max() < 1e-5
    importing = (ADAPTER, "import", "--from", tmp_path / "peft", "--base", base, "--to")
    _refused("which is read: name another target", *importing, base, "--overwrite")
    _refused("which is read: name another target", *importing, tmp_path / "peft", "--overwrite")
    _succeeded(*importing, tmp_path / "again")
    assert torch.equal(_logits(tmp_path / "again", IDS), ours)


def test_merged_in_fp32_and_rounded(tuned: Path, tmp_path: Path) -> None:
    holds = ("--to", resolve_checkpoint(tuned).parents[2], "--overwrite")
    _refused("which is read: name another target", ADAPTER, "merge", "--from", tuned, *holds)
    told = _succeeded(ADAPTER, "merge", "--from", tuned, "--to", tmp_path / "merged")
    assert "verified: logits of" in told
    assert (_logits(tmp_path / "merged", IDS) - _logits(tuned, IDS)).abs().max() < 1e-5
    told = _succeeded(ADAPTER, "merge", "--from", tuned, "--to", tmp_path / "rounded", "--dtype", "bf16")
    assert "rounding to bf16 changes the logits by up to" in told
    assert 1e-4 < (_logits(tmp_path / "rounded", IDS) - _logits(tuned, IDS)).abs().max() < 0.1
    _succeeded(CONVERT, "export", "--from", tmp_path / "merged", "--to", tmp_path / "hf", "--verify")
    assert "### Instruction" in AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template
    shown = _succeeded("tools/generate.py", "--checkpoint", tuned, "--prompt", "What is", "--temperature", 0)
    assert shown == _succeeded(
        "tools/generate.py", "--checkpoint", tmp_path / "merged", "--prompt", "What is", "--temperature", 0
    )


def test_rows_of_new_tokens_are_refused_or_trained(
    huggingface: Path, chat_tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    _succeeded(CONVERT, "import", "--from", huggingface, "--tokenizer", chat_tokenizer, "--to", base)
    config = _config(tmp_path, data, base)
    options = ("--model.vocab_size", 514, "--data.train", f"[{{path: {data}/chatml}}]")
    done = train(config, *options)
    assert done.returncode == 2
    assert "<|im_start|>, <|im_end|>: the template chatml holds them" in done.stderr
    assert "lora.train_rows: new" in done.stderr
    train_on_ranks(2, config, *options, "--lora.train_rows", "new", "--parallel.tensor", 2)
    run = tmp_path / "run"
    shown = _succeeded("tools/generate.py", "--checkpoint", run, "--prompt", "What is", "--max-new-tokens", 5)
    assert shown.startswith("What is")
    entries = stored_entries(resolve_checkpoint(run))
    assert entries["embedding.word.new_rows.weight"].abs().max() > 0
    assert entries["head.new_rows.weight"].shape == (2, 256)
    _refused("trained rows of the vocabulary", ADAPTER, "export", "--from", run, "--to", tmp_path / "peft")
    _succeeded(ADAPTER, "merge", "--from", run, "--to", tmp_path / "merged")
    ids = torch.cat([IDS, torch.tensor([[512, 513], [513, 512]])], dim=1)
    assert (_logits(tmp_path / "merged", ids) - _logits(run, ids)).abs().max() < 1e-5
    _succeeded(CONVERT, "export", "--from", tmp_path / "merged", "--to", tmp_path / "hf", "--verify")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == 513


def test_another_base_is_refused(tuned: Path, data: Path, base: Path, huggingface: Path, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(huggingface)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "hf")
    tokenizer = resolve_checkpoint(base) / "tokenizer"
    _succeeded(CONVERT, "import", "--from", tmp_path / "hf", "--tokenizer", tokenizer, "--to", tmp_path / "other")
    _refused(
        "were made for the weights of",
        ADAPTER,
        "merge",
        "--from",
        tuned,
        "--base",
        tmp_path / "other",
        "--to",
        tmp_path / "m",
    )
    config = _config(tmp_path, data, base)
    done = train(config, "--checkpoint.load", tuned, "--lora.base", tmp_path / "other")
    assert done.returncode == 2
    assert "were made for the weights of" in done.stderr
    done = train(config, "--checkpoint.load", tuned, "--lora.alpha", 16)
    assert done.returncode == 2
    assert "lora.alpha = 8.0, the configuration says 16.0" in done.stderr
    done = train(config, "--checkpoint.load", tuned, "--lora.rank", 0, "--lora.alpha", 16, "--lora.targets", "null")
    assert done.returncode == 2
    assert "holds adapters only" in done.stderr
    _succeeded(ADAPTER, "export", "--from", tuned, "--to", tmp_path / "theirs", "--base-model", tmp_path / "hf")
    importing = (ADAPTER, "import", "--from", tmp_path / "theirs", "--to", tmp_path / "m")
    _refused("model.norm.weight is not that of", *importing, "--base", base)
    done = train(config, "--lora.base", tmp_path / "other")
    assert done.returncode == 2
    assert "adapters have one base" in done.stderr
    _refused("holds adapters only", CONVERT, "export", "--from", tuned, "--to", tmp_path / "no")
    _refused("holds a whole model", ADAPTER, "export", "--from", base, "--to", tmp_path / "no")
    _succeeded(ADAPTER, "export", "--from", tuned, "--to", tmp_path / "peft")
    done = train(config, "--checkpoint.load", tmp_path / "peft")
    assert done.returncode == 2
    assert "It is a PEFT folder: megatron-med adapter import" in done.stderr
    moved = shutil.move(tmp_path / "other", tmp_path / "elsewhere")
    assert Path(moved).is_dir()
    done = train(config, "--checkpoint.load", tuned, "--train.steps", 1)
    assert done.returncode == 0, done.stderr
    assert "(adapters)" in done.stdout


def test_a_run_trains_all_weights_or_adapters_and_stays_with_it(data: Path, base: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, data, base)
    in_full = ("--lora.rank", 0, "--lora.alpha", 16, "--lora.targets", "null")
    assert train(config, *in_full, "--train.steps", 1).returncode == 0
    done = train(config)
    assert done.returncode == 2
    assert "is of a run that trains all weights: adapters need a run of their own" in done.stderr
    done = train(
        config, "--train.output_dir", tmp_path / "own", "--checkpoint.load", tmp_path / "run", "--train.steps", 1
    )
    assert done.returncode == 0, done.stderr


def test_a_base_that_has_moved_is_found_where_one_says(
    huggingface: Path, sample_tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    """An import at another place gives the same weights: the checksum is theirs, not the folder's."""
    for name in ("here", "there"):
        _succeeded(CONVERT, "import", "--from", huggingface, "--tokenizer", sample_tokenizer, "--to", tmp_path / name)
    config = _config(tmp_path, data, tmp_path / "here")
    assert train(config, "--train.steps", 1).returncode == 0
    shutil.rmtree(tmp_path / "here")
    _refused(
        "which is not there. Say where it is", ADAPTER, "merge", "--from", tmp_path / "run", "--to", tmp_path / "m"
    )
    done = train(config, "--train.steps", 2, "--checkpoint.load", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    assert f"loaded {tmp_path / 'there' / 'step-00000000'} (base, frozen)" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora.rank", 300), "lora.rank is 300: q_proj is a 256 x 256 matrix, whose rank is at most 256"),
        (("--lora.rank", -1), "lora.rank is -1: it must be at least 1, or 0"),
        (("--lora.rank", 0), "lora.rank is 0, and lora.alpha is given"),
        (("--lora.targets", "[query]"), "query is no matrix of a llama model. There are: q_proj, k_proj, v_proj"),
        (("--lora.targets", "[q_proj, q_proj]"), "lora.targets names q_proj twice"),
        (("--lora.dropout", 1.0), "lora.dropout is 1.0"),
        (("--lora.alpha", 0), "lora.alpha is 0"),
        (("--lora.lr_scale_b", -2), "lora.lr_scale_b is -2"),
        (("--checkpoint.load", "null"), "there is no base"),
        (("--checkpoint.load_state", "all"), "holds no adapters to go on with"),
        (("--quantize.base", "int4"), "quantize.base"),
        (("--quantize.base", "int8", "--lora", "{rank: 0}"), "quantised weights cannot be trained"),
        (("--quantize.base", "nf4", "--parallel.tensor", 3), "must divide"),
        (("--lora.train_rows", "new"), "no token was added to the vocabulary"),
        (("--optimizer.groups", "[{match: 'embedding.*', frozen: true}]"), "embedding.* matches no parameter"),
    ],
)
def test_settings_that_cannot_be_meant(
    base: Path, data: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    done = train(_config(tmp_path, data, base), *options)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def _narrower(tensors: dict[str, torch.Tensor]) -> None:
    name = "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"
    tensors[name] = tensors[name][:64]


def _one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.4.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 256)


def _one_less(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            _narrower,
            {},
            "layers.2.self_attn.v_proj.lora_B.weight has the shape [64, 4], the base's layer makes it [128, 4]",
        ),
        (_one_more, {}, "it also has base_model.model.model.layers.4.self_attn.q_proj.lora_A.weight"),
        (_one_less, {}, "it has no base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"),
        (None, {"r": 8}, "lora_A.weight has the shape [4, 256], the base's layer makes it [8, 256]"),
        (None, {"use_dora": True}, "use_dora is True: only False can be imported"),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        (None, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        (None, {"lora_alpha": None}, "lora_alpha is None"),
        (None, {"lora_alpha": True}, "lora_alpha is True"),
        (None, {"r": True}, "r is True"),
        (None, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
    ],
)
def test_adapters_that_do_not_fit(
    tuned: Path, huggingface: Path, base: Path, tmp_path: Path, change: Any, settings: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "peft"
    _succeeded(ADAPTER, "export", "--from", tuned, "--to", folder, "--base-model", huggingface)
    if change is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    _refused(message, ADAPTER, "import", "--from", folder, "--base", base, "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()
