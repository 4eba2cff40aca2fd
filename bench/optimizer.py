"""The optimisers' step: clipping by the total norm, the check that all is finite, and Adam."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench import providers
from bench.cases import QUICK, Case, Make, Provider, Workload
from bench.gate import Outputs
from bench.measure import Effort
from bench.sizes import alg_config, make_agent
from pwm_fast.config import AlgConfig

WORK = "optimiser step: clip, check, Adam"
STEPS = 3  # that are compared with float64
#: Plain PyTorch by provider: what `torch.optim.Adam` is told.
PLAIN: dict[str, dict[str, bool]] = {
    "published": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def cases(device: torch.device) -> list[Case]:
    return [
        Case(
            f"optimizer-{model}-{name}",
            {"work": WORK, "model": model, "mode": name},
            partial(build, alg_config(model), name),
            (*PLAIN, "reference", "fast", "floor"),
            quick=QUICK if (model, name) == ("5M_flow", "wm") else frozenset(),
            effort=Effort(seconds=2.0),
        )
        for model in ("tiny_flow", "5M_flow")
        for name in ("wm", "actor", "critic")
    ]


def build(alg: AlgConfig, name: str, device: torch.device, seed: int = 0) -> Workload:
    """A step of one of an agent's optimisers; its outputs are parameters and moments after three.

    Plain PyTorch clips with ``clip_grad_norm_`` and looks at nothing else: it would take a step
    towards NaN.
    """
    agent = make_agent(alg, device, seed)
    optimizer = agent.optimizers[name]
    learning = {"wm": alg.model_learning, "actor": alg.actor, "critic": alg.critic}[name]
    g = torch.Generator().manual_seed(seed)
    draws = [
        [torch.randn(p.shape, generator=g).to(device) for p in optimizer.params]
        for _ in range(STEPS)
    ]

    def outputs(params: list[nn.Parameter], adam: torch.optim.Adam) -> Outputs:
        return {
            "parameters": [p.detach().clone() for p in params],
            "means": [adam.state[p]["exp_avg"].clone() for p in params],
            "squares": [adam.state[p]["exp_avg_sq"].clone() for p in params],
        }

    def learner(dtype: torch.dtype, **options: bool) -> tuple[list[nn.Parameter], torch.optim.Adam]:
        params = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in optimizer.params]
        own = {id(p): q for p, q in zip(optimizer.params, params, strict=True)}
        groups = [
            {"params": [own[id(p)] for p in group["params"]], "lr": float(group["lr"])}
            for group in optimizer.adam.param_groups
        ]
        return params, torch.optim.Adam(groups, betas=tuple(learning.betas), **options)

    def step(params: list[nn.Parameter], adam: torch.optim.Adam, grads: list[Tensor]) -> None:
        for p, gradient in zip(params, grads, strict=True):
            p.grad = gradient
        nn.utils.clip_grad_norm_(params, learning.grad_norm)
        adam.step()

    def after(
        params: list[nn.Parameter], adam: torch.optim.Adam, take: Callable[[list[Tensor]], object]
    ) -> Outputs:
        for grads in draws:
            take([x.to(params[0].dtype, copy=True) for x in grads])
        return outputs(params, adam)

    def plain(options: dict[str, bool]) -> Provider:
        params, adam = learner(torch.float32, **options)
        grads = [x.clone() for x in draws[0]]
        return Provider(
            lambda: step(params, adam, grads),
            lambda: after(params, adam, partial(step, params, adam)),
        )

    def ours(provider: str) -> Provider:
        providers.need(provider, device)
        own = copy.deepcopy(optimizer)
        grads, loss = [x.clone() for x in draws[0]], torch.ones((), device=device)

        def take(given: list[Tensor]) -> None:
            with providers.backend(provider, device):
                own.apply(loss, given)

        return Provider(lambda: take(grads), lambda: after(own.params, own.adam, take))

    def truth() -> Outputs:
        params, adam = learner(torch.float64)
        return after(params, adam, partial(step, params, adam))

    def bottom() -> Provider:
        """Gradients read twice, parameters and moments read and written, as one tensor each."""
        elements = sum(p.numel() for p in optimizer.params)
        gradient, *written = (torch.randn(elements, device=device) for _ in range(4))

        def touch() -> None:
            torch.linalg.vector_norm(gradient)
            gradient.sum()
            for x in written:
                x.neg_()

        return Provider(touch)

    make: dict[str, Make] = {n: partial(plain, options) for n, options in PLAIN.items()}
    make |= {n: partial(ours, n) for n in ("reference", "fast")} | {"floor": bottom}
    return Workload(make, truth, partial(build, alg, name, device, seed + 1), device=device)
