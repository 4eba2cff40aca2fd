"""Stacks of Linear, LayerNorm and Mish as users write them, and the same after ``accelerate``."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

import pwm_fast
from bench import floor, providers
from bench.cases import QUICK, Case, Provider, Workload
from bench.gate import Outputs
from bench.measure import Effort

WORK = "a stack of modules under accelerate()"
#: Widths by the name in the tables, few of which stay in a core's caches or none.
STACKS = {"64-128-128-64": (64, 128, 128, 64), "512-512-512": (512, 512, 512)}
ROWS = (1, 5, 32, 64, 512)
PROVIDERS = ("published", "fast", "floor")


def cases(device: torch.device) -> list[Case]:
    return [
        Case(
            f"stack-{name}-b{rows}-{mode}",
            {"work": WORK, "model": name, "batch": rows, "mode": mode.replace("_", " ")},
            partial(build, widths, rows, mode != "forward"),
            PROVIDERS,
            frozenset({"figures"} if rows in (5, 512) else ()),
            quick=QUICK if (rows, mode) == (5, "forward") else frozenset(),
            effort=Effort(seconds=1.0),
        )
        for name, widths in STACKS.items()
        for rows in ROWS
        for mode in ("forward", "forward_and_backward")
    ]


def build(
    widths: tuple[int, ...], rows: int, backward: bool, device: torch.device, seed: int = 0
) -> Workload:
    """Outputs, and with ``backward`` the gradients of input and parameters."""
    g = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(rows, n, generator=g).to(device) for n in (widths[0], widths[-1]))
    modules: list[nn.Module] = []
    for i, (k, n) in enumerate(pairwise(widths)):
        modules.append(nn.Linear(k, n))
        if i < len(widths) - 2:
            modules += [nn.LayerNorm(n), nn.Mish()]
    plain = nn.Sequential(*modules)
    with torch.no_grad():
        for p in plain.parameters():
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1
            p.copy_(scale * torch.randn(p.shape, generator=g) + (p.dim() == 1) * p)

    def on(stack: nn.Module, dtype: torch.dtype = torch.float32) -> Provider:
        stack = stack.to(device, dtype)
        params = [*stack.parameters()]
        start, end = x.to(dtype, copy=True).requires_grad_(backward), dy.to(dtype)

        def call() -> list[Tensor]:
            if not backward:
                with torch.no_grad():
                    return [stack(start)]
            start.grad = None
            for p in params:
                p.grad = None
            y = stack(start)
            y.backward(end)
            return [y]

        def outputs() -> Outputs:
            found: Outputs = {"y": [t.detach().clone() for t in call()]}
            if backward:
                grads = [p.grad for p in (start, *params)]
                found["gradients"] = [x.clone() for x in grads if x is not None]
            return found

        return Provider(call, outputs)

    def fast() -> Provider:
        providers.need("fast", device)
        return on(pwm_fast.accelerate(copy.deepcopy(plain)))

    def bottom() -> Provider:
        gemms = floor.stack(rows, list(widths))
        if backward:
            gemms = [*gemms, *floor.backward(gemms), *floor.weight_gradients(gemms)]
        return Provider(floor.floor(gemms, torch.float32, device))

    def truth() -> Outputs:
        check = on(copy.deepcopy(plain), torch.float64).check
        assert check is not None
        return check() or {}

    made = {"published": lambda: on(copy.deepcopy(plain)), "fast": fast, "floor": bottom}
    again = partial(build, widths, rows, backward, device, seed + 1)
    return Workload(made, truth, again, device=device)
