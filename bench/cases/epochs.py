"""A whole epoch of training on 128 Ants: acting, physics, replay, all updates; or these alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import providers, published
from bench.cases import Case, Provider, Workload
from bench.gate import Mismatch, Outputs
from bench.measure import Effort
from bench.providers import Absent
from bench.sizes import ACTION, HORIZON, OBS, alg_config, make_agent
from pwm_fast import envs
from pwm_fast.config import AlgConfig
from pwm_fast.replay import Replay, Windows

WORLDS = 128
TITLE = "training epoch, 128 Ants"
UPDATES = "updates of a training epoch"
RECORDED = 3  # calls after which the agent's updates are replayed from CUDA graphs


def cases(device: torch.device) -> list[Case]:
    names = ["published_baseline", "published", "reference", "fast", "fast_bf16"]
    if device.type == "cuda":
        names += ["fast_tf32", "fast_fp16", *(n + providers.GRAPH for n in providers.OURS)]
    return [
        Case(
            f"{kind}-{size}",
            {"work": title, "model": f"{size}_flow", "batch": WORLDS, "K": 2},
            partial(build, alg_config(f"{size}_flow"), alg_config(size), physics=kind == "epoch"),
            tuple(names),
            frozenset({"figures"} if kind == "epoch" else ())
            | frozenset({"large"} if size == "48M" else ()),
            memory=4e9 if size == "48M" else 1e9,
            effort=Effort(seconds=20.0, min_rounds=3),
        )
        for kind, title in (("epoch", TITLE), ("updates", UPDATES))
        for size in ("5M", "48M")
        if kind == "epoch" or device.type == "cuda"
    ]


class Worlds:
    """The part of an epoch that every provider shares: robots and replay."""

    def __init__(self, device: torch.device, worlds: int, horizon: int) -> None:
        try:
            self.env = envs.make("ant", worlds, seed=0, device=device)
        except ImportError as error:
            raise Absent(f"no physics engine: {error}") from error
        self.replay = Replay(worlds * 400, worlds, OBS, ACTION, horizon, device)
        self.obs, _ = self.env.reset()
        for _ in range(3 * horizon):
            self.step(torch.rand(worlds, ACTION) * 2 - 1)

    def step(self, action: Tensor) -> None:
        obs = self.obs
        self.obs, reward, terminated, truncated, info = self.env.step(action.to(self.env.device))
        self.replay.add(obs, action, reward, terminated, terminated | truncated, info["final_obs"])


class Recorded:
    """The same without physics: a replay full of random transitions, which nothing is added to."""

    def __init__(self, device: torch.device, worlds: int, horizon: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.replay = Replay(worlds * 400, worlds, OBS, ACTION, horizon, device)
        never = torch.zeros(worlds, dtype=torch.bool)
        for _ in range(3 * horizon):
            obs, following = (torch.randn(worlds, OBS, generator=g) for _ in range(2))
            action = torch.rand(worlds, ACTION, generator=g) * 2 - 1
            reward = torch.randn(worlds, generator=g)
            self.replay.add(obs, action, reward, never, never, following)


def run(
    worlds: Worlds | Recorded,
    alg: AlgConfig,
    act: Callable[[Tensor], Tensor],
    update_world_model: Callable[[Windows], object],
    update_policy: Callable[[Tensor], object],
) -> None:
    """The epoch, in the trainer's order."""
    for _ in range(alg.steps_per_epoch if isinstance(worlds, Worlds) else 0):
        worlds.step(act(worlds.obs.to(worlds.replay.device)))
    for _ in range(alg.model_learning.updates):
        update_world_model(worlds.replay.sample(alg.model_learning.batch_size))
    for _ in range(alg.actor.updates):
        update_policy(worlds.replay.sample_obs(alg.actor.batch_size))


def build(
    flow: AlgConfig,
    baseline: AlgConfig,
    device: torch.device,
    worlds: int = WORLDS,
    horizon: int = HORIZON,
    physics: bool = True,
) -> Workload:
    """Epochs of flow, and as their anchor one of the baseline as published.

    ``physics=False`` leaves acting, environments and the filling of the replay out.

    An epoch is chaotic to the bit, so what is compared with float64 are its parts: the rollout's
    gradient, the world-model update and the critics' update, at this configuration's sizes.
    """

    def parts(alg: AlgConfig, name: str) -> None:
        from bench.cases import rollouts, updates

        batch = alg.actor.batch_size
        for part in (
            rollouts.build(alg, batch, "backward", device, horizon),
            updates.build_world_model(alg, alg.model_learning.batch_size, device, horizon),
            updates.build_critic(alg, batch, device, horizon),
        ):
            part.verify(name, part.make[name]())

    def finite(module: torch.nn.Module) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
            raise Mismatch("a parameter is not finite after an epoch")

    def plain(alg: AlgConfig) -> Provider:
        own = (Worlds if physics else Recorded)(device, worlds, horizon)  # the first to be absent
        learner = published.Learner(make_agent(alg, device))
        call = partial(
            run, own, alg, learner.act, learner.update_world_model, learner.update_policy
        )

        def check() -> Outputs | None:
            parts(alg, "published")
            call()
            finite(learner.world_model)
            return None

        return Provider(call, check)

    def ours(name: str) -> Provider:
        providers.need(name, device)
        base = name.removesuffix(providers.GRAPH)
        precision = providers.PRECISIONS.get(base, "auto")
        own = (Worlds if physics else Recorded)(device, worlds, horizon)
        agent = make_agent(flow, device, graphs=base != name, precision=precision)

        def call() -> None:
            with providers.backend(name, device):
                run(own, flow, agent.act, agent.update_world_model, agent.update_policy)

        def check() -> Outputs | None:
            parts(flow, base)
            for _ in range(RECORDED if base != name else 1):
                call()
            finite(agent.world_model)
            return None

        return Provider(call, check)

    make: dict[str, Callable[[], Provider]] = {
        "published_baseline": partial(plain, baseline),
        "published": partial(plain, flow),
        **{n: partial(ours, n) for n in ("reference", *providers.OURS)},
        **{n + providers.GRAPH: partial(ours, n + providers.GRAPH) for n in providers.OURS},
    }
    return Workload(make, device=device)
