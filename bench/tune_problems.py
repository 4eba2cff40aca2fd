"""What the tuner measures: fused GEMMs and rollouts that agents ask for, and their choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import products
from bench.internals import planning, tuning
from bench.measure import Call

Options = tuning.Options
Times = dict[str, Any]  # by name of a choice: seconds a round, or what went wrong
PLAIN, LAYERS = "unfused", "layers"


@dataclass(frozen=True)
class Problem:
    """One launch to choose for.

    Attributes:
        kernel: whose entries.
        key: of the entry.
        choices: options by name.
        heuristic: the name that the kernel chooses by itself.
        prepare: makes the operands; its result makes a choice's call of its options, compared.
        model: microseconds that the cost model gives the choices, where it has a figure.
    """

    kernel: str
    key: str
    choices: Mapping[str, Options]
    heuristic: str
    prepare: Callable[[], Callable[[Options], Call]]
    model: Mapping[str, float]

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.kernel} {self.key}"


def problems(
    device: torch.device | None,
    limits: planning.Limits,
    rates: Sequence[str] = ("16",),
    rows: Sequence[int] = (),
) -> Iterator[Problem]:
    """Everything that reads tuned entries, the most wanted first.

    Args:
        device: to compute on; None makes problems that are only to be listed.
        limits: of the device.
        rates: precisions, of :data:`pwm_fast.kernels.plan.RATES`.
        rows: of the GEMMs (of a member) and rollouts, in place of those that agents have.
    """
    seen: set[str] = set()
    for problem in _problems(device, limits, rates, rows):
        if problem.name not in seen:  # other rows may be of the same class
            seen.add(problem.name)
            yield problem


def _problems(
    device: torch.device | None,
    limits: planning.Limits,
    rates: Sequence[str],
    rows: Sequence[int],
) -> Iterator[Problem]:
    wanted, rollouts = products.wanted(products.load())
    for rate in rates:
        element, precision = (2, "tf32") if rate == "16" else (4, rate)
        cast = [p._replace(element=element, input_precision=precision) for p in wanted]
        for rollout in _spread(rollouts, "batch", rows):
            yield from _rollout_problem(rollout, rate, device, limits)
        for product in _spread(cast, "rows", rows):
            if planning.candidates(product, limits):
                yield product_problem(product, device, limits)


def _spread(sizes: Iterable[Any], field: str, values: Sequence[int]) -> list[Any]:
    """The sizes with every value of a field; as they are where there are no values."""
    if not values:
        return list(sizes)
    return [size._replace(**{field: value}) for value in values for size in sizes]


def product_problem(
    product: planning.GemmShape, device: torch.device | None, limits: planning.Limits
) -> Problem:
    model = planning.model(product, limits)
    plans = {PLAIN if p is None else p.name: p for p in model}
    own = planning.plan(product, limits)

    def prepare() -> Callable[[Options], Call]:
        from bench.tune_products import WORKLOADS

        assert device is not None
        workload = WORKLOADS[product.kernel](product, device)
        return lambda options: workload.call(planning.entry_plan(options, product, limits))

    return Problem(
        product.kernel,
        product.key,
        {name: _options(p) for name, p in plans.items()},
        PLAIN if own is None else own.name,
        prepare,
        {PLAIN if p is None else p.name: t for p, t in model.items()},
    )


def _options(plan: planning.GemmPlan | None) -> Options:
    return {"block_m": 0} if plan is None else {"block_m": plan.block_m, "block_n": plan.block_n}


def _rollout_problem(
    rollout: products.Rollout, rate: str, device: torch.device | None, limits: planning.Limits
) -> Iterator[Problem]:
    """The problem of a rollout; none where only layer by layer can run."""
    from bench.internals import rollout_kernels as kernels

    if rate == "ieee":
        return
    dtype = torch.float16 if rate == "16" else torch.float32
    batch, padded = rollout
    sizes = (batch, padded, dtype.itemsize, *limits)
    layouts = {p.name: p for p in kernels.LAYOUTS if kernels.why_not(p, *sizes) is None}
    own = kernels.choose_layout(batch, padded, dtype, *limits)
    if not layouts:
        return

    def prepare() -> Callable[[Options], Call]:
        from bench.tune_rollout import RolloutWorkload

        assert device is not None
        workload = RolloutWorkload(batch, padded, rate, device)
        return lambda options: workload.call(
            kernels.RolloutLayout(**options) if options["bm"] else None
        )

    choices: dict[str, Options] = {name: p._asdict() for name, p in layouts.items()}
    heuristic = LAYERS if isinstance(own, str) else own.name
    key = kernels.tuning_key(batch, padded, dtype)
    yield Problem("rollout", key, {**choices, LAYERS: {"bm": 0}}, heuristic, prepare, {})
