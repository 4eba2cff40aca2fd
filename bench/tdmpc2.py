"""TD-MPC2's own model in plain PyTorch, and the same code after ``pwm_fast.accelerate``.

``plan()`` chooses an action of one env by MPPI, ``_update()`` is a step of learning: world model
and Q functions, then the policy, then the target. Written anew from the description of the
single-task model of 5M parameters: Hansen et al. 2024, TD-MPC2 (arXiv 2310.16828).

Random numbers are given, so that all providers compute the same; dropout alone draws its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

import pwm_fast
from bench import floor, providers, published
from bench.cases import Case, Make, Provider, Workload
from bench.gate import Outputs
from bench.measure import Effort
from bench.sizes import ACTION, OBS
from pwm_fast import ops
from tests.acceleration.modules import SimNorm, mlp

PLAN, UPDATE = "TD-MPC2's plan()", "TD-MPC2's _update()"
VMIN, VMAX, GAMMA = -10.0, 10.0, 0.99
RHO, CLIP, ENTROPY, TAU, LEARNING_RATE = 0.5, 20.0, 1e-4, 0.01, 3e-4
PROVIDERS = ("published", "fast", "fast_edit", "floor")


@dataclass(frozen=True)
class Size:
    """Of the model and its batches; the defaults are the published ones."""

    latent: int = 512
    units: int = 512
    encoder: int = 256
    bins: int = 101
    members: int = 5
    batch: int = 256
    horizon: int = 3
    options: ops.MPPI = ops.MPPI()  # noqa: RUF009  immutable


# --- the model ----------------------------------------------------------------------------------


class Ensemble(nn.Module):
    """Members whose parameters are stacked."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        stacked, _ = stack_module_state(list(members))  # type: ignore[arg-type]
        self.names = list(stacked)
        self.params = nn.ParameterList(nn.Parameter(p.detach()) for p in stacked.values())
        self.module = copy.deepcopy(members[0]).to("meta")

    def named(self, detach: bool = False) -> dict[str, Tensor]:
        """The stacked parameters by name."""
        params = [p.detach() if detach else p for p in self.params]
        return dict(zip(self.names, params, strict=True))

    def forward(self, x: Tensor, detach: bool = False) -> Tensor:
        """``[B.., K]`` to ``[E, B.., bins]``."""

        def member(params: dict[str, Tensor]) -> Tensor:
            return functional_call(self.module, params, (x,))  # type: ignore[no-any-return]

        return torch.vmap(member, randomness="different")(self.named(detach))


class World(nn.Module):
    """Encoder, dynamics, reward, policy, Q functions and their target."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        pair, hidden = size.latent + ACTION, [size.units, size.units]
        self._encoder = mlp(OBS, [size.encoder], size.latent, act=SimNorm(8))
        self._dynamics = mlp(pair, hidden, size.latent, act=SimNorm(8))
        self._reward = mlp(pair, hidden, size.bins)
        self._pi = mlp(size.latent, hidden, 2 * ACTION)
        self._qs = Ensemble([mlp(pair, hidden, size.bins, dropout=0.01)] * size.members)
        self._target = copy.deepcopy(self._qs).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> World:
        """The target never drops out."""
        super().train(mode)
        self._target.train(False)
        return self

    def encode(self, obs: Tensor) -> Tensor:
        return self._encoder(obs)  # type: ignore[no-any-return]

    def next(self, z: Tensor, a: Tensor) -> Tensor:
        return self._dynamics(torch.cat([z, a], dim=-1))  # type: ignore[no-any-return]

    def reward(self, z: Tensor, a: Tensor) -> Tensor:
        """Logits."""
        return self._reward(torch.cat([z, a], dim=-1))  # type: ignore[no-any-return]

    def pi(self, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """An action, and its entropy times its size."""
        mean, log_std = self._pi(z).chunk(2, dim=-1)
        log_std = -10.0 + 0.5 * (2.0 - -10.0) * (torch.tanh(log_std) + 1.0)
        log_prob = (-0.5 * eps.pow(2) - log_std - 0.9189385175704956).sum(-1, keepdim=True)
        scaled = log_prob * eps.shape[-1]
        action = torch.tanh(mean + eps * log_std.exp())
        squash = torch.log(F.relu(1.0 - action.pow(2)) + 1e-6).sum(-1, keepdim=True)
        scale = scaled / (log_prob + 1e-8)
        return action, -(log_prob - squash) * scale

    def all_q(self, z: Tensor, a: Tensor) -> Tensor:
        """Logits ``[E, .., bins]``."""
        return self._qs(torch.cat([z, a], dim=-1))  # type: ignore[no-any-return]

    def q(
        self, z: Tensor, a: Tensor, members: Tensor, *, target: bool = False, least: bool = False
    ) -> Tensor:
        """Mean or minimum ``[.., 1]`` of two, with no gradient towards parameters."""
        qs = self._target if target else self._qs
        value = decode(self.some(qs, z, a, members))
        return value.amin(dim=0) if least else value.sum(dim=0) / 2

    def some(self, qs: Ensemble, z: Tensor, a: Tensor, members: Tensor) -> Tensor:
        """Logits of two of five."""
        return qs(torch.cat([z, a], dim=-1), detach=True)[members]  # type: ignore[no-any-return]


class EditedWorld(World):
    """Accelerated, with an edit of one line: what is not used of the Q functions is not computed.

    That is three of five members and, in the policy's update, their gradient towards the latent.
    """

    def some(self, qs: Ensemble, z: Tensor, a: Tensor, members: Tensor) -> Tensor:
        return ops.mlp((z, a), qs.module.layers(qs.named(detach=True)), members=members)  # type: ignore[operator]


def decode(logits: Tensor) -> Tensor:
    return published.two_hot_decode(logits, VMIN, VMAX).unsqueeze(-1)


def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    return published.two_hot_cross_entropy(logits, x.squeeze(-1), VMIN, VMAX)


@torch.no_grad()
def make(
    size: Size,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    kind: type[World] = World,
) -> World:
    """With random parameters; logits differ by more than 1, as those of trained heads."""
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        world = kind(size)
    for name, p in world.named_parameters():
        if p.is_meta or name.startswith("_target"):
            continue
        noise = torch.randn(p.shape, generator=g)
        if name.startswith("_qs"):
            key = world._qs.names[int(name.rpartition(".")[2])]
            kind = world._qs.module.get_submodule(key.rpartition(".")[0])
        else:
            key, kind = name, world.get_submodule(name.rpartition(".")[0])
        if key.endswith("bias"):
            p.copy_(0.1 * noise if isinstance(kind, nn.LayerNorm) else 0.02 * noise)
        elif isinstance(kind, nn.LayerNorm):
            p.copy_(1.0 + 0.1 * noise)
        else:
            gain = 2.0 if p.shape[-2] == size.bins else 1.0
            p.copy_(gain * noise / p.shape[-1] ** 0.5)
    for p, q in zip(world._target.params, world._qs.params, strict=True):
        p.copy_(q + 0.02 * q.abs().mean() * torch.randn(q.shape, generator=g))
    for p in world.parameters():
        p.data = p.data.to(dtype=dtype) if p.is_meta else p.data.to(device, dtype)
    return world


def ready(provider: str, size: Size, seed: int, device: torch.device) -> World:
    """The model as a provider has it."""
    world = make(size, seed, device, kind=EditedWorld if provider == "fast_edit" else World)
    if provider == "published":
        return world
    providers.need("fast", device)
    fast = pwm_fast.accelerate(world)
    assert isinstance(fast, World)
    return fast


# --- plan() -------------------------------------------------------------------------------------


class PlanNoise(NamedTuple):
    """Random numbers of a plan of H steps, I iterations and N trajectories, L led by the policy.

    Attributes:
        led: ``[H, L, A]``.
        samples: ``[I, H, N - L, A]``.
        last: ``[I, N, A]``, of the action that is valued.
        members: ``[I, 2]``.
        choice: ``[elites]``, Gumbel.
        action: ``[A]``.
    """

    led: Tensor
    samples: Tensor
    last: Tensor
    members: Tensor
    choice: Tensor
    action: Tensor


def estimate(world: World, z: Tensor, actions: Tensor, eps: Tensor, members: Tensor) -> Tensor:
    """Values ``[N, 1]`` of ``actions [H, N, A]``."""
    total: Tensor | float = 0.0
    discount = 1.0
    for a in actions.unbind(0):
        reward = decode(world.reward(z, a))
        z = world.next(z, a)
        total = total + discount * reward
        discount *= GAMMA
    action, _ = world.pi(z, eps)
    return total + discount * world.q(z, action, members)


@torch.no_grad()
def plan(
    world: World, obs: Tensor, before: Tensor, noise: PlanNoise, o: ops.MPPI
) -> tuple[Tensor, Tensor, Tensor]:
    """The action ``[A]``, the plan ``[H, A]``, and the last iteration's values ``[N, 1]``."""
    count = o.policy_trajectories
    first = world.encode(obs)
    z, led = first.repeat(count, 1), []
    for t in range(o.horizon):
        led.append(world.pi(z, noise.led[t])[0])
        if t < o.horizon - 1:
            z = world.next(z, led[t])
    z = first.repeat(o.samples, 1)
    mean = torch.zeros_like(before)
    mean[:-1] = before[1:]
    std = torch.full_like(mean, o.max_std)
    actions = z.new_empty(o.horizon, o.samples, mean.shape[-1])
    actions[:, :count] = torch.stack(led)
    for i in range(o.iterations):
        free = mean.unsqueeze(1) + std.unsqueeze(1) * noise.samples[i]
        actions[:, count:] = free.clamp(-1.0, 1.0)
        value = estimate(world, z, actions, noise.last[i], noise.members[i]).nan_to_num(0.0)
        index = torch.topk(value.squeeze(1), o.elites, dim=0).indices
        top, elites = value[index], actions[:, index]
        score = torch.exp(o.temperature * (top - top.amax(0)))
        score = score / score.sum(0)
        mean = (score.unsqueeze(0) * elites).sum(dim=1) / (score.sum(0) + 1e-9)
        deviation = (elites - mean.unsqueeze(1)) ** 2
        std = ((score.unsqueeze(0) * deviation).sum(dim=1) / (score.sum(0) + 1e-9)).sqrt()
        std = std.clamp(o.min_std, o.max_std)
    taken = (score.squeeze(1).log() + noise.choice).argmax()
    action = elites[0].index_select(0, taken.reshape(1)).squeeze(0) + std[0] * noise.action
    return action.clamp(-1.0, 1.0), mean, value


# --- _update() ----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A batch of replay, and the random numbers of an update.

    Attributes:
        obs: ``[H + 1, B, O]``.
        action: ``[H, B, A]``.
        reward: ``[H, B, 1]``.
        terminated: ``[H, B, 1]``.
        target_eps: ``[H, B, A]``, of the actions in the targets.
        pi_eps: ``[H + 1, B, A]``.
        members: ``[2, 2]``, of the target and of the policy's loss.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    target_eps: Tensor
    pi_eps: Tensor
    members: Tensor


def model_loss(world: World, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of world model and Q functions, and the latents ``[H + 1, B, Z]``."""
    horizon = batch.action.shape[0]
    with torch.no_grad():
        next_z = world.encode(batch.obs[1:])
        action, _ = world.pi(next_z, batch.target_eps)
        value = world.q(next_z, action, batch.members[0], target=True, least=True)
        targets = batch.reward + GAMMA * (1.0 - batch.terminated) * value
    world.train()
    z = world.encode(batch.obs[0])
    zs = [z]
    consistency: Tensor | float = 0.0
    for t in range(horizon):
        z = world.next(z, batch.action[t])
        consistency = consistency + F.mse_loss(z, next_z[t]) * RHO**t
        zs.append(z)
    latents = torch.stack(zs)
    qs = world.all_q(latents[:-1], batch.action)
    rewards = world.reward(latents[:-1], batch.action)
    reward_loss: Tensor | float = 0.0
    value_loss: Tensor | float = 0.0
    for t in range(horizon):
        reward_loss = reward_loss + cross_entropy(rewards[t], batch.reward[t]).mean() * RHO**t
        for q in qs[:, t].unbind(0):
            value_loss = value_loss + cross_entropy(q, targets[t]).mean() * RHO**t
    total = 20.0 * consistency + 0.1 * reward_loss + 0.1 * value_loss / qs.shape[0]
    return total / horizon, latents.detach()


def policy_loss(world: World, zs: Tensor, batch: Batch, scale: Tensor) -> Tensor:
    """Of the latents ``[H + 1, B, Z]``; the running ``scale`` of values is updated."""
    action, entropy = world.pi(zs, batch.pi_eps)
    q = world.q(zs, action, batch.members[1])
    low, high = torch.quantile(q[0].detach(), torch.tensor([0.05, 0.95]).to(q), dim=0)
    scale.lerp_((high - low).clamp(min=1.0), TAU)
    rho = RHO ** torch.arange(len(q), dtype=q.dtype, device=q.device)
    return (-(ENTROPY * entropy + q / scale).mean(dim=(1, 2)) * rho).mean()


class Learner:
    """A model with its optimisers."""

    def __init__(self, world: World) -> None:
        self.world = world
        parts = [world._dynamics, world._reward, world._qs]
        self.scale = torch.ones_like(world._pi[-1].bias[:1])  # type: ignore[index]
        rest = [p for part in parts for p in part.parameters() if not p.is_meta]
        encoder = list(world._encoder.parameters())
        self.params, self.pi_params = [*encoder, *rest], list(world._pi.parameters())
        groups = [{"params": encoder, "lr": 0.3 * LEARNING_RATE}, {"params": rest}]
        self.optimizer = torch.optim.Adam(groups, lr=LEARNING_RATE)
        self.pi_optimizer = torch.optim.Adam(self.pi_params, lr=LEARNING_RATE, eps=1e-5)

    def update(self, batch: Batch) -> None:
        """One step."""
        loss, zs = model_loss(self.world, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        policy_loss(self.world, zs, batch, self.scale).backward()
        nn.utils.clip_grad_norm_(self.pi_params, CLIP)
        self.pi_optimizer.step()
        self.pi_optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            qs = self.world._qs.params
            for target, p in zip(self.world._target.params, qs, strict=True):
                target.lerp_(p, TAU)
        self.world.eval()

    def gradients(self, batch: Batch, seed: int) -> Outputs:
        """The clipped gradients of one step that is not taken.

        The policy's is without dropout: what that draws depends on how many members are computed.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loss, zs = model_loss(self.world, batch)
        self.world.eval()
        found = {"loss": loss.detach().reshape(1)}
        actor = policy_loss(self.world, zs, batch, self.scale.clone())
        for name, value, params in (
            ("gradient", loss, self.params),
            ("policy's gradient", actor, self.pi_params),
        ):
            value.backward()
            nn.utils.clip_grad_norm_(params, CLIP)
            found[name] = [p.grad for p in params]  # type: ignore[assignment]
            for p in params:
                p.grad = None
        return found


# --- their GEMMs, where of the Q functions no more than two are computed that are used -----------


class _Stacks(NamedTuple):
    """Widths of each network's layers."""

    encoder: list[int]
    dynamics: list[int]
    reward: list[int]
    policy: list[int]
    q: list[int]


def _stacks(size: Size) -> _Stacks:
    pair, hidden = size.latent + ACTION, [size.units, size.units]
    return _Stacks(
        [OBS, size.encoder, size.latent],
        [pair, *hidden, size.latent],
        [pair, *hidden, size.bins],
        [size.latent, *hidden, 2 * ACTION],
        [pair, *hidden, size.bins],
    )


def _times(gemms: Sequence[floor.Gemm], uses: int) -> list[floor.Gemm]:
    return [p._replace(uses=uses) for p in gemms]


def plan_gemms(size: Size) -> list[floor.Gemm]:
    """Of a plan."""
    s, o = _stacks(size), size.options
    prior = _times(floor.stack(o.policy_trajectories, s.policy), o.horizon)
    prior += _times(floor.stack(o.policy_trajectories, s.dynamics), o.horizon - 1)
    each = [floor.stack(o.samples, sizes) for sizes in (s.dynamics, s.reward)]
    steps = [p for part in each for p in _times(part, o.horizon * o.iterations)]
    ends = _times(floor.stack(o.samples, s.policy), o.iterations)
    ends += _times(floor.stack(o.samples, s.q), 2 * o.iterations)
    return [*prior, *steps, *ends]


def update_gemms(size: Size) -> list[floor.Gemm]:
    """Of an update."""
    s, every = _stacks(size), size.batch * size.horizon
    targets = [*floor.stack(every, s.encoder), *floor.stack(every, s.policy)]
    targets += _times(floor.stack(every, s.q), 2)
    start = floor.stack(size.batch, s.encoder)
    learned = _times(floor.stack(size.batch, s.dynamics), size.horizon)
    learned += floor.stack(every, s.reward) + floor.stack(every, s.q, members=size.members)
    rows = every + size.batch
    policy, values = floor.stack(rows, s.policy), _times(floor.stack(rows, s.q), 2)
    return [
        *targets,
        *(*start, *learned, *floor.backward([*start[1:], *learned])),
        *floor.weight_gradients([*start, *learned]),
        *(*policy, *values, *floor.backward([*policy[1:], *values[1:]])),
        floor.Gemm(rows, size.units, ACTION, uses=2),
        *floor.weight_gradients(policy),
    ]


# --- the cases ----------------------------------------------------------------------------------


def cases(device: torch.device) -> list[Case]:
    size = Size()
    axes: dict[str, str | int] = {"model": "5M", "mode": "modules"}
    effort = Effort(seconds=8.0, min_rounds=5)
    return [
        Case(
            "tdmpc2-plan",
            {"work": PLAN, **axes, "batch": 1},
            partial(build_plan, size),
            PROVIDERS,
            effort=effort,
        ),
        Case(
            "tdmpc2-update",
            {"work": UPDATE, **axes, "batch": size.batch},
            partial(build_update, size),
            PROVIDERS,
            effort=effort,
        ),
    ]


def _table(
    provider: Callable[[str], Provider], gemms: Sequence[floor.Gemm], device: torch.device
) -> dict[str, Make]:
    """Providers by name."""

    def bottom() -> Provider:
        return Provider(floor.floor(gemms, torch.float32, device))

    return {**{n: partial(provider, n) for n in PROVIDERS[:-1]}, "floor": bottom}


def _members(count: int, g: torch.Generator, times: int) -> Tensor:
    return torch.stack([torch.randperm(count, generator=g)[:2] for _ in range(times)])


def _moved(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def build_plan(size: Size, device: torch.device, seed: int = 0) -> Workload:
    """Plans of one env.

    Compared are the values of an iteration's trajectories: a rounding error in them may take
    another elite, and then whole plans differ.
    """
    o = size.options
    once = ops.MPPI(**{**vars(o), "iterations": 1})
    g = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=g)
    led = o.policy_trajectories
    noise = PlanNoise(
        normal(o.horizon, led, ACTION),
        normal(o.iterations, o.horizon, o.samples - led, ACTION),
        normal(o.iterations, o.samples, ACTION),
        _members(size.members, g, o.iterations),
        -torch.empty(o.elites).exponential_(generator=g).log(),
        normal(ACTION),
    )
    obs, before = normal(1, OBS), 0.3 * normal(o.horizon, ACTION)

    def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, PlanNoise]:
        first, *rest = (_moved(x, device, dtype) for x in (obs, before, *noise))
        return first, rest[0], PlanNoise(*rest[1:])

    def provider(name: str) -> Provider:
        world, inputs = ready(name, size, seed, device), given(torch.float32)
        return Provider(
            lambda: plan(world, *inputs, o), lambda: {"value": plan(world, *inputs, once)[2]}
        )

    def truth() -> Outputs:
        world = make(size, seed, device, torch.float64)
        return {"value": plan(world, *given(torch.float64), once)[2]}

    again = partial(build_plan, size, device, seed + 1)
    bottom = plan_gemms(size)
    return Workload(_table(provider, bottom, device), truth, again, device=device)


def make_batch(size: Size, seed: int) -> Batch:
    """Of random numbers."""
    g = torch.Generator().manual_seed(seed)
    normal, steps = partial(torch.randn, generator=g), (size.horizon, size.batch)
    return Batch(
        normal(size.horizon + 1, size.batch, OBS),
        torch.rand(*steps, ACTION, generator=g) * 2 - 1,
        3.0 * normal(*steps, 1),
        (torch.rand(*steps, 1, generator=g) < 0.05).float(),
        normal(*steps, ACTION),
        normal(size.horizon + 1, size.batch, ACTION),
        _members(size.members, g, 2),
    )


def build_update(size: Size, device: torch.device, seed: int = 0) -> Workload:
    """Steps on one batch; compared are the clipped gradients of the first."""
    batch = make_batch(size, seed)

    def given(dtype: torch.dtype) -> Batch:
        return Batch(*(_moved(x, device, dtype) for x in batch))

    def provider(name: str) -> Provider:
        learner, own = Learner(ready(name, size, seed, device)), given(torch.float32)
        return Provider(lambda: learner.update(own), lambda: learner.gradients(own, seed))

    def truth() -> Outputs:
        world = make(size, seed, device, torch.float64)
        return Learner(world).gradients(given(torch.float64), seed)

    again = partial(build_update, size, device, seed + 1)
    bottom = update_gemms(size)
    return Workload(_table(provider, bottom, device), truth, again, device=device)
