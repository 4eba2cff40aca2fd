"""What the published codes save, written anew from their descriptions in plain PyTorch.

Modules with their parameter names and orders of inputs, and files with their containers. Nothing of
pwm_fast is called here.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

ZERO_FED = 96  # columns of a single-task flow with task_dim: 96


class Normed(nn.Linear):
    """Linear, LayerNorm, and Mish or SimNorm over groups of 8."""

    def __init__(self, k: int, n: int, simnorm: bool = False) -> None:
        super().__init__(k, n)
        self.ln = nn.LayerNorm(n)
        self.simnorm = simnorm

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln(F.linear(x, self.weight, self.bias))
        if not self.simnorm:
            return F.mish(x)
        return F.softmax(x.unflatten(-1, (-1, 8)), -1).flatten(-2)


def mlp(k: int, units: Sequence[int], n: int, simnorm: bool) -> nn.Sequential:
    hidden = [Normed(a, b) for a, b in pairwise([k, *units])]
    last = Normed(units[-1], n, simnorm=True) if simnorm else nn.Linear(units[-1], n)
    return nn.Sequential(*hidden, last)


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Values of order 1 everywhere, so that no column and no bias can be lost unnoticed."""
    for p in module.parameters():
        p.copy_(torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 2.0))


class Embedded(nn.Module):
    """A model that sees an embedding of the task; with none, nothing or zeros in its place."""

    _task_emb: nn.Embedding | None
    zero_fed = 0

    def __init__(self, tasks: int, task_dim: int) -> None:
        super().__init__()
        self._task_emb = nn.Embedding(tasks, task_dim, max_norm=1) if tasks else None

    def embedding(self, rows: int, task: int | None) -> list[Tensor]:
        weight = next(self.parameters())
        if self._task_emb is not None:
            table = self._task_emb(torch.full((rows,), task))
            return [table]
        return [weight.new_zeros(rows, self.zero_fed)] if self.zero_fed else []


class World(Embedded):
    """The world models of PWM and of Flow-MBPO-PWM."""

    def __init__(
        self,
        obs: int,
        action: int,
        latent: int,
        units: Sequence[int],
        encoder_units: Sequence[int],
        bins: int,
        *,
        flow: bool = False,
        tasks: int = 0,
        task_dim: int = 0,
        linear_head: bool = False,
    ) -> None:
        super().__init__(tasks, task_dim)
        self.flow, self.zero_fed = flow, 0 if tasks else task_dim
        self._encoder = mlp(obs + task_dim, encoder_units, latent, True)
        pair = latent + action + task_dim
        if flow:
            self._velocity = mlp(pair + 1, units, latent, not linear_head)
        else:
            self._dynamics = mlp(pair, units, latent, True)
        self._reward = mlp(pair, units, bins, False)
        randomize(self)

    def encode(self, obs: Tensor, task: int | None = None) -> Tensor:
        return self._encoder(torch.cat([obs, *self.embedding(len(obs), task)], -1))

    def velocity(self, z: Tensor, a: Tensor, tau: float, task: int | None) -> Tensor:
        time = z.new_full((len(z), 1), tau)
        return self._velocity(torch.cat([z, a, time, *self.embedding(len(z), task)], -1))

    def next(
        self, z: Tensor, a: Tensor, task: int | None = None, k: int = 2, heun: bool = True
    ) -> Tensor:
        if not self.flow:
            return self._dynamics(torch.cat([z, *self.embedding(len(z), task), a], -1))
        dt = 1.0 / k
        for i in range(k):
            v = self.velocity(z, a, i * dt, task)
            if heun:
                v = (v + self.velocity(z + dt * v, a, i * dt + dt, task)) / 2.0
            z = z + dt * v
        return z

    def reward(self, z: Tensor, a: Tensor, task: int | None = None) -> Tensor:
        e = self.embedding(len(z), task)
        return self._reward(torch.cat([z, a, *e] if self.flow else [z, *e, a], -1))


class Actor(nn.Module):
    """PWM's Gaussian policy; its action is the tanh of this."""

    def __init__(self, latent: int, action: int, units: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for k, n in pairwise([latent, *units]):
            layers += [nn.Linear(k, n), nn.Mish(), nn.LayerNorm(n)]
        self.mu_net = nn.Sequential(*layers, nn.Linear(units[-1], action), nn.Identity())
        self.logstd = nn.Parameter(torch.empty(action))
        randomize(self)

    def forward(self, z: Tensor) -> Tensor:
        return self.mu_net(z)


class FlowActor(nn.Module):
    """Flow-MBPO-PWM's flow policy."""

    def __init__(self, latent: int, action: int, units: Sequence[int]) -> None:
        super().__init__()
        self.velocity_net = Actor(latent + action + 1, action, units).mu_net[:-1]
        self.init_logstd = nn.Parameter(torch.full((action,), -1.0))
        randomize(self)

    def forward(self, z: Tensor, eps: Tensor, substeps: int, integrator: str) -> Tensor:
        """The flow's end, whose tanh is the action."""
        x, dt = eps * self.init_logstd.clamp(min=-10.0).exp(), 1.0 / substeps

        def velocity(x: Tensor, tau: float) -> Tensor:
            return self.velocity_net(torch.cat([z, x, torch.full_like(x[:, :1], tau)], -1))

        for k in range(substeps):
            slope = velocity(x, k * dt)
            if integrator == "heun":
                slope = (slope + velocity(x + dt * slope, (k + 1) * dt)) / 2
            x = x + dt * slope
        return x


class Critic(nn.Module):
    """One of PWM's value functions."""

    def __init__(self, latent: int, units: Sequence[int]) -> None:
        super().__init__()
        self.critic = Actor(latent, 1, units).mu_net[:-1]
        randomize(self)

    def forward(self, z: Tensor) -> Tensor:
        return self.critic(z)


class Ensemble(nn.Module):
    """Members whose parameters are stacked, in a ParameterList ``params``."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        stacked, _ = stack_module_state(list(members))  # type: ignore[arg-type]
        self.names = list(stacked)
        self.params = nn.ParameterList(nn.Parameter(p.detach()) for p in stacked.values())
        self._member = [members[0]]  # no child: its parameters are not saved

    def forward(self, x: Tensor) -> Tensor:
        net = self._member[0]

        def member(*params: Tensor) -> Any:
            return functional_call(net, dict(zip(self.names, params, strict=True)), (x,))

        return torch.vmap(member)(*self.params)


# --- PWM's file -----------------------------------------------------------------------------------


@contextmanager
def statistics(package: str) -> Iterator[Any]:
    """The class of running statistics, which pickles as that of ``package``."""
    name = f"{package}.utils.running_mean_std"
    kind = type("RunningMeanStd", (), {"__module__": name})
    module = types.ModuleType(name)
    module.RunningMeanStd = kind  # type: ignore[attr-defined]
    parents = [package, f"{package}.utils"]
    before = {key: sys.modules.get(key) for key in (*parents, name)}
    sys.modules.update({**{key: types.ModuleType(key) for key in parents}, name: module})

    def make(shape: tuple[int, ...]) -> Any:
        made = kind()
        made.shape = shape
        made.mean = torch.randn(shape)
        made.var = torch.rand(shape) + 0.5
        made.count = 1234.0 + 1e-4
        return made

    try:
        yield make
    finally:
        for key, module_before in before.items():
            del sys.modules[key]
            if module_before is not None:
                sys.modules[key] = module_before


class PWMFile:
    """Networks of PWM or of Flow-MBPO-PWM with their optimisers, and the file that they save."""

    def __init__(
        self,
        world: World,
        actor: nn.Module,
        critic: Ensemble,
        *,
        package: str = "pwm",
        normalised: Sequence[str] = ("rew_rms", "ret_rms"),
        obs: int = 0,
    ) -> None:
        self.world, self.actor, self.critic = world, actor, critic
        self.package, self.normalised, self.obs = package, normalised, obs
        transition = world._velocity if world.flow else world._dynamics
        self.optimizers = {
            "actor_opt": torch.optim.Adam(actor.parameters(), 5e-4, (0.7, 0.95)),
            "critic_opt": torch.optim.Adam(critic.parameters(), 5e-4, (0.7, 0.95)),
            "world_model_opt": torch.optim.Adam(
                [
                    {"params": world._encoder.parameters()},
                    {"params": transition.parameters()},
                    {"params": world._reward.parameters()},
                    {"params": []},
                ],
                lr=3e-4,
            ),
        }
        self.rms: dict[str, Any] = {}

    def learn(self, steps: int = 3) -> None:
        """Steps on gradients that are drawn; those of columns that are fed zeros are zeros."""
        for _ in range(steps):
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = 0.1 * torch.randn_like(p)
            if self.world.zero_fed:
                for name, p in self.world.named_parameters():
                    if name.endswith(".0.weight"):
                        assert p.grad is not None
                        p.grad[:, -self.world.zero_fed :] = 0.0
            for optimizer in self.optimizers.values():
                optimizer.step()

    def save(self, path: Path, **more: Any) -> Path:
        """Write the file; ``more`` replaces or adds entries."""
        with statistics(self.package) as make:
            shapes = {"obs_rms": (self.obs,), "rew_rms": (1,), "ret_rms": (1,)}
            self.rms = {
                key: make(shape) if key in self.normalised else None
                for key, shape in shapes.items()
            }
            content = {
                "actor": self.actor.state_dict(),
                "critic": self.critic.state_dict(),
                "world_model": self.world.state_dict(),
                **self.rms,
                **{key: optimizer.state_dict() for key, optimizer in self.optimizers.items()},
            }
            if self.package == "flow_mbpo_pwm":
                content.update(
                    iter_count=7, step_count=99, best_policy_loss=torch.inf, mean_horizon=torch.nan
                )
            torch.save({**content, **more}, path)
        return path


def pwm_file(
    obs: int = 5,
    action: int = 3,
    latent: int = 16,
    units: Sequence[int] = (12, 10),
    encoder_units: Sequence[int] = (11,),
    bins: int = 1,
    *,
    policy: Sequence[int] = (9, 8, 7),
    values: Sequence[int] = (9, 6),
    flow_policy: bool = False,
    package: str = "pwm",
    normalised: Sequence[str] = ("rew_rms", "ret_rms"),
    **world: Any,
) -> PWMFile:
    """A file with random weights after some steps of its optimisers."""
    torch.manual_seed(0)
    made = PWMFile(
        World(obs, action, latent, units, encoder_units, bins, **world),
        (FlowActor if flow_policy else Actor)(latent, action, policy),
        Ensemble([Critic(latent, values) for _ in range(3)]),
        package=package,
        normalised=normalised,
        obs=obs,
    )
    made.learn()
    return made


# --- TD-MPC2's files ------------------------------------------------------------------------------


class TDMPC2(Embedded):
    """TD-MPC2's world model, policy and Q functions."""

    def __init__(
        self,
        obs: int = 5,
        action: int = 3,
        latent: int = 16,
        units: int = 12,
        encoder_units: Sequence[int] = (11,),
        bins: int = 21,
        *,
        members: int = 5,
        action_dims: Sequence[int] = (),
        task_dim: int = 0,
        episodic: bool = False,
    ) -> None:
        super().__init__(len(action_dims), task_dim)
        self.action_dim, self.action_dims = action, action_dims
        two = [units, units]
        pair = latent + action + task_dim
        encoder = mlp(obs + task_dim, encoder_units, latent, True)
        self._encoder = nn.ModuleDict({"state": encoder})
        self._dynamics = mlp(pair, two, latent, True)
        self._reward = mlp(pair, two, bins, False)
        self._termination = mlp(latent + task_dim, two, 1, False) if episodic else None
        self._pi = mlp(latent + task_dim, two, 2 * action, False)
        q_functions = [mlp(pair, two, bins, False) for _ in range(members)]
        for q in q_functions:
            randomize(q)
        randomize(self)
        self.online, self.target = Ensemble(q_functions), Ensemble(q_functions)
        randomize(self.target)

    def masks(self) -> Tensor:
        return torch.stack([(torch.arange(self.action_dim) < n).float() for n in self.action_dims])

    def joined(self, x: Tensor, task: int | None, *more: Tensor) -> Tensor:
        return torch.cat([x, *self.embedding(len(x), task), *more], -1)

    def encode(self, obs: Tensor, task: int | None = None) -> Tensor:
        return self._encoder["state"](self.joined(obs, task))

    def next(self, z: Tensor, a: Tensor, task: int | None = None) -> Tensor:
        return self._dynamics(self.joined(z, task, a))

    def reward(self, z: Tensor, a: Tensor, task: int | None = None) -> Tensor:
        return self._reward(self.joined(z, task, a))

    def pi(self, z: Tensor, task: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean before the tanh, and log standard deviation; masked."""
        mu, log_std = self._pi(self.joined(z, task)).chunk(2, -1)
        log_std = -10.0 + 0.5 * 12.0 * (torch.tanh(log_std) + 1.0)
        if task is not None:
            mask = self.masks()[task].to(mu.dtype)
            return mu * mask, log_std * mask
        return mu, log_std

    def q_logits(self, z: Tensor, a: Tensor, task: int | None = None) -> Tensor:
        """Of the online Q functions, ``[members, B, bins]``."""
        return self.online(self.joined(z, task, a))

    def save(self, path: Path, *, old: bool = False, **more: Any) -> Path:
        """Write the file in the format of TensorDict, or in the older one."""
        own = {
            k: v
            for k, v in self.state_dict().items()
            if not k.startswith(("online.", "target.", "_Qs."))
        }
        state: dict[str, Any] = dict(own)
        for name, q in (("_Qs", self.online), ("_target_Qs", self.target)):
            if old:
                state.update({f"{name}.params.{i}": p.detach() for i, p in enumerate(q.params)})
        if not old:
            stored = {"_Qs.params": self.online, "_detach_Qs_params": self.online}
            for name, q in {**stored, "_target_Qs_params": self.target}.items():
                named = zip(q.names, q.params, strict=True)
                state.update({f"{name}.{key}": p.detach() for key, p in named})
                size = torch.Size([len(q.params[0])])
                state.update({f"{name}.__batch_size": size, f"{name}.__device": None})
            state["log_std_min"], state["log_std_dif"] = torch.tensor(-10.0), torch.tensor(12.0)
            if self.action_dims:
                state["_action_masks"] = self.masks()
        torch.save({"model": {**state, **more}}, path)
        return path
