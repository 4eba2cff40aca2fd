"""What surrounds a recording, on stand-ins for ``torch.cuda``."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pwm_fast.recording import RecordingError, recording


class Spoilt(RuntimeError):
    """What CUDA says at the end of a recording in which something was refused."""


class Cuda:
    """Streams and graphs; the end of a spoilt recording fails, and leaves its stream current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = self.callers = SimpleNamespace(device="cuda:1")
        self.recorded = SimpleNamespace(device="cuda:1")
        self.fails_at_the_end = False
        self.modes: list[str] = []
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)

    @contextmanager
    def device(self, device: str) -> Iterator[None]:
        assert device == "cuda:1"
        yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.modes.append(capture_error_mode)
        before, self.current = self.current, stream
        try:
            yield
        finally:
            if self.fails_at_the_end:
                raise Spoilt("operation failed due to a previous error during capture")
            self.current = before

    def record(self, work: Callable[[], None]) -> None:
        with recording(object(), self.recorded, without="graphs=false"):  # type: ignore[arg-type]
            work()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_inside(cuda: Cuda) -> None:
    seen: list[Any] = []
    cuda.record(lambda: seen.extend((cuda.current, gc.isenabled())))
    assert seen == [cuda.recorded, False]
    assert cuda.current is cuda.callers and gc.isenabled()
    assert cuda.modes == ["thread_local"]  # others may use the device meanwhile


def fail(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("at_the_end", [False, True])
def test_what_was_refused_first_is_said(cuda: Cuda, at_the_end: bool) -> None:
    cuda.fails_at_the_end = at_the_end
    refused = RuntimeError("operation not permitted when\nstream is capturing")
    with pytest.raises(
        RecordingError,
        match=r"\(operation not permitted when stream is capturing\); graphs=false does without",
    ) as caught:
        cuda.record(fail(refused))
    assert caught.value.__cause__ is refused
    assert cuda.current is cuda.callers and gc.isenabled()


def test_an_end_that_fails_by_itself(cuda: Cuda) -> None:
    cuda.fails_at_the_end = True
    with pytest.raises(RecordingError, match="previous error during capture"):
        cuda.record(lambda: None)


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), TypeError("x")])
def test_other_errors_stay_what_they_are(cuda: Cuda, error: Exception, at_the_end: bool) -> None:
    cuda.fails_at_the_end = at_the_end
    with pytest.raises(type(error)) as caught:
        cuda.record(fail(error))
    assert caught.value is error
