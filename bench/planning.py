"""One action planned by MPPI, at the sizes and with the parameters of TD-MPC2's 5M."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import floor, providers, published
from bench.cases import Case, Function, Provider, Workload, assemble
from bench.gate import Outputs
from bench.measure import Effort
from bench.sizes import ACTION
from pwm_fast import ops
from pwm_fast.ops import Layer

TITLE = "ops.plan"
LATENT, UNITS, BINS, MEMBERS, GAMMA = 512, 512, 101, 5, 0.99


class Networks(NamedTuple):
    """What a plan takes, of TD-MPC2's shapes but for the policy, whose std is no output."""

    policy: ops.Policy
    dynamics: ops.LatentMLP
    heads: ops.Heads
    values: ops.ValueEnsemble


def cases(device: torch.device) -> list[Case]:
    names = ["published", "autocast"]
    names += ["tf32"] if device.type == "cuda" else []
    names += ["compile", "reference", "algebra", "fast", "fast_bf16", "floor", "floor_bf16"]
    return [
        Case(
            f"plan-5M-b{batch}",
            {"work": TITLE, "model": "5M", "batch": batch, "mode": "forward"},
            partial(build, batch),
            # Compilation takes a minute, whatever the batch.
            tuple(n for n in names if n != "compile" or batch == 1),
            effort=Effort(seconds=8.0, min_rounds=3, max_rounds=60),
        )
        for batch in ((1, 4) if device.type == "cpu" else (1, 16, 128))
    ]


def networks(latent: int, units: int, g: torch.Generator) -> Networks:
    """With random parameters; logits differ by more than 1, as those of trained heads."""

    def layer(n: int, k: int, gain: float = 1.0) -> Layer:
        weight = gain * torch.randn(n, k, generator=g) / k**0.5
        return Layer(weight, 0.02 * torch.randn(n, generator=g))

    def net(sizes: Sequence[int], last: str = "none") -> list[Layer]:
        layers = [layer(n, k, 2.0 if n == BINS else 1.0) for k, n in pairwise(sizes)]
        normed = layers if last == "simnorm" else layers[:-1]
        acts = ["mish"] * (len(layers) - 1) + [last]
        for i in range(len(normed)):
            n = layers[i].weight.shape[0]
            scale, shift = (0.1 * torch.randn(n, generator=g) for _ in range(2))
            layers[i] = layers[i]._replace(ln_weight=1.0 + scale, ln_bias=shift, act=acts[i])
        return layers

    pair, hidden = latent + ACTION, [units, units]
    return Networks(
        ops.Policy(net([latent, *hidden, ACTION]), torch.full((ACTION,), 0.3)),
        ops.LatentMLP(net([pair, *hidden, latent], "simnorm")),
        ops.Heads(net([pair, *hidden, BINS])),
        ops.ValueEnsemble(
            [net([pair, *hidden, BINS]) for _ in range(MEMBERS)], "norm_act", on_action=True
        ),
    )


def moved(x: Any, to: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(x, Tensor):
        return to(x) if x.is_floating_point() else x
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(moved(part, to) for part in x))
    return type(x)(moved(part, to) for part in x) if isinstance(x, (list, tuple)) else x


def trajectory_values(
    nets: Networks, z: Tensor, actions: Tensor, eps: Tensor, members: Tensor
) -> Tensor:
    """Values ``[B N]`` of actions ``[H, B N, A]``, a step after another; all Q functions."""
    total, discount = torch.zeros_like(z[:, 0]), 1.0
    heads, q = nets.heads, nets.values
    for a in actions:
        x = torch.cat([z, a], dim=-1)
        reward = published.two_hot_decode(published.normed(heads.reward, x), heads.vmin, heads.vmax)
        total = total + discount * reward
        z = published.normed(nets.dynamics.net, x)
        discount = discount * GAMMA
    a = torch.tanh(published.act_norm(nets.policy.layers, z) + nets.policy.std * eps)
    x = torch.cat([z, a], dim=-1)
    logits = torch.stack([published.normed(layers, x) for layers in q.layers])  # type: ignore[arg-type]
    value = published.two_hot_decode(logits[members], q.vmin, q.vmax).mean(dim=0)
    return total + discount * value


def plain_plan(
    nets: Networks,
    z0: Tensor,
    noise: ops.PlanNoise,
    o: ops.MPPI,
    value_of: Function = trajectory_values,
) -> tuple[Tensor, Tensor]:
    """The action ``[B, A]``, and the last iteration's values ``[B, N]``."""
    batch, count = z0.shape[0], o.policy_trajectories
    assert noise.policy is not None and noise.last_action is not None
    assert noise.members is not None
    z, prior = z0.repeat_interleave(count, 0), []
    for eps in noise.policy.flatten(1, 2):
        mu = published.act_norm(nets.policy.layers, z)
        prior.append(torch.tanh(mu + nets.policy.std * eps).to(z0.dtype))
        z = published.normed(nets.dynamics.net, torch.cat([z, prior[-1]], dim=-1))
    led = torch.stack(prior).view(o.horizon, batch, count, ACTION)
    starts = z0.repeat_interleave(o.samples, 0)
    mean = torch.zeros(o.horizon, batch, ACTION, dtype=z0.dtype, device=z0.device)
    std = torch.full_like(mean, o.max_std)
    for i in range(o.iterations):
        free = (mean.unsqueeze(2) + std.unsqueeze(2) * noise.samples[i]).clamp(-1.0, 1.0)
        actions = torch.cat([led, free], dim=2)
        last, members = noise.last_action[i].flatten(0, 1), noise.members[i]
        value = value_of(nets, starts, actions.flatten(1, 2), last, members).nan_to_num(0.0)
        value = value.view(batch, o.samples)
        top, index = value.topk(o.elites, dim=1)
        score = torch.softmax(o.temperature * top, dim=1)
        where = index.view(1, batch, -1, 1).expand(o.horizon, -1, -1, ACTION)
        elites, weight = actions.gather(2, where), score.unsqueeze(-1)
        mean = (weight * elites).sum(dim=2)
        deviation = (elites - mean.unsqueeze(2)) ** 2
        std = (weight * deviation).sum(dim=2).sqrt().clamp(o.min_std, o.max_std)
    taken = (score.log() + noise.choice).argmax(dim=1)
    action = elites[0, torch.arange(batch, device=z0.device), taken]
    return (action + std[0] * noise.action).clamp(-1.0, 1.0), value


def build(
    batch: int,
    device: torch.device,
    seed: int = 0,
    latent: int = LATENT,
    units: int = UNITS,
    options: ops.MPPI | None = None,
) -> Workload:
    """Plans of ``batch`` envs with the same random numbers for all providers.

    Compared are the values of an iteration's trajectories: a rounding error in them may take
    another elite, and then whole plans differ.
    """
    g = torch.Generator().manual_seed(seed)
    o = ops.MPPI() if options is None else options
    once = ops.MPPI(**{**vars(o), "iterations": 1})
    nets = networks(latent, units, g)
    z0 = torch.softmax(torch.randn(batch, latent // 8, 8, generator=g), -1).flatten(1)
    noise = ops.PlanNoise.draw(batch, ACTION, o, nets.values, generator=g)
    nets, z0, noise = moved((nets, z0, noise), lambda x: x.to(device))
    assert noise.last_action is not None and noise.members is not None
    noise = noise._replace(members=noise.members.to(device))
    short = noise._replace(
        samples=noise.samples[:1], last_action=noise.last_action[:1], members=noise.members[:1]
    )

    def checked(name: str, dtype: torch.dtype, value_of: Function = trajectory_values) -> Outputs:
        given = moved((nets, z0, short), lambda x: x.to(dtype))
        with torch.no_grad(), providers.eager(name, device):
            return {"value": plain_plan(*given, once, value_of)[1]}

    def plain(name: str, compiled: Callable[[Function], Function]) -> Provider:
        value_of = compiled(trajectory_values)

        def call() -> object:
            with torch.no_grad(), providers.eager(name, device):
                return plain_plan(nets, z0, noise, o, value_of)

        return Provider(call, lambda: checked(name, torch.float32, value_of))

    def ours(name: str) -> Provider:
        def plan(noise: ops.PlanNoise, options: ops.MPPI) -> ops.Plan:
            with providers.backend(name, device):
                policy, dynamics, heads, values = nets
                return ops.plan(
                    z0,
                    policy,
                    dynamics,
                    heads,
                    values=values,
                    options=options,
                    gamma=GAMMA,
                    noise=noise,
                )

        return Provider(lambda: plan(noise, o), lambda: {"value": plan(short, once).value})

    def bottom(dtype: torch.dtype) -> Callable[[], object]:
        rows, pair = batch * o.samples, latent + ACTION
        prior = batch * o.policy_trajectories
        gemms = floor.stack(prior, [latent, units, units, ACTION]) * o.horizon
        gemms += floor.stack(prior, [pair, units, units, latent]) * (o.horizon - 1)
        each = floor.dynamics_gemms(nets.dynamics, latent, rows, o.horizon)
        each += [floor.Gemm(rows * o.horizon, ACTION, units)]
        each += floor.stack(rows * o.horizon, [pair, units, units, BINS])
        each += floor.stack(rows, [latent, units, units, ACTION])
        each += floor.stack(rows, [pair, units, units, BINS]) * 2
        return floor.floor([*gemms, *(each * o.iterations)], dtype, device)

    return Workload(
        assemble(device, plain, ours, bottom),
        partial(checked, "published", torch.float64),
        partial(build, batch, device, seed + 1, latent, units, options),
        device=device,
    )
