"""What is measured: cases, each a table of providers that compute the same thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from bench import gate
from bench.gate import Outputs
from bench.measure import Effort
from bench.providers import unit_of

Check = Callable[[], Outputs | None]
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

    make: Mapping[str, Callable[[], Provider]]
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
        unit = unit_of(name, self.device)
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


def all_cases(device: torch.device) -> list[Case]:
    """Every case for that kind of device."""
    from bench.cases import data, epochs, gradients, operations, rollouts, updates

    parts = [rollouts, updates, epochs, operations, gradients, data]
    return [case for part in parts for case in part.cases(device)]
