"""How far a denoising loop has come, read from what the model is given and never from counting calls.

Guidance evaluates a step twice and caches evaluate parts of it, so calls say nothing. A diffusion transformer is given
a timestep; a masked language model is given the tokens that are still masked. A loop may also say it itself.
"""

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

#: Noise levels that diffusers' schedulers count: the timestep runs from here down to 0.
TRAINING_TIMESTEPS = 1000
#: Names under which a forward takes a cache; with a filled one its tokens are a part of the sequence.
CACHES = ("past_key_values", "cache")


class _Loop(threading.local):
    """The loop of this thread: steps done of all, or None, whether it said so itself, and the masks of its tokens."""

    step: tuple[float | None, int] = (None, 1)
    told = False
    length = rows = masked = most_masked = 0


class DenoisingProgress:
    """How far the loop of this thread is: every thread has its own, or follows the last that was told.

    mask_token_id: of a masked language model.
    """

    def __init__(self, mask_token_id: int | None = None) -> None:
        self.mask_token_id = mask_token_id
        self._loop = _Loop()
        self._last_told: tuple[float | None, int] | None = None

    @property
    def told(self) -> bool:
        """Whether a loop has said its step."""
        return self._loop.told or self._last_told is not None

    def _step(self) -> tuple[float | None, int]:
        return self._loop.step if self._loop.told or self._last_told is None else self._last_told

    @property
    def share(self) -> float | None:
        """Of the denoising steps that are done, in [0, 1); None while nothing has told."""
        done, total = self._step()
        return None if done is None else done / total

    @share.setter
    def share(self, share: float | None) -> None:
        self._loop.step = share, 1

    def is_among_first(self, fraction: float) -> bool | None:
        """Whether the step lies in the first `fraction` of all; None while nothing has told.

        A told step is compared with the product `fraction * total`: a quotient would round some steps to another side.
        """
        done, total = self._step()
        return None if done is None else done < fraction * total

    def set(self, step: int, total: int) -> None:
        """Step `step`, from 0, of `total` is about to run: what a loop says counts until it says something else.

        Raises:
            TypeError: a step or a total that is no number.
            ValueError: a step outside [0, total).
        """
        for name, value in (("step", step), ("total", total)):
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} must be an int, got {value!r}")
        if not 0 <= step < total:
            raise ValueError(f"step must be in [0, total={total}), got {step}")
        self._loop.step = self._last_told = step, total
        self._loop.told = True

    def forget(self) -> None:
        """The step of this thread is not known, whatever was told before."""
        self._loop.step, self._loop.told = (None, 1), True

    def read_timestep(self, timestep: float, schedule: Sequence[float]) -> None:
        """From a timestep and the schedule of the loop under way, largest first.

        Where there is none, the timestep's own share of `TRAINING_TIMESTEPS` stands for the step's.
        """
        if not schedule:
            self.share = min(max(1 - timestep / TRAINING_TIMESTEPS, 0.0), 1.0)
            return
        # The scheduler may hold the same value in another precision.
        distances = [abs(one - timestep) for one in schedule]
        self.share = distances.index(min(distances)) / len(schedule)

    def read_tokens(self, tokens: Tensor) -> None:
        """From the token ids [B, N] of a masked language model: the share of its masks that are gone.

        Masks only go while a loop runs: more of them, or another length, is a new loop, unless rows that were done left
        the batch. With guidance half of the batch has its prompt masked too, so the row with the fewest masks counts.
        Not for passes over a part of the sequence.
        """
        if self.mask_token_id is None:
            return
        loop = self._loop
        rows, length = tokens.shape
        masked = int(tokens.eq(self.mask_token_id).sum(dim=-1).min())
        if length != loop.length or (masked > loop.masked and rows >= loop.rows):
            loop.most_masked, loop.length = masked, length
        loop.masked, loop.rows = masked, rows
        self.share = 1 - masked / loop.most_masked if loop.most_masked else 0.0

    def token_reader(
        self, module: nn.Module, mask_token_id: int | None
    ) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
        """Reads the step from (args, kwargs) of a forward of the module, unless it gets a part of the tokens only."""
        self.mask_token_id = mask_token_id
        names = list(inspect.signature(module.forward).parameters)

        def read_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = by_name(names, args, kwargs)
            tokens = given.get("input_ids")
            if isinstance(tokens, Tensor) and not any(_is_filled(given.get(name)) for name in CACHES):
                self.read_tokens(tokens)

        return read_step


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the function's parameters."""
    return {**dict(zip(names[: len(args)], args, strict=False)), **kwargs}


def _is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens already: ours, one of transformers, or a tuple as in its older versions."""
    if hasattr(cache, "get_seq_length"):
        return bool(cache.get_seq_length())
    return cache is not None and bool(cache.length if hasattr(cache, "length") else len(cache))
