"""CUDA graphs of decoding steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from saets.engine.batch import Batch

logger = logging.getLogger(__name__)


class StepGraphs:
    """CUDA graphs of the steps of one shape of batch, one a position: a step then costs one launch.

    The first batch of a shape runs as it is, the second is recorded, later ones are played back. Where recording fails, steps
    go on running as they are.
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._encode: Any = None
        self._runs, self._off = 0, False
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def adopt(self, batch: Batch, encode: Any) -> Batch:
        """The batch in tensors that recorded graphs refer to."""
        if self._batch is None or not self._batch.same_shape(batch) or self._encode != encode:
            self._graphs, self._pool, self._runs = {}, None, 0
            self._batch, self._encode = batch, encode
        else:
            self._batch.load(batch)
        self._runs += 1
        return self._batch

    def run(self, position: int, work: Callable[[], None]) -> None:
        """Do a step's work, by its graph where there is one."""
        if position not in self._graphs and self._runs > 1 and not self._off:
            self._record(position, work)
        if position in self._graphs:
            self._graphs[position].replay()
        else:
            work()

    def _record(self, position: int, work: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                work()
        except RuntimeError as error:
            logger.warning("CUDA graphs are off for this model: %s", str(error).splitlines()[0])
            self._graphs, self._off = {}, True
            return
        self._pool = graph.pool()
        self._graphs[position] = graph
