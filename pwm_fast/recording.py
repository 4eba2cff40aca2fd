"""What all recordings of CUDA graphs share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pwm_fast import memory


class RecordingError(RuntimeError):
    """Something cannot become part of a CUDA graph; the message says what CUDA refused."""


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, without: str
) -> Iterator[None]:
    """Inside, what is launched becomes the graph; nothing is computed.

    Whatever has to be compiled, loaded or made by a library must have been before. Threads but this
    one may use the device meanwhile.

    Args:
        graph: a new one.
        stream: that is recorded; current inside.
        without: what to set to do without graphs, for the message.

    Raises:
        RecordingError: it cannot be recorded. Torch's allocator and random numbers may be of no
            more use in this process then.
    """
    refused: Exception | None = None
    try:
        with (
            torch.cuda.device(stream.device),
            # Where ending a recording fails, torch leaves its stream the current one.
            torch.cuda.stream(torch.cuda.current_stream(stream.device)),
            _without_gc(),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            try:
                yield
            except Exception as error:
                refused = error
                raise
    except RuntimeError as error:
        # The end of a recording that was spoilt fails, too, with nothing to say.
        first = error if refused is None else refused
        if memory.is_out_of_memory(first) or not isinstance(first, RuntimeError):
            raise first from None
        text = " ".join(str(first).split())[:300]
        raise RecordingError(
            f"a CUDA graph cannot be recorded ({text}); {without} does without"
        ) from first


@contextmanager
def _without_gc() -> Iterator[None]:
    """Keep the collector from freeing memory of the device inside: that would break a recording."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
