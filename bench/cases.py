"""What is measured: cases, each a table of providers that compute the same thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench import gate, providers
from bench.gate import Outputs
from bench.measure import Effort, graphed

Check = Callable[[], Outputs | None]
Function = Callable[..., Any]
Make = Callable[[], "Provider"]
MORE = (3, 16)  # draws to see plain PyTorch's error in, where fewer refuse a provider


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        call: what is timed.
        check: outputs to compare with the truth, computed before anything is timed; it may raise
            :class:`bench.gate.Mismatch` itself and return None. None checks nothing (a floor).
        wall: it waits for its results itself and is timed by the wall clock; torch knows nothing of
            its work.
    """

    call: Callable[[], object]
    check: Check | None = None
    wall: bool = False


@dataclass
class Workload:
    """A case with its inputs made.

    Attributes:
        make: makes each provider, in the order of the tables; raises
            :class:`bench.providers.Absent` where it cannot run here.
        truth: the outputs in float64, or None where no provider has outputs to compare.
        again: makes the same case from other random numbers.
        unit: outputs of plain PyTorch, by name, computed in less memory than the provider takes.
        device: of the inputs.
    """

    make: Mapping[str, Make]
    truth: Callable[[], Outputs] | None = None
    again: Callable[[], Workload] | None = None
    unit: Mapping[str, Callable[[], Outputs]] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable
    _known: dict[str, Outputs] = field(default_factory=dict)

    def verify(self, name: str, provider: Provider) -> None:
        """Compare a provider's outputs with the truth, in units of plain PyTorch's error.

        Raises:
            bench.gate.Mismatch: they are wrong.
        """
        if provider.check is None:
            return
        found = provider.check()
        if found is None:
            return
        if name in gate.SANE:
            self._known[name] = found
        unit = providers.unit_of(name, self.device)
        pair = self.outputs(unit), self.outputs("truth")
        try:
            gate.check(name, found, *pair)
        except gate.Mismatch:
            if name in gate.SANE or self.again is None:
                raise
            # In few numbers plain PyTorch's largest error may be small by luck: see more of it.
            others: list[tuple[Outputs, Outputs]] = []
            draw = self
            for enough in MORE:
                while draw.again is not None and len(others) < enough:
                    draw = draw.again()
                    others.append((draw.outputs(unit), draw.outputs("truth")))
                    draw.forget()
                try:
                    gate.check(name, found, *pair, others)
                    return
                except gate.Mismatch:
                    if enough == MORE[-1]:
                        raise

    def outputs(self, name: str) -> Outputs:
        """Outputs of ``truth`` or of a provider that is not refused here, computed once."""
        if name not in self._known:
            found = self.truth if name == "truth" else self.unit.get(name)
            if found is None and name != "truth":
                found = self.make[name]().check
            if found is None:
                raise RuntimeError(f"{name} has no outputs to compare with")
            self._known[name] = found() or {}
        return self._known[name]

    def forget(self) -> None:
        """Drop what the comparisons left in memory."""
        self._known.clear()


@dataclass(frozen=True)
class Case:
    """A row group of the tables.

    Attributes:
        name: unique; part of the test's id.
        axes: what it is: ``work`` (the operation or step), ``model``, ``batch``, ``mode``, ...
        build: makes it on a device.
        providers: names, the anchor of ratios first.
        marks: of ``figures`` and ``large``.
        quick: the providers that are in the quick subset.
        memory: bytes that the largest provider needs, roughly.
        effort: how long to measure.
    """

    name: str
    axes: Mapping[str, str | int]
    build: Callable[[torch.device], Workload]
    providers: tuple[str, ...]
    marks: frozenset[str] = frozenset()
    quick: frozenset[str] = frozenset()
    memory: float = 0.0
    effort: Effort = field(default_factory=Effort)


# Providers of the cases that are in the quick subset.
QUICK = frozenset(
    {"published", "separate", "frozen", "autocast", "reference"}
    | {"fast", "fast_bf16", "floor", "floor_bf16"}
)


def same(function: Function) -> Function:
    """Not compiled."""
    return function


def assemble(
    device: torch.device,
    plain: Callable[[str, Callable[[Function], Function]], Provider],
    ours: Callable[[str], Provider],
    floor: Callable[[torch.dtype], Callable[[], object]],
    *,
    operation: str = "mlp",
) -> dict[str, Make]:
    """All ways to compute a case, by name.

    Args:
        device: of the inputs.
        plain: makes plain PyTorch's provider of a name, after passing its inner function through
            its second argument: torch.compile, or nothing.
        ours: makes that of ``pwm_fast``, computed in the context of :func:`providers.backend`.
        floor: makes the floor's call in a dtype.
        operation: that must have a fast backend here.
    """

    def own(name: str) -> Provider:
        providers.need(name, device, operation)
        found = ours(name.removesuffix(providers.GRAPH))
        return captured(found) if name.endswith(providers.GRAPH) else found

    def compiled(name: str, graph: bool) -> Provider:
        mode = providers.MODES.get(name)
        found = plain(name, partial(providers.compiled, mode=mode))
        return captured(found) if graph else found

    def captured(found: Provider) -> Provider:
        if device.type != "cuda":
            raise providers.Absent("a CUDA graph needs a GPU")
        call = graphed(found.call)
        return Provider(call, call)

    def bottom(name: str, dtype: torch.dtype) -> Provider:
        with providers.eager(name, device):
            found = floor(dtype)
        if name not in providers.CONTEXTS:
            return Provider(found)

        def call() -> None:
            with providers.eager(name, device):
                found()

        return Provider(call)

    return {
        **{n: partial(plain, n, same) for n in ("published", "autocast", "tf32")},
        "graph": lambda: captured(plain("frozen", same)),
        "compile": partial(compiled, "compile", False),
        **{n: partial(compiled, n, True) for n in ("compile_tf32", "compile_bf16", "compile_max")},
        **{n: partial(own, n) for n in ("reference", "algebra", *providers.OURS)},
        **{n: partial(own, n) for n in (name + providers.GRAPH for name in providers.OURS)},
        "floor": partial(bottom, "floor", torch.float32),
        "floor_tf32": partial(bottom, "floor_tf32", torch.float32),
        "floor_bf16": partial(bottom, "floor_bf16", torch.bfloat16),
    }
