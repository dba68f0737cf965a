"""Run a training step as one CUDA graph: captured once, then replayed.

At batch size 1 a step consists of about a thousand kernels of a few microseconds each, which Python launches more
slowly than they run.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

EAGER_STEPS = 3  # warm-up before capture: cuDNN chooses its algorithms, optimisers allocate their state


class CudaGraphStep:
    """A training step `(source, target) -> losses`, captured after `EAGER_STEPS` calls and replayed from then on.

    Every call is a real training step; capture itself computes nothing. All batches must have the same shape. If the
    step cannot be captured, a warning is logged and it continues to run eagerly.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._step, self._calls = step, 0
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, Tensor] | None = None
        self._losses: Tensor | None = None

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        self._calls += 1
        if self._calls <= EAGER_STEPS:
            return self._run_on_capture_stream(source, target)
        if self._calls == EAGER_STEPS + 1:
            self._capture(source, target)
        if self._graph is None or self._batch is None or self._losses is None:
            return self._step(source, target)
        for captured, values in zip(self._batch, (source, target), strict=True):
            captured.copy_(values)
        self._graph.replay()
        return self._losses.clone()  # the next replay overwrites them

    def _run_on_capture_stream(self, source: Tensor, target: Tensor) -> Tensor:
        """Run eagerly on the capture stream (CUDA-graph warm-up)."""
        current = torch.cuda.current_stream(source.device)
        self._stream = self._stream or torch.cuda.Stream(source.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            losses = self._step(source, target)
        current.wait_stream(self._stream)
        return losses

    def _capture(self, source: Tensor, target: Tensor) -> None:
        """Capture the step.

        Raises:
            torch.OutOfMemoryError: memory ran out during capture.
        """
        graph, batch = torch.cuda.CUDAGraph(), (source.clone(), target.clone())
        current = torch.cuda.current_stream(source.device)
        gc.collect()  # graphs of earlier training runs must not be freed during capture
        try:
            # "thread_local": other threads, which write logs and show progress, may use CUDA during capture.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                losses = self._step(*batch)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails to end leaves its stream current
            # Running out of memory invalidates the capture, whose end then raises an error of its own.
            cause = next((e for e in (error, error.__context__) if isinstance(e, torch.OutOfMemoryError)), None)
            if cause is not None:
                raise cause from None
            log.warning("cannot capture a step as a CUDA graph (%s); continuing without", str(error).split("\n")[0])
            return
        self._graph, self._batch, self._losses = graph, batch, losses
