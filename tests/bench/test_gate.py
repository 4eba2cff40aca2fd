"""A wrong result is refused, a right one is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import gate
from bench.cases import Provider, Workload

Outputs = dict[str, list[Tensor]]


def draw(seed: int = 0) -> tuple[Outputs, Outputs]:
    """A truth, and what plain PyTorch might make of it in fp32: 1e-6 off."""
    g = torch.Generator().manual_seed(seed)
    truth = {
        "gradient": [
            torch.randn(500, generator=g, dtype=torch.float64),
            1e-6 * torch.randn(50, generator=g, dtype=torch.float64),
        ]
    }
    off = {
        "gradient": [
            (x * (1 + 1e-6 * torch.randn(x.shape, generator=g, dtype=torch.float64))).float()
            for x in truth["gradient"]
        ]
    }
    return truth, off


def change(outputs: Outputs, i: int, f: Callable[[Tensor], Tensor]) -> Outputs:
    parts = list(outputs["gradient"])
    parts[i] = f(parts[i].clone())
    return {"gradient": parts}


def test_equally_good_results_pass() -> None:
    truth, unit = draw()
    _, other = draw()
    gate.check("fast", other, unit, truth)
    gate.check("published", unit, unit, truth)


WRONG = {
    "one element": lambda x: x.index_fill(0, torch.tensor([3]), float(x[3]) * 1.001),
    "scaled": lambda x: x * (1 + 1e-4),
    "sign": torch.neg,
    "not finite": lambda x: x.index_fill(0, torch.tensor([3]), float("nan")),
    "shape": lambda x: x[:-1],
}


@pytest.mark.parametrize("i", [0, 1])  # the second is of millionths: no less to be right
@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_are_refused(name: str, i: int) -> None:
    truth, unit = draw()
    with pytest.raises(gate.Mismatch, match="gradient"):
        gate.check("fast", change(unit, i, WRONG[name]), unit, truth)


def test_missing_outputs_are_refused() -> None:
    truth, unit = draw()
    with pytest.raises(gate.Mismatch, match="outputs"):
        gate.check("fast", {}, unit, truth)


@pytest.mark.parametrize("provider", gate.SANE)
def test_the_unit_itself_must_be_sane(provider: str) -> None:
    truth, unit = draw()
    with pytest.raises(gate.Mismatch, match="relative error"):
        gate.check(provider, change(unit, 0, lambda x: 1.2 * x), unit, truth)


def workload(found: Outputs, units: list[Outputs], truths: list[Outputs]) -> Workload:
    """A workload with further draws, each of its own unit and truth."""
    make = {
        "published": lambda: Provider(lambda: None, lambda: units[0]),
        "autocast": lambda: Provider(lambda: None, lambda: units[0]),
        "fast": lambda: Provider(lambda: None, lambda: found),
    }
    again = (lambda: workload(found, units[1:], truths[1:])) if len(units) > 1 else None
    return Workload(make, lambda: truths[0], again)


def test_a_lucky_unit_is_looked_at_again() -> None:
    """Plain PyTorch happens to be exact in the first draw; the second shows its usual error."""
    truth, usual = draw()
    exact = {"gradient": [x.float() for x in truth["gradient"]]}
    other_truth, other = draw(1)
    one = workload(usual, [exact], [truth])
    with pytest.raises(gate.Mismatch):
        one.verify("fast", one.make["fast"]())
    two = workload(usual, [exact, other], [truth, other_truth])
    two.verify("fast", two.make["fast"]())
    bad = workload(change(usual, 0, lambda x: 1.001 * x), [exact, other], [truth, other_truth])
    with pytest.raises(gate.Mismatch):
        bad.verify("fast", bad.make["fast"]())


def test_bf16_is_measured_in_units_of_autocast() -> None:
    truth, unit = draw()
    rough = change(unit, 0, lambda x: x.bfloat16().float())
    rough = change(rough, 1, lambda x: x.bfloat16().float())
    w = workload(rough, [rough], [truth])
    w.verify("fast_bf16", w.make["fast"]())
    with pytest.raises(gate.Mismatch):
        gate.check("fast", rough, unit, truth)
