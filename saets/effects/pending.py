"""What a run still has to measure: the missing blocks of its baseline, then the vectors of its sources, each once.

Vectors are not kept: 9 bytes of each are, and the sources are gone through again by whoever needs the numbers. So the memory
of a run does not grow with the vectors' width, and hardly with their number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from saets.effects.sources import vector_items
from saets.effects.worker import baseline_items
from saets.experiment.config import BASELINE, Experiment
from saets.records import VectorItem


class Pending:
    """The items of an experiment that have no result yet.

    Raises:
        InputError: what `vector_items` finds wrong with the sources; all of them are gone through once.
    """

    def __init__(
        self, experiment: Experiment, d_model: int, known: NDArray[np.uint64] | None = None, blocks: Collection[str] = ()
    ) -> None:
        """`known` are the `id_numbers` of vectors that need no measuring, `blocks` the ids of baseline blocks that are there."""
        self.experiment, self.d_model = experiment, d_model
        ids = np.unique(np.fromiter((int(item.vector_id, 16) for item in vector_items(experiment, d_model)), np.uint64))
        self._ids = ids if known is None else np.setdiff1d(ids, known, assume_unique=True)
        self._left = np.ones(len(self._ids), dtype=bool)
        self._blocks = {item.vector_id for item in baseline_items(experiment, d_model)} - set(blocks)
        self.vectors_known = len(ids) - len(self._ids)
        """Vectors of the sources that are in `known`."""

    def __len__(self) -> int:
        """Items without a result."""
        return int(self._left.sum()) + len(self._blocks)

    @property
    def vectors(self) -> int:
        """Vectors among them."""
        return int(self._left.sum())

    def __iter__(self) -> Iterator[VectorItem]:
        """The items, always in the same order: baseline blocks first. Results that come meanwhile change nothing."""
        blocks, left = set(self._blocks), self._left.copy()
        yield from (item for item in baseline_items(self.experiment, self.d_model) if item.vector_id in blocks)
        count = int(left.sum())
        if not count:
            return
        for item in vector_items(self.experiment, self.d_model):
            place = self._place(item)
            if place is not None and left[place]:
                left[place] = False
                count -= 1
                yield item
            if not count:
                return

    def done(self, items: Iterable[VectorItem]) -> None:
        """These have a result now."""
        for item in items:
            if item.source == BASELINE:
                self._blocks.discard(item.vector_id)
            elif (place := self._place(item)) is not None:
                self._left[place] = False

    def _place(self, item: VectorItem) -> int | None:
        number = np.uint64(int(item.vector_id, 16))
        place = int(np.searchsorted(self._ids, number))
        return place if place < len(self._ids) and self._ids[place] == number else None


def id_numbers(ids: Iterable[str]) -> NDArray[np.uint64]:
    """Vector ids as numbers, 8 bytes each."""
    return np.fromiter((int(one, 16) for one in ids), np.uint64)
