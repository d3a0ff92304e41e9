"""A prompt with pictures, from a question to what the sampler calls, and the text of an answer.

In: a question in which `<image>` marks where pictures go, a tokenizer, the visual tokens [K, D] of the pictures and a
masked-diffusion language model. Out: ids of which those below 0 stand for visual tokens, a model that reads them, and
the text of an answer, in which some tokens never occur and which some end. Follows LLaDA-V's published code to the id,
so that prompts are those that its scores were measured with. Knows nothing of where visual tokens come from.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from baatt.models.llada import MaskedDiffusionLM

PICTURE_MARK = "<image>"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
HEADER, HEADER_END, TURN_END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
MASK = "<|mdm_mask|>"
THINK_MODES = {"no_think": " /no_think", "think": " /think", "none": ""}


def conversation(question: str, pictures: int = 0, think_mode: str = "none") -> str:
    """The text of the whole prompt: system, the user's turn, and the head of the answer.

    A question without marks gets one a picture in front, and how to think behind. One that has marks already, or goes
    without pictures, stays as it is: also without a think mode.
    """
    if pictures and PICTURE_MARK not in question:
        question = f"{' '.join([PICTURE_MARK] * pictures)}\n{question}{THINK_MODES[think_mode]}"
    turns = (("system", SYSTEM), ("user", question), ("assistant", ""))
    heads = [f"{HEADER}{role}{HEADER_END}\n\n{content.strip()}" for role, content in turns]
    return BEGIN + TURN_END.join(heads)


def prompt_ids(text: str, counts: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Ids of a prompt, where -1, -2 and so on stand for the visual tokens of its pictures.

    As in the published code every part between marks is encoded by itself, and where the first part begins with the
    beginning-of-text token the first id of every part is dropped, even if that token is not what it begins with.

    Args:
        counts: visual tokens of every picture, in order. Where there are more marks than pictures the last picture
            comes again, and pictures without a mark are left out, as in the published code.

    Raises:
        ValueError: a mark and no picture at all, or a tokenizer that is not LLaDA-V's.
    """
    ids, *others = (tokenizer.encode(part).ids for part in text.split(PICTURE_MARK))
    if others and not counts:
        raise ValueError(f"a prompt with {PICTURE_MARK} must come with pictures, got none")
    dropped = int(ids[:1] == [special_id(tokenizer, BEGIN)])
    for number, part in enumerate(others):
        picture = min(number, len(counts) - 1)
        first = -1 - sum(counts[:picture])
        ids = [*ids, *range(first, first - counts[picture], -1), *part[dropped:]]
    return ids


def answer_rules(
    tokenizer: Tokenizer, vocabulary: int, stop_texts: Sequence[str] = ()
) -> tuple[list[list[int]], list[int]]:
    """Sequences of ids that end an answer of the published sampler, and ids that it never has.

    Args:
        tokenizer: LLaDA-V's, another one is a ValueError.
        vocabulary: ids that the model has; those that the tokenizer does not have never occur.
        stop_texts: besides the end of the turn.
    """
    named = [special_id(tokenizer, name) for name in (END, BEGIN, HEADER, HEADER_END)]
    stops = [tokenizer.encode(text, add_special_tokens=False).ids for text in (*stop_texts, TURN_END)]
    return stops, [*named, *range(tokenizer.get_vocab_size(), vocabulary)]


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that LLaDA-V's tokenizer has; a ValueError where this one has not."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer must have the token {token}, as LLaDA-V's has")
    return found


class PicturePrompt:
    """What the sampler calls: the language model with the pictures of one prompt, and the rules of an answer.

    `generate(prompt, prompt.ids, None, config)`. As in the published code some tokens never occur, and once
    a stop sequence stands in the answer nothing behind it is filled before everything in front of it; then the model is
    not evaluated any more.

    Args:
        ids: of the prompt, at least one; id -1 - k is row k of `visual`.
        visual: [K, D], the visual tokens.
        stops: sequences of ids that end an answer. forbidden: ids that never occur in it.

    Raises:
        ValueError: no id, or ids that there are not.
    """

    def __init__(
        self, language: MaskedDiffusionLM, ids: Sequence[int], visual: Tensor, *,
        stops: Sequence[Sequence[int]] = (), forbidden: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.language, self.config = language, language.config
        rows = self.config.logit_size
        if not ids or min(ids) < -len(visual) or max(ids) >= rows:
            received = f"{min(ids, default=None)} to {max(ids, default=None)}"
            raise ValueError(f"ids must be in [-{len(visual)}, {rows}), and at least one, got {received}")
        table = language.transformer.wte.weight
        device = table.device
        self.visual = visual.to(device, table.dtype)
        self.ids = torch.tensor([list(ids)], device=device)
        self.stops = [torch.tensor(list(stop), device=device) for stop in stops if len(stop)]
        self.forbidden = torch.zeros(rows, dtype=torch.bool, device=device)
        self.forbidden[list(forbidden)] = True

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
        logits: Tensor = torch.zeros((*open_.shape, self.config.logit_size), device=tokens.device)
        if open_.any():
            span = {"logits_from": logits_from, "logits_to": logits_to}
            logits = self.language(tokens, attention_mask, embedding=self.embed, **span, **options)
        # Equal logits are the least confidence there is, so these positions come last.
        logits = logits.masked_fill(behind[..., None], 0)
        # The lowest finite number: guidance takes differences, and that of two infinities is none.
        return logits.masked_fill(self.forbidden, torch.finfo(logits.dtype).min)

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [B, N] -> [B, N, D]: -1 - k is row k of the visual tokens."""
        words: Tensor = self.language.transformer.wte(ids.clamp(min=0))
        if not len(self.visual):
            return words
        return torch.where((ids < 0)[..., None], self.visual[(-1 - ids).clamp(min=0)], words)

    def stop_of(self, answer: Tensor) -> Tensor:
        """Where the first stop sequence begins in answers [B, L] int64: [B] int64, L where there is none."""
        length = answer.shape[1]
        first = answer.new_full((answer.shape[0],), length)
        for stop in self.stops:
            if len(stop) <= length:
                found = answer.unfold(1, len(stop), 1).eq(stop).all(dim=-1)
                first = torch.minimum(first, torch.where(found.any(dim=1), found.int().argmax(dim=1), length))
        return first

    def answer_text(self, answer: Tensor, tokenizer: Tokenizer) -> str:
        """The text of an answer [1, L] in front of the first stop, without special tokens, one final full stop and the
        space around it."""
        kept = answer[0, : int(self.stop_of(answer))].tolist()
        text: str = tokenizer.decode(kept, skip_special_tokens=True)
        return text.removesuffix(".").strip()
