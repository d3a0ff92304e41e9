"""The model `baatt_llada` of lm-evaluation-harness: a LLaDA folder with BA-Att or dense attention.

In: the harness's requests. Out: texts of `generate_until`, log-likelihoods of `loglikelihood`. Importing this module
registers the class, which is what the harness asks of a plugin. Each process of a data-parallel run holds a model and
answers its own share; answers can be kept on disk and taken up again. Knows nothing of tasks and scores.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from baatt import __version__
from baatt.attention import ba_attention
from baatt.integrations.enable import enable
from baatt.lab.answers import AnswerStore, folder_state, request_key
from baatt.lab.chat import load_chat_templates
from baatt.lab.likelihood import log_likelihood, rolling_windows
from baatt.lab.lm_eval.arguments import Generation, ModelArguments, Sampling, read_generation
from baatt.lab.loading import DTYPES, find_model, load_model
from baatt.lab.options import read_options
from baatt.lab.prompts import answer_text, encode_prompt, end_tokens, fit_prompt, pad_left
from baatt.lab.ranks import Ranks
from baatt.sampling import generate

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError:
    raise ImportError("the model baatt_llada needs lm-evaluation-harness: pip install 'baatt[lm-eval]'") from None

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """A prompt to continue."""

    key: str
    number: int  # of its request
    ids: list[int]
    generation: Generation


@register_model("baatt_llada")
class BAAttLLaDA(LM):  # type: ignore[misc]  # the harness carries no types
    """A masked-diffusion model of LLaDA's architecture behind the harness's interface; as `ModelArguments`, by name.

    Raises:
        TypeError, ValueError, FileNotFoundError: arguments or a folder that cannot be used, or an `impl` that does not
            run on the device.
    """

    def __init__(self, **model_args: Any) -> None:
        super().__init__()
        self.arguments = read_options(ModelArguments, model_args)
        self._ranks = Ranks()
        self._rank, self._world_size = self._ranks.rank, self._ranks.size
        self.all_gather, self.barrier = self._ranks.all_gather, self._ranks.barrier
        self._device = self._ranks.device(self.arguments.device)
        folder = find_model(self.arguments.pretrained).expanduser()
        dtype = DTYPES.get(self.arguments.dtype)  # None for "auto"
        self._model, self._tokenizer = load_model(folder, dtype=dtype, device=self._device)
        self._chat = load_chat_templates(folder)
        self._chat_name: str | None = None
        self._ends = end_tokens(self._tokenizer, self._model.config.eos_token_id, self._chat.special_tokens)
        self._store = AnswerStore(None if not self.arguments.save_dir else Path(self.arguments.save_dir), self._rank)
        self._identity = [self.arguments.settings(), folder_state(folder)]
        self._handle = enable(self._model, self.arguments.sparse, self.arguments.policy, impl=self.arguments.impl)
        self._truncated = 0
        # An implementation that cannot run would fail after an hour of dense steps.
        if self.arguments.sparse is not None:
            config, dtype = self._model.config, next(self._model.parameters()).dtype
            x = torch.zeros(1, config.n_heads, 256, config.head_size, device=self._device, dtype=dtype)
            ba_attention(x, x, x, self.arguments.sparse, impl=self.arguments.impl)
        logger.info("baatt_llada: %s", self.arguments.settings())

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: Any = None) -> "BAAttLLaDA":
        """As the harness builds models. What is in model_args wins over the command line, whose `--batch_size` and
        `--device` have defaults and so are always given."""
        return cls(**{name: x for name, x in (additional_config or {}).items() if x is not None} | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> "BAAttLLaDA":
        """`create_from_arg_obj` from `name=value,name=value`."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # What the harness asks.

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of every prompt, cut at the end of text and at its stop strings."""
        jobs = self._jobs(requests)
        pending = {job.key: job for job in jobs if job.key not in self._store}
        with tqdm(total=len(pending), desc="generate_until", disable=disable_tqdm or self._rank > 0) as bar:
            for batch in _batches(list(pending.values()), self.arguments.batch_size):
                for job, text in zip(batch, self._generate(batch), strict=True):
                    self._store.put(job.key, text)
                    self.cache_hook.add_partial("generate_until", requests[job.number].args, text)
                bar.update(len(batch))
        return [str(self._store[job.key]) for job in jobs]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether it is the greedy one) of every request.

        Unless `is_check_greedy`, the second is False.
        """
        check = self.arguments.is_check_greedy
        if requests and not check:
            logger.info("is_greedy is not determined and reported as False: is_check_greedy=True determines it")

        def answer(context: list[int], continuation: list[int]) -> tuple[float, bool]:
            context = self._fit(context, len(continuation))
            return self._score(context, continuation), check and self._is_greedy(context, continuation)

        return self._answers("loglikelihood", requests, self._encode_pair, answer, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p(text) of every request: windows of `max_length` tokens, every token scored once."""

        def answer(ids: list[int]) -> float:
            return sum(self._score(*window) for window in rolling_windows(ids, self.max_length))

        return self._answers(
            "loglikelihood_rolling", requests, lambda text: (self.tok_encode(text),), answer, disable_tqdm
        )  # fmt: skip

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as a prompt; without a generation prompt the last message is the beginning of the answer."""
        return self._chat.render(chat_history, name=self._chat_name, continue_final_message=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that is used from now on: True for the default one, or a name; False or None for none."""
        if chat_template is False or chat_template is None:
            return None
        self._chat_name = chat_template if isinstance(chat_template, str) else None
        return self._chat.source(self._chat_name)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return self.arguments.pretrained.replace("/", "__")

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.arguments.max_length or self._model.config.max_sequence_length

    def tok_encode(self, string: str) -> list[int]:
        """Token ids of a text."""
        return encode_prompt(self._tokenizer, string, self._chat.special_tokens)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness stores beside the results: every setting, and how sparse attention was in this process."""
        handle = self._handle
        info = {
            "baatt_version": __version__,
            "baatt_settings": self.arguments.settings(),
            "model_num_parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "model_dtype": str(next(self._model.parameters()).dtype).removeprefix("torch."),
            "max_length": self.max_length,
            "sparse_attention_calls": handle.sparse_calls,
            "dense_attention_calls": handle.dense_calls,
            "achieved_sparsity": round(handle.sparsity, 4) if handle.sparse_calls + handle.dense_calls else None,
            "truncated_prompts": self._truncated,
        }
        logger.info("baatt_llada: %s", info)
        if self.arguments.sparse is not None and handle.dense_calls and not handle.sparse_calls:
            logger.warning(
                "no attention call was sparse: dense_layers, dense_steps, min_length or min_queries forbid it"
            )
        return info

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What every rank has, on one of them."""
        return self._ranks.gather_object(obj, dst)

    # How it is answered.

    def _answers(
        self, name: str, requests: Sequence[Any], encode: Callable[..., tuple[Any, ...]], answer: Callable[..., Any],
        disable_tqdm: bool,
    ) -> list[Any]:  # fmt: skip
        """The kept answers of requests of a likelihood, and new ones of what `encode` makes of their arguments."""
        results = []
        for request in tqdm(requests, desc=name, disable=disable_tqdm or self._rank > 0):
            ids = encode(*request.args)
            key = request_key(name, self._identity, *ids)
            if key not in self._store:
                self._store.put(key, answer(*ids))
            kept = self._store[key]
            results.append(tuple(kept) if isinstance(kept, list) else kept)  # JSON has no tuples
            self.cache_hook.add_partial(name, request.args, results[-1])
        return results

    def _jobs(self, requests: Sequence[Any]) -> list[Job]:
        """One per request. Repetitions of a request are different jobs only where the answer is sampled."""
        seen: Counter[str] = Counter()
        jobs = []
        for number, request in enumerate(requests):
            context, options = request.args
            generation = read_generation(options, self.arguments.sampling)
            ids = self.tok_encode(context)
            same = request_key("generate_until", self._identity, ids, generation.settings())
            if generation.temperature > 0:
                generation = generation._replace(repeat=seen[same])
            seen[same] += 1
            jobs.append(Job(f"{same}-{generation.repeat}", number, ids, generation))
        return jobs

    def _generate(self, batch: Sequence[Job]) -> list[str]:
        """The answers of prompts that share their settings."""
        model, arguments, generation = self._model, self.arguments, batch[0].generation
        sampler = arguments.sampling.config(
            generation.tokens,
            temperature=generation.temperature,
            stop_at_eos=bool(model.config.end_tokens),
            repeat=generation.repeat,
        )
        rows = [self._fit(job.ids, sampler.gen_length) for job in batch]
        ids, mask = pad_left(rows, model.config.pad_token_id or 0)
        result = generate(model, ids.to(self._device), mask.to(self._device), sampler, on_step=self._handle.at_step)
        return [
            answer_text(self._tokenizer, tokens[: generation.tokens], self._ends, job.generation.stops)
            for job, tokens in zip(batch, result.tokens.tolist(), strict=True)
        ]

    def _score(self, context: list[int], continuation: list[int]) -> float:
        arguments = self.arguments
        if (found := arguments.policy.dense_steps) > 0:
            raise ValueError(f"dense_steps must be 0 for a likelihood, which has no steps, got {found}")
        return log_likelihood(
            self._model, context, continuation, device=self._device, draws=arguments.mc_num,
            batch_size=arguments.batch_size, seed=arguments.sampling.seed, cfg_scale=arguments.sampling.cfg_scale,
        )  # fmt: skip

    def _is_greedy(self, context: list[int], continuation: list[int]) -> bool:
        """Whether the model generates the continuation when the surest token is filled at every step, as LLaDA."""
        if not context:
            raise ValueError("is_check_greedy must be False for a request without context, got True")
        arguments, length = self.arguments, len(continuation)
        sampling = Sampling(gen_length=length, block_length=length, cfg_scale=arguments.sampling.cfg_scale)
        prompt = torch.tensor([context], device=self._device)
        result = generate(self._model, prompt, None, sampling.config(length), on_step=self._handle.at_step)
        return bool(result.tokens[0].tolist() == continuation)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, split where the context's own ids end; its trailing spaces belong to the continuation."""
        whole, before = self.tok_encode(context + continuation), self.tok_encode(context.rstrip())
        return before, whole[len(before) :]

    def _fit(self, ids: list[int], answer_length: int) -> list[int]:
        kept = fit_prompt(ids, self.arguments.truncation, max_length=self.max_length, answer_length=answer_length)
        if len(kept) < len(ids):
            self._truncated += 1
            if self._truncated == 1:
                logger.warning(
                    "a prompt of %d tokens is cut to %d (%s): max_length is %d and %d are kept for the answer",
                    len(ids), len(kept), self.arguments.truncation, self.max_length, answer_length,
                )  # fmt: skip
        return kept


def _batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    """Prompts of the same settings and of similar length, the longest first: what does not fit fails at once."""
    groups: dict[Generation, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.generation._replace(stops=()), []).append(job)
    for group in groups.values():
        group.sort(key=lambda job: -len(job.ids))
        for first in range(0, len(group), size):
            yield group[first : first + size]
