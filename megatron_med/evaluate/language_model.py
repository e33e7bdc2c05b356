"""Our models behind lm-eval's API (0.4.13), on one process and on every rank of TP x PP x DP.

Every rank calls the same methods with all requests and tells lm-eval of a world of one: data-parallel ranks share the
requests inside the model. Text becomes ids by transformers' tokenizer of the exported folder, as behind lm-eval's own
Hugging Face backend.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_med.checkpoint.huggingface.tokenizer import write_tokenizer
from megatron_med.data.head_form import HeadForm
from megatron_med.errors import ConfigError
from megatron_med.evaluate.heads import HeadEncoder
from megatron_med.inference.engine import Engine
from megatron_med.inference.grid import join_grid
from megatron_med.inference.heads import head_scores
from megatron_med.inference.load import Loaded, Settings, load_model
from megatron_med.inference.request import Request, Stopping, no_language_model, row_seed
from megatron_med.inference.sampling import GREEDY, Sampling
from megatron_med.inference.scoring import Score, log_likelihoods
from megatron_med.model.build import DTYPES
from megatron_med.parallel.collectives import gather_objects
from megatron_med.parallel.context import ParallelContext

_PASSED_BY_LM_EVAL = {"device", "max_batch_size", "metadata", "trust_remote_code"}
_PATIENCE = timedelta(hours=2)
"""A replica may have long answers to write while the others wait."""
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Asked:
    """A text to be gone on with.

    Attributes:
        prompt: text, special tokens included where a chat template has put such.
        max_new_tokens: fewer where the context ends before.
        sampling: how tokens are chosen.
        stop: texts that end it.
        seed: of what is drawn.
    """

    prompt: str
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    seed: int = 0


class MegatronMedLM(TemplateLM):
    """A checkpoint of ours, or a Hugging Face folder.

    Args:
        checkpoint: RUN, RUN/checkpoints, one step, or a Hugging Face folder.
        tensor, pipeline: ranks that the model is cut over; further ranks are replicas.
        precision: fp32 or bf16.
        base: of adapters, where it is no longer where they were trained.
        quantize: none, int8 or nf4; None: as it was trained.
        batch_size: sequences that are written at the same time; 1, which lm-eval passes unasked, means 16.
        slots: the same, taken as it is.
        max_length: tokens that the model reads at most; None: its positions.
        seed: of sampled texts.
        context: the grid; None: made of ``tensor``, ``pipeline`` and the ranks that torchrun has started.
        others: what lm-eval passes to every model.
    """

    def __init__(
        self,
        checkpoint: str,
        tensor: int = 1,
        pipeline: int = 1,
        precision: str = "fp32",
        base: str | None = None,
        quantize: str | None = None,
        batch_size: int | str = 16,
        slots: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
        context: ParallelContext | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self.context = context or join_grid(int(tensor), int(pipeline), replicas=True, timeout=_PATIENCE)
        unknown = sorted(others.keys() - _PASSED_BY_LM_EVAL)
        if unknown:
            raise ConfigError(f"there is no option {unknown[0]}: check its name in --model_args.")
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision is {precision!r}: it must be fp32 or bf16.")
        self.loaded = load_model(checkpoint, self.context, Settings(DTYPES[precision], None, base, quantize))
        self.model = self.loaded.model
        self.tokenizer = _tokenizer(self.loaded)
        self._slots = slots or (int(batch_size) if str(batch_size).isdigit() and int(batch_size) > 1 else 16)
        longest = self.model.config.max_position_embeddings
        self._max_length = int(max_length or longest)
        if self._max_length > longest:
            raise ConfigError(f"max_length is {max_length}: the model has {longest} positions.")
        self._seed = seed

    @property
    def eot_token_id(self) -> int:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError(f"{self.loaded.source} has a tokenizer without an end token: texts have no beginning.")
        return end

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer, where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.source).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; a begin token in front where the tokenizer puts one and the text has none."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer.encode(string, **options)
        vocabulary = self.loaded.model.config.vocab_size
        if max(ids, default=0) >= vocabulary:
            raise ConfigError(
                f"The tokenizer of {self.loaded.source} gives the id {max(ids)}, and the model's vocabulary ends at "
                f"{vocabulary - 1}: it is another model's tokenizer."
            )
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        assert isinstance(text, str), "it was not to be tokenized"
        return text

    def encode_pair(self, context: str, continuation: str) -> Pair:
        """Ids of both; a space at the end of the context goes with the continuation, as lm-eval has it."""
        return self._encode_pair(context, continuation)

    def as_message(self, prompt: str) -> str:
        """A prompt as a user's message, up to where the model answers; as it is where there is no chat template."""
        if self.loaded.chat is None:
            return prompt
        return self.apply_chat_template([{"role": "user", "content": prompt}])

    def head_encoder(self) -> tuple[HeadEncoder, HeadForm]:
        """Makes the sequences that the model's head scores, as long as those that it was trained on at most.

        Raises:
            ConfigError: it is a language model.
        """
        form, tokenizer = self.loaded.head, self.loaded.tokenizer
        if form is None or tokenizer is None:
            raise ConfigError(
                f"{self.loaded.source} is a language model, without a head that scores: leave --score head out."
            )
        form = replace(form, max_length=min(form.max_length, self.max_length))
        return HeadEncoder(form, tokenizer), form

    def head_scores(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """What the model's head gives at the end of each sequence."""
        with tqdm(total=len(sequences), desc="Running the head", disable=not self.context.world.is_first) as bar:
            return head_scores(self.model, sequences, lambda count: _advance(bar, count * self.context.batch.size))

    def scores(self, pairs: Sequence[Pair], disable_tqdm: bool = False, desc: str = "log-likelihoods") -> list[Score]:
        """Scores of contexts and continuations, cut on the left to what the model can read."""
        if self.loaded.head is not None:
            raise no_language_model(self.loaded.head.kind)
        cut = [self._fitting(context, continuation) for context, continuation in pairs]
        hidden = disable_tqdm or not self.context.world.is_first
        with tqdm(total=len(cut), desc=f"Running {desc}", disable=hidden) as bar:
            return log_likelihoods(self.model, cut, lambda count: _advance(bar, count * self.context.batch.size))

    def write(self, asked: Sequence[Asked], disable_tqdm: bool = False) -> list[str]:
        """Texts that the model goes on with, in the order of what is asked; prompts are cut on the left to fit."""
        groups: dict[tuple[Sampling, tuple[str, ...]], list[int]] = {}
        for number, one in enumerate(asked):
            groups.setdefault((one.sampling, one.stop), []).append(number)
        texts: dict[int, str] = {}
        hidden = disable_tqdm or not self.context.world.is_first
        with tqdm(total=len(asked), desc="Running generate_until requests", disable=hidden) as bar:
            for (sampling, stop), numbers in groups.items():
                stopping = Stopping(self.loaded.end_ids | {self.eot_token_id}, stop, self.loaded.tokenizer)
                engine = Engine(self.model, sampling, stopping, self._slots)
                longest_first = sorted(numbers, key=lambda number: -len(asked[number].prompt))
                for number, text in self._written(engine, [(number, asked[number]) for number in longest_first]):
                    texts[number] = postprocess_generated_text(text, list(stop), None)
                    bar.update(1)
        return [texts[number] for number in range(len(asked))]

    def _written(self, engine: Engine, asked: Sequence[tuple[int, Asked]]) -> list[tuple[int, str]]:
        """Replicas share what is asked out, and gather the answers."""
        replicas = self.context.batch
        own = asked[replicas.rank :: replicas.size]
        requests = [self._request(one) for _, one in own]
        found = [
            (own[answer.request][0], self.tokenizer.decode(answer.tokens, skip_special_tokens=True))
            for answer in engine.answers(requests)
        ]
        return [pair for part in gather_objects(found, replicas) for pair in part]

    def _request(self, asked: Asked) -> Request:
        new = asked.max_new_tokens if asked.max_new_tokens < self.max_length else max(1, self.max_length // 2)
        ids = self.tok_encode(asked.prompt) or [self.prefix_token_id]
        return Request(ids[-(self.max_length - new) :], new, asked.seed)

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        whole = [*context, *continuation][-(self.max_length + 1) :]
        return whole[: -len(continuation)], list(continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self.scores([(context, continuation) for _, context, continuation in requests], disable_tqdm)
        answers = [(score.log_likelihood, score.is_greedy) for score in found]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts: windows as long as the model reads, each token once."""
        texts = [instance.args[0] for instance in requests]
        totals = self.rolling(texts, disable_tqdm)
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def rolling(self, texts: Sequence[str], disable_tqdm: bool = False) -> list[float]:
        """The same of plain texts."""
        pairs: list[Pair] = []
        counts = []
        for text in texts:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            cut = [make_disjoint_window(window) for window in windows]
            pairs += cut
            counts.append(len(cut))
        scores = iter(self.scores(pairs, disable_tqdm, "loglikelihood_rolling windows"))
        return [sum(next(scores).log_likelihood for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that lm-eval's tasks ask for."""
        asked = []
        for number, instance in enumerate(requests):
            prompt, options = instance.args
            asked.append(self._asked(prompt, options, number))
        texts = self.write(asked, disable_tqdm)
        for instance, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", instance.args, text)
        return texts

    def _asked(self, prompt: str, options: dict[str, Any], number: int) -> Asked:
        kwargs = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        until = handle_stop_sequences(kwargs.pop("until", None), eos=None)
        new = int(kwargs.pop("max_gen_toks"))
        sampling = _sampling(kwargs)
        return Asked(prompt, new, sampling, tuple(text for text in until if text), row_seed(self._seed, number))


def _advance(bar: Any, count: int) -> None:
    """Moves a bar on, never beyond its end: replicas are taken to be as far as this one."""
    bar.update(min(count, bar.total - bar.n))


def _sampling(kwargs: dict[str, Any]) -> Sampling:
    """Generation arguments in the names of transformers.

    Raises:
        ConfigError: one of them is unknown here.
    """
    samples = bool(kwargs.pop("do_sample", False))
    temperature = float(kwargs.pop("temperature", 1.0) or 0.0)
    named = {
        "repetition_penalty": float(kwargs.pop("repetition_penalty", 1.0)),
        "frequency_penalty": float(kwargs.pop("frequency_penalty", 0.0)),
        "no_repeat_ngram_size": int(kwargs.pop("no_repeat_ngram_size", 0)),
        "beams": int(kwargs.pop("num_beams", 1)),
        "length_penalty": float(kwargs.pop("length_penalty", 1.0)),
    }
    filters = {
        "top_k": int(kwargs.pop("top_k", 0) or 0),
        "top_p": float(kwargs.pop("top_p", 1.0) or 1.0),
        "min_p": float(kwargs.pop("min_p", 0.0) or 0.0),
    }
    if kwargs:
        raise ConfigError(f"generation_kwargs hold {', '.join(sorted(kwargs))}: unknown here. Leave them out.")
    return Sampling(temperature if samples else 0.0, **(filters if samples else {}), **named)  # type: ignore[arg-type]


def _tokenizer(loaded: Loaded) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of the folder, or of what an export would write."""
    if loaded.tokenizer is None:
        raise ConfigError(f"{loaded.source} holds no tokenizer: questions cannot be read. Give a checkpoint with one.")
    if (loaded.source / "config.json").is_file():
        return AutoTokenizer.from_pretrained(loaded.source)
    chat = None if loaded.chat is None else {"chat_template": loaded.chat.jinja}
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), loaded.tokenizer, loaded.model.config.max_position_embeddings, chat)
        return AutoTokenizer.from_pretrained(folder)
