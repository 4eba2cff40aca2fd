"""The floor: how fast this machine does the GEMMs (matrix multiplications) of a step alone.

A step is listed as its GEMMs, in the cheapest algebra known (constant parts hoisted, a linear
velocity head folded into the first layer where that saves work, weight gradients over all steps at
once, none that nobody asks for). Each is run by the fastest of what PyTorch offers here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.ops import Dynamics, Flow, Layer

Run = Callable[[], Any]


class Gemm(NamedTuple):
    """``uses`` GEMMs ``[m, k] [k, n]``, each with ``members`` of an ensemble.

    ``weight`` says that the right side is a weight, which may be repacked beforehand; a weight
    gradient has none.
    """

    m: int
    k: int
    n: int
    uses: int = 1
    members: int = 1
    weight: bool = True

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n * self.uses * self.members


def candidates(p: Gemm, dtype: torch.dtype, device: torch.device) -> list[Run]:
    """Ways to do one GEMM."""

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    if p.members > 1:
        x, w = new(p.members, p.m, p.k), new(p.members, p.k, p.n)
        return [lambda: torch.bmm(x, w)]
    if not p.weight:
        dh, rows = new(p.k, p.m), new(p.k, p.n)
        return [lambda: torch.mm(dh.t(), rows)]
    x, weight = new(p.m, p.k), new(p.n, p.k)
    runs: list[Run] = [lambda: F.linear(x, weight)]
    packed = prepacked(x, weight)
    if packed is not None:
        runs.append(packed)
    return runs


def prepacked(x: Tensor, weight: Tensor) -> Run | None:
    """oneDNN on a weight packed for this batch; None where these private operators do not work."""
    if x.device.type != "cpu":
        return None
    mkldnn = torch.ops.mkldnn
    try:
        # Tried here and now: a changed schema or an instruction set without bf16 shows at once.
        packed = mkldnn._reorder_linear_weight(weight, x.shape[0])

        def run() -> Any:
            return mkldnn._linear_pointwise(x, packed, None, "none", [], "")

        y = run()
    except (AttributeError, RuntimeError, TypeError):
        return None
    wanted = F.linear(x.double(), weight.double())
    exact = (y.double() - wanted).norm() <= 0.02 * wanted.norm()
    return run if bool(exact) else None


def fastest(runs: Sequence[Run], device: torch.device, rounds: int = 3) -> Run:
    """The fastest of several ways, each called in turn."""
    if len(runs) == 1:
        return runs[0]
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[i] = min(best[i], time.perf_counter() - start)
    return runs[best.index(min(best))]


def floor(gemms: Iterable[Gemm], dtype: torch.dtype, device: torch.device) -> Run:
    """All the GEMMs of a step, one after another."""
    plan: dict[Gemm, int] = {}
    for p in gemms:
        single = p._replace(uses=1)
        plan[single] = plan.get(single, 0) + p.uses
    runs = [(fastest(candidates(p, dtype, device), device), n) for p, n in plan.items()]

    @torch.no_grad()
    def call() -> None:
        for run, uses in runs:
            for _ in range(uses):
                run()

    return call


# --- the GEMMs of each step ---------------------------------------------------------------------


def widths(layers: Sequence[Layer]) -> list[int]:
    """Input width and the output width of every layer."""
    return [layers[0].weight.shape[-1], *(p.weight.shape[-2] for p in layers)]


def stack(rows: int, sizes: Sequence[int], *, members: int = 1) -> list[Gemm]:
    """Forward GEMMs of an MLP."""
    return [Gemm(rows, k, n, members=members) for k, n in pairwise(sizes)]


def backward(forward: Iterable[Gemm]) -> list[Gemm]:
    """Towards the inputs."""
    return [p._replace(k=p.n, n=p.k) for p in forward]


def weight_gradients(forward: Iterable[Gemm]) -> list[Gemm]:
    """Of the weights, each one GEMM over the rows of all its uses."""
    return [Gemm(p.n, p.m * p.uses, p.k, members=p.members, weight=False) for p in forward]


def dynamics_gemms(dynamics: Dynamics, latent: int, rows: int, steps: int) -> list[Gemm]:
    """Sequential forward GEMMs of macro steps; those of the actions are hoisted."""
    sizes = widths(dynamics.net)
    hidden = sizes[1:-1]
    if not isinstance(dynamics, Flow):
        return [p._replace(uses=steps) for p in stack(rows, [latent, *hidden, latent])]
    evaluations = steps * dynamics.substeps * (2 if dynamics.method == "heun" else 1)
    plain = [p._replace(uses=evaluations) for p in stack(rows, [latent, *hidden, latent])]
    last = dynamics.net[-1]
    if last.ln_weight is not None or last.act != "none" or dynamics.project:
        return plain
    folded = [p._replace(uses=evaluations) for p in stack(rows, [*hidden, hidden[0]])]
    folded.append(Gemm(rows, hidden[-1], latent, uses=steps))
    return min(plain, folded, key=lambda gemms: sum(p.flops for p in gemms))


def rollout_gemms(
    actor: Sequence[Layer],
    dynamics: Dynamics,
    reward: Sequence[Layer],
    value: Sequence[Layer],
    batch: int,
    horizon: int,
    *,
    gradient: bool,
) -> list[Gemm]:
    """An imagined rollout; with the gradient of its return towards the (detached) actor."""
    actor_sizes, reward_sizes = widths(actor), widths(reward)
    latent, action = actor_sizes[0], actor_sizes[-1]
    sequential = dynamics_gemms(dynamics, latent, batch, horizon)
    actions = [Gemm(batch, action, dynamics.net[0].weight.shape[0], uses=horizon)]
    every = batch * horizon
    policy = stack(batch, actor_sizes)
    rewards = stack(every, reward_sizes)
    values = stack(batch, widths(value), members=value[0].weight.shape[0])
    forward = [
        *(p._replace(uses=horizon) for p in policy),
        *actions,
        *sequential,
        *rewards,
        *values,
    ]
    if not gradient:
        return forward
    batched = stack(every, actor_sizes)
    return [
        *forward,
        *backward([*sequential, *rewards, *values]),
        Gemm(every, dynamics.net[0].weight.shape[0], action),
        *backward(batched[1:]),
        *weight_gradients(batched),
    ]


def world_model_gemms(
    encoder: Sequence[Layer],
    dynamics: Dynamics,
    reward: Sequence[Layer],
    batch: int,
    horizon: int,
) -> list[Gemm]:
    """One world-model update on windows, rollout starts."""
    sizes, latent = widths(encoder), encoder[-1].weight.shape[0]
    every = batch * horizon
    flow = isinstance(dynamics, Flow)
    steps = horizon - 1 if flow else horizon
    units = dynamics.net[0].weight.shape[0]
    action = reward[0].weight.shape[1] - latent
    target, start = stack(every, sizes), stack(batch, sizes)
    sequential = dynamics_gemms(dynamics, latent, batch, steps)
    actions = [Gemm(every, action, units)]
    matching = stack(every, [latent, *widths(dynamics.net)[1:]]) if flow else []
    rewards = stack(every, widths(reward))
    forward = [*target, *start, *sequential, *actions, *matching, *rewards]
    towards = backward([*start[1:], *sequential, *matching, *rewards])
    learned = [*start, *sequential, *actions, *matching, *rewards]
    return [*forward, *towards, *weight_gradients(learned)]


def critic_gemms(value: Sequence[Layer], rows: int, updates: int) -> list[Gemm]:
    """Updates of an ensemble of critics, each on ``rows`` states."""
    forward = stack(rows, widths(value), members=value[0].weight.shape[0])
    gemms = [*forward, *backward(forward[1:]), *weight_gradients(forward)]
    return [p._replace(uses=updates) for p in gemms]
