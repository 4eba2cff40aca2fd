"""Updates that are recorded once as a CUDA graph and then replayed.

A replay launches all kernels of an update at once, where Python would launch them one by one; what
it reads and writes lies at fixed addresses. So inputs are copied into tensors of the graph's own,
parameters, moments and counters are updated in place, and nothing may ask the device for a value.
PyTorch's generator of the device takes part: every replay draws other numbers, the same that the
update would have drawn without a graph.

The first calls run as they are, on the stream that is recorded later: they compile kernels, make
libraries' workspaces and Adam's state. They too read copies of the inputs, laid out as those of the
recording: Triton loads another kernel for another alignment, which CUDA refuses while it records.
Recording itself computes nothing, so the update that is recorded is then replayed once for the call
at hand.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pwm_fast.ops import invalidate
from pwm_fast.ops.extend import capturing
from pwm_fast.recording import recording

T = TypeVar("T")
WARM_UP = 2  # calls; the first makes Adam's state, the second is as all that follow
KEPT = 4  # recordings of one update, for the shapes used last


class Update(NamedTuple):
    """What an update gives.

    Attributes:
        metrics: scalars on the device.
        handed: tensors for the update that follows; the next call overwrites them.
        gradients: of the parameters, where they are asked for; likewise.
    """

    metrics: dict[str, Tensor]
    handed: tuple[Tensor | None, ...] = ()
    gradients: tuple[Tensor, ...] = ()


class Recorder(Protocol):
    """What records a computation: CUDA graphs, or a stand-in for them."""

    def run(self, function: Callable[[], T]) -> T:
        """Compute, where :meth:`record` will record."""

    def record(self, function: Callable[[], list[Tensor]]) -> Callable[[], None]:
        """Record, without computing; returns what computes the same into the same tensors.

        Args:
            function: returns the tensors that are read after a replay.
        """


class CudaGraphs:
    """Records on a stream of its own; each recording has its own memory pool.

    Two recordings in one pool would overwrite each other's outputs, which live on between replays.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, function: Callable[[], T]) -> T:
        """Compute on the stream of the recordings, in order with the caller's stream.

        What it allocates may be freed at any time: the stream takes the memory again only after it
        has waited for the caller's, in the next call.
        """
        with torch.cuda.device(self.device):
            caller = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                result = function()
            caller.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], list[Tensor]]) -> Callable[[], None]:
        """Record a graph; it replays on the caller's current stream."""
        graph = torch.cuda.CUDAGraph()
        with capturing(), recording(graph, self._stream, without="graphs=false"):
            function()
        return graph.replay

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaGraphs:
        """Another recorder: streams are no data."""
        return CudaGraphs(self.device)


class _Recording(NamedTuple):
    inputs: tuple[Tensor | None, ...]  # kept for their memory
    copies: list[Tensor]  # those that are copied in
    names: tuple[str, ...]
    values: Tensor | None  # all metrics
    handed: tuple[Tensor | None, ...]
    gradients: tuple[Tensor, ...]
    replay: Callable[[], None]


class CapturedUpdate:
    """An update that is recorded once for each form of its inputs, and replayed.

    Args:
        function: computes the update of its inputs.
        recorder: records it.
        in_place: inputs are read where they are, not copied: they are what another captured update
            hands on. A recording then stands for their addresses, too.
        warm_up: calls that run as they are before one is recorded, for every form.
    """

    def __init__(
        self,
        function: Callable[..., Update],
        recorder: Recorder,
        *,
        in_place: bool = False,
        warm_up: int = WARM_UP,
    ) -> None:
        self.function, self.recorder = function, recorder
        self.in_place, self.warm_up = in_place, warm_up
        self._calls: Counter[Hashable] = Counter()
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self.recorded = 0  # how often something was recorded
        self.replayed = 0

    def __call__(self, *inputs: Tensor | None, key: Hashable = ()) -> Update:
        """Update once.

        Args:
            *inputs: as the function takes them; without gradients.
            key: whatever else decides what the function does.
        """
        form = (key, tuple(_form(x) for x in inputs))
        if self._calls[form] < self.warm_up:
            self._calls[form] += 1
            return self.recorder.run(lambda: self.function(*self._own(inputs)))
        place = (form, _places(inputs)) if self.in_place else form
        recording = self._recordings.get(place)
        if recording is None:
            recording = self._record(inputs)
            self._recordings[place] = recording
            if len(self._recordings) > KEPT:
                self._recordings.popitem(last=False)
        elif len(self._recordings) > 1:
            self._recordings.move_to_end(place)
        return self._replay(recording, inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedUpdate:
        """The same update of another agent, with nothing recorded."""
        function, recorder = copy.deepcopy((self.function, self.recorder), memo)
        return CapturedUpdate(function, recorder, in_place=self.in_place, warm_up=self.warm_up)

    def forget(self) -> None:
        """Drop all recordings and their memory: tensors that they use were replaced."""
        self._calls.clear()
        self._recordings.clear()

    def _own(self, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """What an update reads: contiguous copies, or the inputs in place."""
        if self.in_place:
            return inputs
        return tuple(None if x is None else _copy(x) for x in inputs)

    def _record(self, inputs: tuple[Tensor | None, ...]) -> _Recording:
        own = self._own(inputs)
        copies = [] if self.in_place else [x for x in own if x is not None]
        read: list[tuple[Any, ...]] = []

        def function() -> list[Tensor]:
            metrics, handed, gradients = self.function(*own)
            # One tensor: a replay's caller copies it once.
            values = torch.stack(list(metrics.values())) if metrics else None
            read.append((tuple(metrics), values, handed, gradients))
            return [x for x in (values, *handed, *gradients) if x is not None]

        replay = self.recorder.record(function)
        self.recorded += 1
        names, values, handed, gradients = read[-1]
        return _Recording(own, copies, names, values, handed, gradients, replay)

    def _replay(self, recording: _Recording, inputs: Sequence[Tensor | None]) -> Update:
        if recording.copies:
            torch._foreach_copy_(recording.copies, [x for x in inputs if x is not None])
        recording.replay()
        self.replayed += 1
        invalidate()  # parameters changed without PyTorch's knowledge, inside `keeping`
        if recording.values is None:
            return Update({}, recording.handed, recording.gradients)
        metrics = dict(zip(recording.names, recording.values.clone().unbind(), strict=True))
        return Update(metrics, recording.handed, recording.gradients)


def _form(x: Tensor | None) -> Hashable:
    return None if x is None else (x.shape, x.dtype, x.device)


def _places(inputs: Sequence[Tensor | None]) -> Hashable:
    return tuple(None if x is None else (x.data_ptr(), x.stride()) for x in inputs)


def _copy(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
