"""What a generation request of lm-evaluation-harness asks for, and how a row of tokens becomes its answer.

In: the request's keyword arguments. Out: a `Generation`, whose `cut` turns generated ids into text. Knows nothing of
models and of the harness's classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from baatt.evaluation.lm_eval_arguments import Sampling
from baatt.lab.prompts import answer_text

#: Names of the answer's length, as in the harness; the first that is given counts.
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: Arguments that mean nothing without sampling, and are refused with it.
SAMPLING_ONLY = ("top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


class Generation(NamedTuple):
    """One request.

    tokens: longest answer. stops: texts that end it. temperature: 0 = greedy. repeat: number of the repetition of a
    sampled request, from 0.
    """

    tokens: int
    stops: tuple[str, ...]
    temperature: float
    repeat: int = 0

    def settings(self) -> list[Any]:
        """As JSON values, without the number of the repetition."""
        return [self.tokens, list(self.stops), self.temperature]

    def cut(self, tokens: Sequence[int], tokenizer: Tokenizer, ends: frozenset[int]) -> str:
        """The text of generated ids, up to the longest answer, the first end token and the first stop text."""
        return answer_text(tokenizer, tokens[: self.tokens], ends, self.stops)


def read_generation(options: Mapping[str, Any], sampling: Sampling) -> Generation:
    """Read a request's keyword arguments.

    `do_sample: false` is greedy whatever the temperature, as LongBench's tasks have it; without `do_sample` the
    temperature decides.

    Raises:
        TypeError, ValueError: an answer length below 1, a temperature that is none, or arguments of sampling that the
            sampler does not have.
    """
    stops = options.get("until")
    stops = [stops] if isinstance(stops, str) else list(stops or ())
    lengths = [options[name] for name in LENGTH_NAMES if options.get(name) is not None]
    tokens = int(lengths[0]) if lengths else sampling.gen_length
    if tokens < 1:
        raise ValueError(f"max_gen_toks must be positive, got {tokens}")
    temperature = float(options.get("temperature") or 0.0)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if options.get("do_sample") is False:
        temperature = 0.0
    refused = [name for name in SAMPLING_ONLY if options.get(name) not in (None, 0, 1)]
    if temperature > 0 and refused:
        raise ValueError(f"gen_kwargs must not have {', '.join(refused)}, which the sampler does not know")
    return Generation(tokens, tuple(stop for stop in stops if stop), temperature)
