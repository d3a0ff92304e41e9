"""Keys and values of every layer, kept from one pass of a model for later passes over a part of the same sequence.

The first pass, over all tokens, fills the cache. A later pass over tokens [start, start + n) puts its own keys and
values in their place and attends to all that are held; those of other tokens stay as they were, although they would
have changed with the tokens: that is the approximation. Knows nothing of models, attention and sampling.
"""

from torch import Tensor


class KeyValueCache:
    """Empty until a pass over a whole sequence has filled it; for inference only.

    Later passes write into the tensors that it holds and that attention has been given: who keeps them, copies them.

    Attributes:
        layers: what every layer holds, in their order: keys after positional encoding and values, each [B, G, N, D].
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int | None:
        """N, tokens of the sequence; None while the cache is empty."""
        return self.layers[0][0].shape[2] if self.layers else None

    @property
    def batch(self) -> int | None:
        """B, rows of the batch; None while the cache is empty."""
        return self.layers[0][0].shape[0] if self.layers else None

    def replace(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Hold the keys and values [B, G, n, D] of tokens [start, start + n) of a layer; returns those of all tokens.

        Layers of an empty cache come in their order, with all tokens.
        """
        if layer == len(self.layers):
            self.layers.append((keys, values))
        else:
            for held, new in zip(self.layers[layer], (keys, values), strict=True):
                held[:, :, start : start + new.shape[2]] = new
        return self.layers[layer]

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows of the batch but these, [B'] int64."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]
