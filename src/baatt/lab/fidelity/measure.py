"""Dense against sparse on the same documents: divergence, loss, agreement and planted facts, a number per document.

In: a `Reader`, documents of one length, a setting. Out: a plain dict that JSON can hold. The states of the dense pass
are kept, its logits are made again beside the sparse ones, a slab of tokens at a time. A pass in which nothing was
sparse is an error: its numbers would be those of dense attention.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from baatt.config import BAAttConfig, Policy
from baatt.integrations.enable import enable
from baatt.integrations.reasons import ALL_KEPT, BY_POLICY, NoSparseAttentionWarning
from baatt.lab.fidelity.documents import Document
from baatt.lab.fidelity.reader import SLAB, Reader
from baatt.lab.statistics import bootstrap_interval
from baatt.types import widest

#: What is measured of every document; see `record_of`.
MEASURES = ("kl", "loss", "agreement", "recalled", "recalled_whole")


class DenseRunError(ValueError):
    """A setting that skipped nothing."""


class Comparison:
    """Documents of one length, and what the dense model makes of them.

    Args:
        batch_size: documents read together. impl: as `enable`. advance: told how many documents were read.
    """

    def __init__(
        self,
        reader: Reader,
        documents: Sequence[Document],
        *,
        batch_size: int = 1,
        impl: str = "auto",
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.reader, self.documents, self.batch_size, self.impl = reader, documents, batch_size, impl
        self.advance = advance
        self._wanted = [_tensor([one.tokens[place] for place in one.targets], reader) for one in documents]
        self._dense: list[Tensor] | None = None

    @property
    def dense(self) -> list[Tensor]:
        """States of the dense pass at what predicts the targets, [R, C] of every document."""
        if self._dense is None:
            self._dense = list(self._read())
        return self._dense

    def measure(self, config: BAAttConfig | None, policy: Policy) -> dict[str, Any]:
        """Numbers of each document, how sparse the passes were and why calls stayed dense; None is the dense model.

        `layers_routed` are the layers whose block pairs `sparsity_achieved` is a share of.

        Raises:
            DenseRunError: no call was sparse, or every block was kept.
        """
        started, dense = time.perf_counter(), self.dense
        found: dict[str, Any] = {name: [] for name in MEASURES}
        if config is None:
            for number, states in enumerate(dense):
                self._compare(number, states, states, found)
            return found | {"sparsity_achieved": 0.0, "reasons": {}, "seconds": time.perf_counter() - started}
        with warnings.catch_warnings(), enable(self.reader.model, config, policy, impl=self.impl) as handle:
            warnings.simplefilter("ignore", NoSparseAttentionWarning)
            sparse = []
            for states in self._read():
                if not handle.sparse_calls:
                    reasons = "; ".join(f"{count} dense: {reason}" for reason, count in handle.reasons.items())
                    raise DenseRunError(f"no attention call was sparse ({reasons or 'none came to baatt'})")
                if not handle.sparsity:
                    raise DenseRunError(f"every block was kept: too few blocks of {config.block_size} tokens")
                sparse.append(states)
        for number, states in enumerate(sparse):
            self._compare(number, dense[number], states, found)
        routed = [one for one in handle.layers.values() if one.sparse or any(map(is_routed, one.reasons))]
        return found | {
            "sparsity_achieved": handle.tally(is_routed).skipped, "layers_routed": len(routed),
            "sparse_calls": handle.sparse_calls, "reasons": handle.reasons, "seconds": time.perf_counter() - started,
        }  # fmt: skip

    def _read(self) -> Iterator[Tensor]:
        for first in range(0, len(self.documents), self.batch_size):
            some = self.documents[first : first + self.batch_size]
            states = self.reader.states(_tensor([one.inputs for one in some], self.reader))
            for document, rows in zip(some, states, strict=True):
                yield rows[(_tensor(document.targets, self.reader) - self.reader.shift).clamp(min=0)]
            self.advance(len(some))

    def _compare(self, number: int, dense: Tensor, sparse: Tensor, found: dict[str, Any]) -> None:
        """Add the numbers of one document."""
        document = self.documents[number]
        kl, loss, agreement, right = compare(self.reader, dense, sparse, self._wanted[number]).tolist()
        by_place = dict(zip(document.targets, right, strict=True))
        answers = [[by_place[place] for place in answer] for answer in document.answers]
        tokens = [one for answer in answers for one in answer]
        found["kl"].append(_mean(kl))
        found["loss"].append(_mean(loss))
        found["agreement"].append(_mean(agreement))
        if answers:
            found["recalled"].append(_mean(tokens))
            found["recalled_whole"].append(_mean([float(all(answer)) for answer in answers]))


def is_routed(reason: str | None) -> bool:
    """Whether a call was sparse, or stayed dense because the policy says so or no block is left out."""
    return reason in (None, ALL_KEPT) or reason.startswith(BY_POLICY)


def compare(reader: Reader, dense: Tensor, sparse: Tensor, wanted: Tensor) -> Tensor:
    """Of every row: KL(dense || sparse) in nats, -log of the wanted token, whether both have the same largest logit,
    whether it is the wanted one.

    Args:
        dense, sparse: states [R, C]. wanted: ids [R].

    Returns:
        [4, R] float64, where the device has it.
    """
    parts = []
    rows = max(1, SLAB // (2 * reader.vocabulary))
    for first in range(0, len(wanted), rows):
        one, other, ids = (x[first : first + rows] for x in (dense, sparse, wanted))
        expected, actual = reader.logits(torch.cat([one, other])).log_softmax(-1).chunk(2)
        best = actual.argmax(-1)
        kl = (expected.exp() * (expected - actual)).nan_to_num().sum(-1)  # a logit of -inf is no token: 0 x nan
        loss = -actual.gather(-1, ids[:, None])[:, 0]
        parts.append(
            torch.stack([x.to(widest(x.device)) for x in (kl, loss, expected.argmax(-1) == best, best == ids)])
        )
    return torch.cat(parts, dim=1)


def find_shift(reader: Reader, document: Document) -> int:
    """Whether a model that fills masks predicts a token at its own place (0) or at the one before (1, as Dream does):
    where the dense model's loss is smaller."""
    states = reader.states(_tensor([document.inputs], reader))[0]
    targets, wanted = _tensor(document.targets, reader), _tensor([document.tokens[n] for n in document.targets], reader)
    losses = [
        float(compare(reader, rows, rows, wanted)[1].mean())
        for rows in (states[(targets - shift).clamp(min=0)] for shift in (0, 1))
    ]
    return losses.index(min(losses))


def record_of(measured: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals over documents, and the numbers of every document.

    Returns:
        kl: of the predictions to the dense ones, nats a token; loss: of the right token; agreement: share of tokens
        with the same largest logit; recalled: share of the tokens of planted numbers predicted right, recalled_whole:
        of whole numbers; recalled_lost: how much less than the dense model, paired by document.
    """
    values = {name: measured[name] for name in MEASURES}
    values["recalled_lost"] = [a - b for a, b in zip(dense["recalled"], measured["recalled"], strict=True)]
    record = {name: value for name, value in measured.items() if name not in MEASURES}
    for name, numbers in values.items():
        if numbers:
            low, high = bootstrap_interval(numbers)
            record |= {name: _mean(numbers), f"{name}_low": low, f"{name}_high": high, f"{name}_of_documents": numbers}
    return record


def _tensor(values: Any, reader: Reader) -> Tensor:
    return torch.tensor(values, device=reader.device)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
