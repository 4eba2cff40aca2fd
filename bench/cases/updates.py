"""Updates of the world model and of the critics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import floor, providers, published
from bench.cases import QUICK, Case, Provider, Workload
from bench.gate import Outputs
from bench.measure import Effort
from bench.sizes import HORIZON, alg_config, make_agent, make_windows
from pwm_fast.agent import PWM
from pwm_fast.config import AlgConfig
from pwm_fast.ops import ImaginedRollout

WORLD_MODEL = "world-model update"
CRITIC = "critic updates (8 passes of 4 minibatches)"


def cases(device: torch.device) -> list[Case]:
    on_gpu = device.type == "cuda"
    sizes = [(m, b) for m in ("5M_flow", "48M_flow") for b in ((256, 2048) if on_gpu else (256,))]
    sizes += [("5M_flow", 64), ("5M", 256), ("48M", 256)]
    found = []
    for model, batch in sizes:
        for substeps in (2, 4) if on_gpu and model.endswith("flow") else (2,):
            found.append(_world_model(device, model, batch, substeps))
    for batch in (128, 512, 4096) if on_gpu else (128, 1024):
        found.append(_critic(device, batch))
    return found


def _world_model(device: torch.device, model: str, batch: int, substeps: int) -> Case:
    figure = model.endswith("flow") and batch == 256 and substeps == 2
    names = ["published", "autocast"]
    if device.type == "cuda":
        names += ["tf32", "compile"]
    elif figure and model == "5M_flow":
        names += ["compile"]
    names += ["reference", "algebra", "fast", "fast_bf16", "floor", "floor_bf16"]
    marks = {"figures"} if figure else set()
    if model.startswith("48M") and device.type == "cpu":
        marks.add("large")
    return Case(
        f"world_model-{model}-b{batch}-K{substeps}",
        {"work": WORLD_MODEL, "model": model, "batch": batch, "K": substeps},
        partial(build_world_model, alg_config(model, substeps), batch),
        tuple(names),
        frozenset(marks),
        QUICK if model == "5M_flow" and batch == 64 else frozenset(),
        memory=4.0 * batch * HORIZON * (2048 if model[0] == "5" else 7168) * 24,
        effort=Effort(seconds=12.0, min_rounds=3),
    )


def _critic(device: torch.device, batch: int) -> Case:
    names = ["published", "autocast", "reference", "algebra", "fast", "fast_bf16"]
    return Case(
        f"critic-b{batch}",
        {"work": CRITIC, "model": "5M", "batch": batch},
        partial(build_critic, alg_config("5M"), batch),
        (*names, "floor", "floor_bf16"),
        quick=QUICK if batch == 128 else frozenset(),
        effort=Effort(seconds=8.0, min_rounds=5),
    )


def build_world_model(
    alg: AlgConfig, batch: int, device: torch.device, horizon: int = HORIZON, seed: int = 0
) -> Workload:
    """One update on ``batch`` windows; its outputs are the clipped gradients."""
    agent = make_agent(alg, device, seed)
    windows = make_windows(batch, device, seed)
    windows = type(windows)(windows.obs[: horizon + 1], *(x[:horizon] for x in windows[1:]))

    def gradients(module: torch.nn.Module) -> Outputs:
        return {"gradient": [p.grad.clone() for p in module.parameters() if p.grad is not None]}

    def plain(name: str, compiled: Callable[..., Tensor] | None = None) -> Provider:
        learner = published.Learner(agent)
        if compiled is not None:
            learner.next_latent = compiled

        def call() -> None:
            learner.optimizers["wm"].zero_grad()
            with providers.eager(name, device):
                loss = learner.world_model_loss(windows)
            learner._step("wm", learner.world_model, loss)

        def check() -> Outputs:
            call()
            return gradients(learner.world_model)

        return Provider(call, check)

    def ours(name: str) -> Provider:
        providers.need(name, device)
        own = copy.deepcopy(agent)
        own.precision = providers.PRECISIONS.get(name, "auto")
        optimizer = own.optimizers["wm"]

        def call() -> None:
            with providers.backend(name, device):
                own.update_world_model(windows)

        def check() -> Outputs:
            optimizer.keep_gradients = True
            call()
            optimizer.keep_gradients = False
            found = gradients(own.world_model)
            own.world_model.zero_grad()
            return found

        return Provider(call, check)

    def truth() -> Outputs:
        learner = published.Learner(agent, torch.float64)
        learner.update_world_model(type(windows)(*(x.double() for x in windows)))
        return gradients(learner.world_model)

    def bottom(dtype: torch.dtype) -> Provider:
        model = agent.world_model
        products = floor.world_model_products(
            model._encoder.layers(), model.dynamics(), model._reward.layers(), batch, horizon
        )
        return Provider(floor.floor(products, dtype, device))

    make: dict[str, Callable[[], Provider]] = {
        "published": partial(plain, "published"),
        "autocast": partial(plain, "autocast"),
        "tf32": partial(plain, "tf32"),
        "compile": lambda: plain("compile", providers.compiled(published.next_latent)),
        **{n: partial(ours, n) for n in ("reference", "algebra", *providers.OURS)},
        "floor": partial(bottom, torch.float32),
        "floor_bf16": partial(bottom, torch.bfloat16),
    }
    again = partial(build_world_model, alg, batch, device, horizon, seed + 1)
    return Workload(make, truth, again, device=device)


def build_critic(
    alg: AlgConfig, batch: int, device: torch.device, horizon: int = HORIZON, seed: int = 0
) -> Workload:
    """All critic updates after one actor update.

    Compared is the gradient of a single update on all states: after 32 steps of Adam, which
    divides a gradient by its size, rounding errors would have grown to the size of the steps.
    """
    agent = make_agent(alg, device, seed)
    once = copy.deepcopy(alg)
    once.critic.passes = once.critic.minibatches = 1
    g = torch.Generator().manual_seed(seed + 1)
    latent = alg.world_model.latent_dim
    z = torch.randn(horizon + 1, batch, latent // 8, 8, generator=g).softmax(-1).flatten(2)
    z, reward = z.to(device), torch.randn(horizon, batch, generator=g).to(device)

    def gradients(module: torch.nn.Module) -> Outputs:
        return {"gradient": [p.grad.clone() for p in module.parameters() if p.grad is not None]}

    def run(learner: published.Learner, name: str, dtype: torch.dtype = torch.float32) -> None:
        latents, rewards = z.to(dtype), reward.to(dtype)
        with providers.eager(name, device):
            with torch.no_grad():  # in the published code the rollout leaves these values behind
                layers = learner.critic.layers()
                value = published.critics(layers, latents[1:]).min(dim=0).values.to(dtype)
            learner.update_critics(latents[:-1], rewards, value)

    def plain(name: str) -> Provider:
        learner, single = published.Learner(agent), published.Learner(agent)
        single.config = once

        def check() -> Outputs:
            run(single, name)
            return gradients(single.critic)

        return Provider(partial(run, learner, name), check)

    def ours(name: str) -> Provider:
        providers.need(name, device)
        own, single = copy.deepcopy(agent), copy.deepcopy(agent)
        single.config = once
        single.optimizers["critic"].keep_gradients = True
        imagined = ImaginedRollout(z, z.new_empty(0), reward)

        def call(of: PWM = own) -> None:
            with providers.backend(name, device):
                of._update_critic(imagined)

        def check() -> Outputs:
            call(single)
            return gradients(single.critic)

        return Provider(call, check)

    def truth() -> Outputs:
        learner = published.Learner(agent, torch.float64)
        learner.config = once
        run(learner, "published", torch.float64)
        return gradients(learner.critic)

    def bottom(dtype: torch.dtype) -> Provider:
        config = alg.critic
        rows = -(-horizon * batch // config.minibatches)
        updates = config.passes * config.minibatches
        products = floor.critic_products(agent.critic.layers(), rows, updates)
        return Provider(floor.floor(products, dtype, device))

    make: dict[str, Callable[[], Provider]] = {
        "published": partial(plain, "published"),
        "autocast": partial(plain, "autocast"),
        "tf32": partial(plain, "tf32"),
        **{n: partial(ours, n) for n in ("reference", "algebra", *providers.OURS)},
        "floor": partial(bottom, torch.float32),
        "floor_bf16": partial(bottom, torch.bfloat16),
    }
    again = partial(build_critic, alg, batch, device, horizon, seed + 1)
    return Workload(make, truth, again, device=device)
