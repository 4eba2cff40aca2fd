"""Updates of the world model and of the critics, and whole epochs of training on 128 Ants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from bench import floor, providers, published, rollouts
from bench.cases import QUICK, Case, Function, Provider, Workload, assemble, same
from bench.gate import Mismatch, Outputs
from bench.measure import Effort
from bench.providers import Absent
from bench.sizes import ACTION, HORIZON, OBS, alg_config, make_agent, make_windows
from pwm_fast import envs
from pwm_fast.agent import PWM
from pwm_fast.config import AlgConfig
from pwm_fast.models.flow_dynamics import AUTO_SHARE
from pwm_fast.ops import ImaginedRollout
from pwm_fast.replay import Replay, Windows

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
    found.append(_world_model(device, "5M_flow", 256, 1, "euler"))
    for batch in (128, 512, 4096) if on_gpu else (128, 1024):
        found.append(_critic(device, batch))
    return found


def _world_model(
    device: torch.device, model: str, batch: int, substeps: int, integrator: str = "heun"
) -> Case:
    figure = model.endswith("flow") and batch == 256 and substeps <= 2
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
        {"work": WORLD_MODEL, "model": model, "batch": batch, "K": how(substeps, integrator)},
        partial(build_world_model, alg_config(model, substeps, integrator), batch),
        tuple(names),
        frozenset(marks),
        QUICK if model == "5M_flow" and batch == 64 else frozenset(),
        memory=4.0 * batch * HORIZON * (2048 if model[0] == "5" else 7168) * 24,
        effort=Effort(seconds=12.0, min_rounds=3),
    )


def how(substeps: int, integrator: str) -> int | str:
    """K as titles have it: of Heun steps, unless it says Euler."""
    return substeps if integrator == "heun" else f"{substeps} (Euler)"


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


def gradients(module: torch.nn.Module) -> Outputs:
    """What an update has left in the parameters."""
    return {"gradient": [p.grad.clone() for p in module.parameters() if p.grad is not None]}


def build_world_model(
    alg: AlgConfig, batch: int, device: torch.device, horizon: int = HORIZON, seed: int = 0
) -> Workload:
    """One update on ``batch`` windows; its outputs are the clipped gradients."""
    agent = make_agent(alg, device, seed)
    windows = make_windows(batch, device, seed)
    windows = Windows(windows.obs[: horizon + 1], *(x[:horizon] for x in windows[1:4]))

    def plain(name: str, compiled: Callable[[Function], Function]) -> Provider:
        learner = published.Learner(agent)
        if compiled is not same:
            learner.next_latent = compiled(published.next_latent)

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
        learner.update_world_model(Windows(*(x.double() for x in windows[:4])))
        return gradients(learner.world_model)

    def bottom(dtype: torch.dtype) -> Callable[[], object]:
        model = agent.world_model
        gemms = floor.world_model_gemms(
            model.encoder_layers(), model.dynamics(), model._reward.layers(), batch, horizon
        )
        return floor.floor(gemms, dtype, device)

    again = partial(build_world_model, alg, batch, device, horizon, seed + 1)
    return Workload(assemble(device, plain, ours, bottom), truth, again, device=device)


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
    latent = agent.world_model.latent_dim
    z = torch.randn(horizon + 1, batch, latent // 8, 8, generator=g).softmax(-1).flatten(2)
    z, reward = z.to(device), torch.randn(horizon, batch, generator=g).to(device)

    def run(learner: published.Learner, name: str, dtype: torch.dtype = torch.float32) -> None:
        latents, rewards = z.to(dtype), reward.to(dtype)
        with providers.eager(name, device):
            with torch.no_grad():  # in the published code the rollout leaves these values behind
                layers = learner.critic.layers()
                value = published.critics(layers, latents[1:]).min(dim=0).values.to(dtype)
            learner.update_critics(latents[:-1], rewards, value)

    def plain(name: str, compiled: Callable[[Function], Function]) -> Provider:
        learner, single = published.Learner(agent), published.Learner(agent)
        single.config = once

        def check() -> Outputs:
            run(single, name)
            return gradients(single.critic)

        return Provider(partial(run, learner, name), check)

    def ours(name: str) -> Provider:
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

    def bottom(dtype: torch.dtype) -> Callable[[], object]:
        config = alg.critic
        rows = -(-horizon * batch // config.minibatches)
        updates = config.passes * config.minibatches
        gemms = floor.critic_gemms(agent.critic.layers(), rows, updates)
        return floor.floor(gemms, dtype, device)

    again = partial(build_critic, alg, batch, device, horizon, seed + 1)
    return Workload(assemble(device, plain, ours, bottom), truth, again, device=device)


# --- whole epochs -------------------------------------------------------------------------------

NUM_ENVS = 128
EPOCH = "training epoch, 128 Ants"
UPDATES = "updates of a training epoch"
RECORDED = 3  # calls after which the agent's updates are replayed from CUDA graphs
BASELINE = ("published_baseline",)


def epochs(device: torch.device) -> list[Case]:
    names = ["published_baseline", "published", "reference", "fast", "fast_bf16"]
    if device.type == "cuda":
        names += ["fast_tf32", "fast_fp16", *(n + providers.GRAPH for n in providers.OURS)]
    return [
        Case(
            f"{kind}-{size}{'' if substeps == 2 else '-K1'}",
            {
                "work": title,
                "model": f"{size}_flow",
                "batch": NUM_ENVS,
                "K": how(substeps, integrator),
            },
            partial(
                build_epoch,
                alg_config(
                    f"{size}_flow", substeps, integrator, AUTO_SHARE if substeps == 1 else 1.0
                ),
                alg_config(size),
                physics=kind == "epoch",
            ),
            tuple(names),
            frozenset({"figures"} if kind == "epoch" else ())
            | frozenset({"large"} if size == "48M" else ()),
            memory=4e9 if size == "48M" else 1e9,
            effort=Effort(seconds=20.0, min_rounds=3),
        )
        for kind, title in (("epoch", EPOCH), ("updates", UPDATES))
        for size in ("5M", "48M")
        for substeps, integrator in ((1, "euler"), (2, "heun"))
        if kind == "epoch" or device.type == "cuda"
    ]


class Stepped:
    """The part of an epoch that every provider shares: robots and replay."""

    def __init__(self, device: torch.device, num_envs: int, horizon: int) -> None:
        try:
            self.env = envs.make("ant", num_envs, seed=0, device=device)
        except ImportError as error:
            raise Absent(f"no physics engine: {error}") from error
        self.replay = Replay(num_envs * 400, num_envs, OBS, ACTION, horizon, device)
        self.obs, _ = self.env.reset()
        for _ in range(3 * horizon):
            self.step(torch.rand(num_envs, ACTION) * 2 - 1)

    def step(self, action: Tensor) -> None:
        obs = self.obs
        self.obs, reward, terminated, truncated, info = self.env.step(action.to(self.env.device))
        self.replay.add(obs, action, reward, terminated, terminated | truncated, info["final_obs"])


class Recorded:
    """The same without physics: a replay full of random transitions, which nothing is added to."""

    def __init__(self, device: torch.device, num_envs: int, horizon: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.replay = Replay(num_envs * 400, num_envs, OBS, ACTION, horizon, device)
        never = torch.zeros(num_envs, dtype=torch.bool)
        for _ in range(3 * horizon):
            obs, following = (torch.randn(num_envs, OBS, generator=g) for _ in range(2))
            action = torch.rand(num_envs, ACTION, generator=g) * 2 - 1
            reward = torch.randn(num_envs, generator=g)
            self.replay.add(obs, action, reward, never, never, following)


def run(
    source: Stepped | Recorded,
    alg: AlgConfig,
    act: Callable[[Tensor], Tensor],
    update_world_model: Callable[[Windows], object],
    update_policy: Callable[[Tensor], object],
) -> None:
    """The epoch, in the trainer's order."""
    for _ in range(alg.steps_per_epoch if isinstance(source, Stepped) else 0):
        source.step(act(source.obs.to(source.replay.device)))
    for _ in range(alg.model_learning.updates):
        update_world_model(source.replay.sample(alg.model_learning.batch_size))
    for _ in range(alg.actor.updates):
        update_policy(source.replay.sample_starts(alg.actor.batch_size).obs)


def build_epoch(
    flow: AlgConfig,
    baseline: AlgConfig,
    device: torch.device,
    num_envs: int = NUM_ENVS,
    horizon: int = HORIZON,
    physics: bool = True,
) -> Workload:
    """Epochs of flow, and as their anchor one of the baseline as published.

    ``physics=False`` leaves acting, environments and the filling of the replay out.

    An epoch is chaotic to the bit, so what is compared with float64 are its parts: the rollout's
    gradient, the world-model update and the critics' update, at this configuration's sizes.
    """

    def parts(alg: AlgConfig, name: str) -> None:
        batch = alg.actor.batch_size
        for part in (
            rollouts.build(alg, batch, "backward", device, horizon),
            build_world_model(alg, alg.model_learning.batch_size, device, horizon),
            build_critic(alg, batch, device, horizon),
        ):
            part.verify(name, part.make[name]())

    def finite(module: torch.nn.Module) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
            raise Mismatch("a parameter is not finite after an epoch")

    def provider(name: str) -> Provider:
        base = name.removesuffix(providers.GRAPH)
        plain, alg = base.startswith("published"), baseline if base in BASELINE else flow
        if not plain:
            providers.need(name, device)
        own = (Stepped if physics else Recorded)(
            device, num_envs, horizon
        )  # the first to be absent
        precision = providers.PRECISIONS.get(base, "auto")
        agent = make_agent(alg, device, graphs=base != name, precision=precision)
        learner = published.Learner(agent) if plain else agent

        def call() -> None:
            with nullcontext() if plain else providers.backend(name, device):
                run(own, alg, learner.act, learner.update_world_model, learner.update_policy)

        def check() -> Outputs | None:
            parts(alg, "published" if plain else base)
            for _ in range(RECORDED if base != name else 1):
                call()
            finite(learner.world_model)
            return None

        return Provider(call, check)

    ours = ("reference", *providers.OURS, *(n + providers.GRAPH for n in providers.OURS))
    make = {name: partial(provider, name) for name in (*BASELINE, "published", *ours)}
    return Workload(make, device=device)
