"""A prompt with pictures as the sampler sees it: a model whose ids may be negative, and the rules of an answer.

In: a masked-diffusion language model, ids [N] of which those below 0 stand for visual tokens, and those tokens [K, D].
Out: what `baatt.sampling.generate` calls. Some tokens never occur in an answer and some end it. Knows nothing of text,
and nothing of where visual tokens come from.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from baatt.models.config import ModelConfig
from baatt.models.llada import MaskedDiffusionLM


class VisualEmbedding(nn.Embedding):
    """An embedding whose id -1 - k is row k of the visual tokens at hand."""

    visual: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Ids [B, N] -> [B, N, D]; negative ids are an error while there are no visual tokens."""
        if self.visual is None:
            return super().forward(input)
        pictured = self.visual[(-1 - input).clamp(min=0)]
        return torch.where((input < 0)[..., None], pictured, super().forward(input.clamp(min=0)))

    @contextmanager
    def showing(self, visual: Tensor) -> Iterator[None]:
        """Negative ids mean rows of `visual` [K, D] while this lasts."""
        self.visual = visual if len(visual) else None
        try:
            yield
        finally:
            self.visual = None


class PicturePrompt:
    """What the sampler calls: the language model with the pictures of one prompt, and the rules of an answer.

    `generate(prompt, prompt.ids, None, config)`. As in the published code some tokens never occur, and once
    a stop sequence stands in the answer nothing behind it is filled before everything in front of it; then the model is
    not evaluated any more.

    Args:
        language: its input embedding must be a `VisualEmbedding`.
        ids: of the prompt, at least one; id -1 - k is row k of `visual`.
        visual: [K, D], the visual tokens.
        stops: sequences of ids that end an answer. forbidden: ids that never occur in it.

    Raises:
        TypeError, ValueError: another embedding, no id, or ids that there are not.
    """

    def __init__(
        self,
        language: MaskedDiffusionLM,
        ids: Sequence[int],
        visual: Tensor,
        *,
        stops: Sequence[Sequence[int]] = (),
        forbidden: Sequence[int] = (),
    ) -> None:
        embedding = language.transformer.wte
        if not isinstance(embedding, VisualEmbedding):
            raise TypeError(f"the input embedding must be a VisualEmbedding, got {type(embedding).__name__}")
        rows = language.config.logit_size
        if not ids or min(ids) < -len(visual) or max(ids) >= rows:
            raise ValueError(
                f"ids must be in [-{len(visual)}, {rows}), and at least one, got {min(ids, default=None)} to "
                f"{max(ids, default=None)}"
            )
        self.language, self.embedding = language, embedding
        device = embedding.weight.device
        self.visual = visual.to(device, embedding.weight.dtype)
        self.ids = torch.tensor([list(ids)], device=device)
        self.stops = [torch.tensor(list(stop), device=device) for stop in stops if len(stop)]
        self.forbidden = torch.zeros(rows, dtype=torch.bool, device=device)
        self.forbidden[list(forbidden)] = True

    @property
    def config(self) -> ModelConfig:
        """Of the language model."""
        return self.language.config

    def __call__(
        self, tokens: Tensor, attention_mask: Tensor | None = None, *, logits_from: int, logits_to: int, **options: Any
    ) -> Tensor:
        """Logits [B, logits_to - logits_from, V] of a part of the answer; arguments as `MaskedDiffusionLM.forward`.

        Raises:
            ValueError: keys and values are to be cached: the pass over a part of the tokens does not see the stops.
        """
        if options.get("cache") is not None:
            raise ValueError("the sampler's cache must be 'none' for a prompt with pictures")
        stop = self.stop_of(tokens[:, self.ids.shape[1] :])
        behind = torch.arange(logits_from, logits_to, device=tokens.device) >= self.ids.shape[1] + stop[:, None]
        open_ = tokens[:, logits_from:logits_to].eq(self.config.mask_token_id) & ~behind
        if not open_.any():
            return self._without_forbidden(torch.zeros((*open_.shape, self.config.logit_size), device=tokens.device))
        with self.embedding.showing(self.visual):
            logits: Tensor = self.language(
                tokens, attention_mask, logits_from=logits_from, logits_to=logits_to, **options
            )
        # Equal logits are the least confidence there is, so these positions come last.
        return self._without_forbidden(logits.masked_fill(behind[..., None], 0))

    def _without_forbidden(self, logits: Tensor) -> Tensor:
        """The lowest finite number for them: guidance takes differences, and that of two infinities is none."""
        return logits.masked_fill(self.forbidden, torch.finfo(logits.dtype).min)

    def stop_of(self, answer: Tensor) -> Tensor:
        """Where the first stop sequence begins in answers [B, L] int64: [B] int64, L where there is none."""
        length = answer.shape[1]
        first = answer.new_full((answer.shape[0],), length)
        for stop in self.stops:
            if len(stop) <= length:
                found = answer.unfold(1, len(stop), 1).eq(stop).all(dim=-1)
                place = torch.where(found.any(dim=1), found.int().argmax(dim=1), length)
                first = torch.minimum(first, place)
        return first
