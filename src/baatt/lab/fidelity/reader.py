"""A language model of any kind that `baatt.enable` knows, as what is before its head and the head.

In: token ids [B, N]. Out: states [B, N, C], and logits of as many of them as fit into memory at once. The model's own
forward makes both: hooks take the states out before the head, or put others in, so that whatever a model does to its
logits (scaling, softcapping) is done here too.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Logits of a slab, at most: 512 MiB in float32, and a few times that while they are compared.
SLAB = 2**27


class Reader:
    """Reads token ids; `shift` is how far before a token the states lie that predict it.

    Args:
        model: in evaluation mode. mask_token: its id, of a model that fills masks; None where there is none.

    Attributes:
        vocabulary: how many logits there are.
        sees_ahead: whether a token sees later ones, so that masked tokens are predicted and not the next one; found out
            by a change of the second of two tokens.

    Raises:
        ValueError: a model without a head, or one that sees ahead and has no mask.
    """

    def __init__(self, model: Any, mask_token: int | None) -> None:
        self.model, self.mask_token = model, mask_token
        self.device = next(model.parameters()).device
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self._seam, self._is_norm = _find_seam(model)
        one, other = (self.states(torch.tensor([[1, second]], device=self.device))[0, 0] for second in (2, 3))
        self.vocabulary = self.logits(one[None]).shape[-1]
        self.sees_ahead = bool((one - other).abs().max() > 1e-3 * one.abs().max())
        if self.sees_ahead and mask_token is None:
            raise ValueError(
                "model must have a mask token, which config and tokenizer do not name: it sees later tokens"
            )
        self.shift = 0 if self.sees_ahead else 1

    @torch.inference_mode()
    def states(self, tokens: Tensor) -> Tensor:
        """What the head gets, [B, N, C]; the head itself is given one token a row."""
        found: list[Tensor] = []

        def take(states: Tensor) -> Tensor:
            found.append(states)
            return states[:, -1:]

        self._forward(tokens, take)
        return found[0]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """[R, V] float32 of states [R, C]: the end of a pass over one token."""
        out = self._forward(torch.ones(1, 1, dtype=torch.int64, device=self.device), lambda _: states[None])
        return out[0].float()

    def _forward(self, tokens: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        if self._is_norm:
            hook = self._seam.register_forward_hook(lambda module, args, out: change(out))
        else:
            hook = self._seam.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
        try:
            out = self.model(tokens, **self._options)
        finally:
            hook.remove()
        return out if isinstance(out, Tensor) else out.logits


def _find_seam(model: nn.Module) -> tuple[nn.Module, bool]:
    """The last norm of LLaDA's layout, whose head may be tied and no module; else the head. Whether it is the norm."""
    for module in model.modules():
        norm = getattr(module, "ln_f", None)
        if isinstance(norm, nn.Module) and hasattr(module, "wte"):
            return norm, True
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise ValueError(f"model must have a head that gives logits, got {type(model).__name__} without one")
    return head, False
