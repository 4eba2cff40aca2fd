"""Imagined rollouts: H = 16 macro steps, forward, and backward to the actor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import floor, providers, published
from bench.cases import QUICK, Case, Function, Provider, Workload, assemble, same
from bench.gate import Outputs
from bench.measure import Effort, available_memory, graphed
from bench.sizes import ACTION, HORIZON, alg_config, make_agent
from pwm_fast import ops
from pwm_fast.agent import PWM
from pwm_fast.agent.imagination import frozen
from pwm_fast.config import AlgConfig
from pwm_fast.ops.extend import discounted_return

TITLE = "imagined rollout"
PART = {"cpu": 512, "cuda": 2048}  # rows at a time of the truth, at most
SHARE = 0.3  # of the free memory, for what the truth keeps for its backward pass


def cases(device: torch.device) -> list[Case]:
    on_gpu = device.type == "cuda"
    small = [64, 128, 256, 512, 1024, 4096] if not on_gpu else [64, 128, 512, 2048, 16384]
    large = [64, 128, 512, 1024] if not on_gpu else [128, 512, 2048, 16384]
    sizes = [("5M_flow", b) for b in small] + [("48M_flow", b) for b in large]
    sizes += [("5M", 128), ("48M", 128)]
    found = []
    for model, batch in sizes:
        for substeps in (2, 4) if on_gpu and model.endswith("flow") else (2,):
            for mode in ("forward", "backward"):
                found.append(_case(device, model, batch, substeps, mode))
    return found


def _case(device: torch.device, model: str, batch: int, substeps: int, mode: str) -> Case:
    rows = {"forward": ("published", "autocast"), "backward": ("published", "frozen", "autocast")}
    names = list(rows[mode])
    main = batch == 128 and model.endswith("flow") and substeps == 2
    if device.type == "cuda":
        names += ["tf32", "graph"]
    if (main and mode == "backward") or device.type == "cuda":
        names += ["compile"]
    if main and mode == "backward" and device.type == "cpu":
        names += ["jax"]  # on a GPU it is one of the matrix's
    names += ["reference", "algebra", "fast", "fast_bf16", "floor", "floor_bf16"]
    marks = set()
    if main and mode == "backward":
        marks.add("figures")
    if batch > (1024 if model.startswith("5M") else 128) and device.type == "cpu":
        marks.add("large")
    alg = alg_config(model, substeps)
    memory = 4.0 * batch * kept(alg, HORIZON) if mode == "backward" else 0.0
    return Case(
        f"rollout-{model}-b{batch}-K{substeps}-{mode}",
        {"work": TITLE, "model": model, "batch": batch, "K": substeps, "mode": mode},
        partial(build, alg, batch, mode),
        tuple(names),
        frozenset(marks),
        QUICK if main and model == "5M_flow" and mode == "backward" else frozenset(),
        memory,
        Effort(seconds=15.0 if main else 8.0, min_rounds=5 if main else 3),
    )


def kept(alg: AlgConfig, horizon: int) -> int:
    """Numbers a row that the published code keeps for the backward pass, about.

    12 activations of the hidden width a velocity evaluation, and 24 a macro step.
    """
    model = alg.world_model
    evaluations = 1
    if model.kind == "flow":
        evaluations = model.substeps * (2 if model.integrator == "heun" else 1)
    return horizon * max(model.units) * (12 * evaluations + 24)


def rows_at_once(alg: AlgConfig, horizon: int, gradient: bool, device: torch.device) -> int:
    """Rows of the truth that are computed at a time: on a GPU what its memory holds in float64."""
    most = PART[device.type]
    if not gradient or device.type != "cuda":
        return most
    torch.cuda.empty_cache()  # what the provider left counts as free
    free = available_memory(device) or 0
    return max(1, min(most, int(SHARE * free / (8.0 * kept(alg, horizon)))))


def imagined(
    agent: PWM, z: Tensor, noise: Tensor, gradient: bool
) -> tuple[ops.ImaginedRollout, list[Tensor]]:
    """This project's rollout from ``z``, and if asked for the actor's gradients."""
    config = agent.config
    heads = agent.world_model.heads()._replace(value=agent.critic.layers())
    with torch.set_grad_enabled(gradient), frozen(agent.world_model, agent.critic):
        r = ops.imagine(
            z,
            agent.actor.policy(),
            agent.world_model.dynamics(),
            heads,
            noise=noise,
            detach=config.actor.detach,
            last_value_only=True,
        )
        assert r.value is not None
        total = discounted_return(r.reward, r.value, config.gamma, r.continues)  # type: ignore[arg-type]
        if not gradient:
            return r, []
        return r, list(torch.autograd.grad(-total.mean(), list(agent.actor.parameters())))


def build(
    alg: AlgConfig,
    batch: int,
    mode: str,
    device: torch.device,
    horizon: int = HORIZON,
    seed: int = 0,
) -> Workload:
    """The workload of one rollout; ``mode`` is ``forward`` or ``backward``."""
    agent = make_agent(alg, device, seed)
    latent = agent.world_model.latent_dim
    g = torch.Generator().manual_seed(seed + 1)
    z = torch.softmax(torch.randn(batch, latent // 8, 8, generator=g), -1).flatten(1).to(device)
    noise = torch.randn(horizon, batch, ACTION, generator=g).to(device)
    gradient = mode == "backward"
    roll = partial(published.rollout, gamma=alg.gamma, detach=alg.actor.detach)

    def parts(of: PWM) -> tuple[ops.Policy, ops.Dynamics, ops.Heads]:
        heads = of.world_model.heads()._replace(value=of.critic.layers())
        return of.actor.policy(), of.world_model.dynamics(), heads

    def outputs(reward: Tensor, value: Tensor, last: Tensor, grads: list[Tensor]) -> Outputs:
        named = {"reward": reward, "value": value, "latent": last}
        return {**named, "gradient": grads} if gradient else named

    params = list(agent.actor.parameters())

    def frozen_call(name: str, step: published.Step) -> Outputs:
        with frozen(agent.world_model, agent.critic), torch.set_grad_enabled(gradient):
            with providers.eager(name, device):
                r = roll(*parts(agent), z, noise, step=step)
            grads = list(torch.autograd.grad(-r.returns.mean(), params)) if gradient else []
        return outputs(r.reward, r.value, r.z[-1], grads)

    def plain(name: str, compiled: Callable[[Function], Function] = same) -> Provider:
        """Plain PyTorch with world model and critics frozen; one macro step is compiled."""
        if name == "published" and gradient:
            return Provider(everything, everything)
        call = partial(frozen_call, name, compiled(published.macro_step))
        return Provider(call, call)

    def everything() -> Outputs:
        """As published: weight gradients of world model and critics are computed too."""
        for module in (agent.world_model, agent.actor, agent.critic):
            module.zero_grad()
        r = roll(*parts(agent), z, noise)
        (-r.returns.mean()).backward()
        return outputs(r.reward, r.value, r.z[-1], [p.grad for p in params])  # type: ignore[misc]

    def ours(name: str) -> Provider:
        def call() -> Outputs:
            with providers.backend(name, device):
                r, grads = imagined(agent, z, noise, gradient)
            return outputs(r.reward, r.value, r.z[-1], grads)

        return Provider(call, call)

    def in_parts(name: str, dtype: torch.dtype) -> Outputs:
        """Plain PyTorch, some rows at a time: only the gradient adds up over them."""
        own = copy.copy(agent)
        for part in ("world_model", "actor", "critic"):
            module = copy.deepcopy(getattr(agent, part)).to(dtype)
            setattr(own, part, module.requires_grad_(False))
        own.actor.requires_grad_(gradient)
        learnt = list(own.actor.parameters())
        rewards, values, last = [], [], []
        grads = [torch.zeros_like(p) for p in learnt]
        size = rows_at_once(alg, horizon, gradient, device)
        with torch.set_grad_enabled(gradient):
            for start, noises in zip(z.split(size), noise.split(size, 1), strict=True):
                with providers.eager(name, device):
                    r = roll(*parts(own), start.to(dtype), noises.to(dtype))
                rewards.append(r.reward.detach())
                values.append(r.value.detach())
                last.append(r.z[-1].detach())
                if gradient:
                    found = torch.autograd.grad(-r.returns.sum() / batch, learnt)
                    for total, share in zip(grads, found, strict=True):
                        total.add_(share)
        return outputs(torch.cat(rewards, 1), torch.cat(values), torch.cat(last), grads)

    def bottom(dtype: torch.dtype) -> Callable[[], object]:
        policy, dynamics, heads = parts(agent)
        assert heads.value is not None
        gemms = floor.rollout_gemms(
            policy.layers,
            dynamics,
            heads.reward,
            heads.value,
            batch,
            horizon,
            gradient=gradient,
        )
        call = floor.floor(gemms, dtype, device)
        return graphed(call) if device.type == "cuda" else call

    def jax(name: str) -> Provider:
        from bench.jax_rollout import rollout

        work = rollout(name, agent, z, noise, gamma=alg.gamma, gradient=gradient)
        return Provider(work.call, lambda: outputs(*work.result()), wall=True)

    make = {
        **assemble(device, plain, ours, bottom),
        "frozen": partial(plain, "frozen"),
        **{n: partial(jax, n) for n in ("jax", "jax_bf16", "diffrax")},
    }
    truth = partial(in_parts, "published", torch.float64)
    unit = {n: partial(in_parts, n, torch.float32) for n in ("published", "autocast", "tf32")}
    again = partial(build, alg, batch, mode, device, horizon, seed + 1)
    return Workload(make, truth, again, unit, device)
