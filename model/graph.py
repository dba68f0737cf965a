"""A training step as one CUDA graph: the GPU is told once what a step is, and from then on only to do it again.

At batch 1 a step is some thousand kernels of a few microseconds each, which Python launches slower than they run.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

EAGER_STEPS = 3  # before a step is recorded: cuDNN chooses its algorithms, the optimisers make their state


class GraphedStep:
    """`learn(source, target)`, recorded after a few calls and played back from then on.

    Every call is a step like any other: the first few run as they are, and recording computes nothing. Batches must
    keep their shape. Where a step cannot be recorded it goes on as it began, and says so.
    """

    def __init__(self, learn: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._learn, self._calls = learn, 0
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, Tensor] | None = None
        self._losses: Tensor | None = None

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        self._calls += 1
        if self._calls <= EAGER_STEPS:
            return self._aside(source, target)
        if self._calls == EAGER_STEPS + 1:
            self._record(source, target)
        if self._graph is None or self._batch is None or self._losses is None:
            return self._learn(source, target)
        for place, values in zip(self._batch, (source, target), strict=True):
            place.copy_(values)
        self._graph.replay()
        return self._losses.clone()  # the next step writes where these lie

    def _aside(self, source: Tensor, target: Tensor) -> Tensor:
        """On the stream that it will be recorded on, as what is to be recorded must have run before."""
        self._stream, here = self._stream or torch.cuda.Stream(source.device), torch.cuda.current_stream(source.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            losses = self._learn(source, target)
        here.wait_stream(self._stream)
        return losses

    def _record(self, source: Tensor, target: Tensor) -> None:
        graph, batch = torch.cuda.CUDAGraph(), (source.clone(), target.clone())
        here = torch.cuda.current_stream(source.device)
        gc.collect()  # what an earlier training left must not be freed while this is recorded
        try:
            # Other threads, which write logs and show progress, may go on meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                losses = self._learn(*batch)
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # where ending a recording fails, its stream stays the current one
            memory = next((e for e in (error, error.__context__) if isinstance(e, torch.OutOfMemoryError)), None)
            if memory is not None:  # of what fails next, out of memory is the cause
                raise memory from None
            log.warning("a step cannot be recorded as a CUDA graph (%s); going on without", str(error).split("\n")[0])
            return
        self._graph, self._batch, self._losses = graph, batch, losses
