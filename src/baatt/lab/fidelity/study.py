"""All measurements of a run: each is made once, kept in a store, and taken from there by the next run that asks for it.

In: a `Reader`, a tokenizer, a text, cells. Out: a record for each cell, with intervals and beside dense attention. The
cost of every layer made sparse alone is a list of cells like any other.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from baatt.config import BAAttConfig, Policy
from baatt.integrations.enable import enable
from baatt.lab.answers import AnswerStore, request_key
from baatt.lab.fidelity.documents import Document, Masks, make_documents
from baatt.lab.fidelity.measure import Comparison, DenseRunError, find_shift, record_of
from baatt.lab.fidelity.profile import grid
from baatt.lab.fidelity.reader import Reader


class Cell(NamedTuple):
    """One measurement.

    config: None is dense attention. name: of a policy that is not the usual one. layer: the one that is sparse alone.
    """

    length: int
    config: BAAttConfig | None = None
    policy: Policy = Policy()
    name: str = ""
    layer: int | None = None


@dataclass(frozen=True)
class Setup:
    """What measurements depend on beside their cells; text and files by checksums."""

    files: dict[str, str]
    dtype: str
    impl: str
    documents: int
    needles: int
    seed: int
    mask_share: float
    batch_size: int


class Study:
    """Measures cells.

    Args:
        lengths: of the cells to come. commit: kept with what is measured. advance: told how many documents were read.

    Attributes:
        layers: how many the model has.

    Raises:
        ValueError: a length beyond the model's positions, or a text too short for the documents.
    """

    def __init__(
        self,
        reader: Reader,
        tokenizer: Tokenizer,
        text: str,
        lengths: Sequence[int],
        setup: Setup,
        store: AnswerStore,
        commit: str | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.reader, self.setup, self.store, self.advance, self.commit = reader, setup, store, advance, commit
        positions = find_positions(reader.model.config)
        if positions is not None and max(lengths) > positions:
            raise ValueError(f"--lengths must be within the {positions} positions of the model, got {max(lengths)}")
        masks = (
            Masks(reader.mask_token, setup.mask_share) if reader.sees_ahead and reader.mask_token is not None else None
        )
        make = functools.partial(
            make_documents, tokenizer, text, count=setup.documents, needles=setup.needles, seed=setup.seed, masks=masks
        )
        self.documents: dict[int, list[Document]] = {length: make(length) for length in lengths}
        if masks is not None:
            reader.shift = find_shift(reader, self.documents[min(lengths)][0])
        self._about = [dataclasses.asdict(setup), hashlib.sha256(text.encode()).hexdigest(), reader.shift]
        self._comparison: tuple[int, Comparison] | None = None
        with enable(reader.model, None) as handle:
            self.layers = handle.layer_count or 0

    def open_documents(self, cells: Sequence[Cell]) -> int:
        """How many documents are still to be read for some cells, densely for comparison too."""
        missing = [cell for cell in cells if self._key(cell) not in self.store]
        sparse = sum(cell.config is not None for cell in missing)
        return self.setup.documents * (sparse + len({cell.length for cell in missing}))

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Numbers of every document, as `Comparison.measure`; a DenseRunError says which cell it was."""
        key = self._key(cell)
        if key not in self.store:
            if self._comparison is None or self._comparison[0] != cell.length:
                self._comparison = None  # its states go before others come
                comparison = Comparison(
                    self.reader, self.documents[cell.length], batch_size=self.setup.batch_size, impl=self.setup.impl,
                    advance=self.advance,
                )  # fmt: skip
                self._comparison = cell.length, comparison
            try:
                measured = self._comparison[1].measure(cell.config, cell.policy)
            except DenseRunError as error:
                where = f"{cell.length} tokens, {cell.config.score}, sparsity {cell.config.sparsity:g}"  # type: ignore[union-attr]
                raise DenseRunError(f"{where}: {error}") from None
            self.store.put(key, measured | {"commit": self.commit})
        found: dict[str, Any] = self.store[key]
        return found

    def record(self, cell: Cell) -> dict[str, Any]:
        """A cell as it is stored, with intervals."""
        measured, dense = self.measure(cell), self.measure(Cell(cell.length))
        config = dataclasses.asdict(cell.config) if cell.config else {}
        about: dict[str, Any] = {"length": cell.length, "config": config, "policy": dataclasses.asdict(cell.policy)}
        about |= {"name": cell.name} if cell.layer is None else {"layer": cell.layer}
        return about | record_of(measured, dense)

    def layer_cells(self, length: int, config: BAAttConfig, policy: Policy) -> list[Cell]:
        """Each layer that the policy leaves sparse, alone, at several sparsities around the config's."""
        dense = policy.check_layers(self.layers).dense_layers
        configs = [dataclasses.replace(config, sparsity=sparsity) for sparsity in grid(config.sparsity)]
        layers = [layer for layer in range(self.layers) if layer not in dense]
        return [Cell(length, one, self._alone(policy, layer), layer=layer) for layer in layers for one in configs]

    def layer_records(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Of `layer_cells`, without the layers whose calls stay dense for another reason.

        Raises:
            DenseRunError: that are all.
        """
        found, refusal = [], DenseRunError("no layer is left to be sparse")
        for cell in cells:
            try:
                found.append(self.record(cell))
            except DenseRunError as error:
                refusal = error
        if not found:
            raise refusal
        return found

    def _alone(self, policy: Policy, layer: int) -> Policy:
        others = tuple(other for other in range(self.layers) if other != layer)
        return dataclasses.replace(policy, dense_layers=others, layer_sparsity=())

    def _key(self, cell: Cell) -> str:
        config = dataclasses.asdict(cell.config) if cell.config else {}
        return request_key("fidelity", self._about, cell.length, config, dataclasses.asdict(cell.policy))


def find_positions(config: Any) -> int | None:
    """How many tokens a model was made for, by its config."""
    text = getattr(config, "text_config", None) or config
    names = ("max_sequence_length", "max_position_embeddings")
    return next((found for name in names if (found := getattr(text, name, None))), None)
