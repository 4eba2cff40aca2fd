"""The algorithm in plain PyTorch, arranged as the published code of PWM and its flow variant is.

What is timed against, and in float64 what every provider is checked against. Written from the
formulas, independent of ``pwm_fast.ops``: inputs are concatenated, a Linear is followed by
``F.layer_norm`` and ``F.mish``, the reward is computed at every step of a rollout, the critics run
under ``torch.vmap``, and nothing is frozen unless the caller freezes it. It is the arrangement that
is as published: losses, rates and betas are those of the configuration that is measured
(docs/published.md), so that both sides do the same work.

One thing is left out in our disfavour: the published rollout also evaluates the critics at every
step, inside the graph. Here that is done in :meth:`Learner.update_policy` (whose critic needs these
values), and not in :func:`rollout`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwm_fast.agent import PWM
from pwm_fast.config import AlgConfig
from pwm_fast.ops import Dynamics, Flow, Heads, Layer, Policy
from pwm_fast.replay import Windows


def normed(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """The world model's layers: Linear, LayerNorm, Mish in place or SimNorm."""
    for layer in layers:
        x = F.linear(x, layer.weight, layer.bias)
        if layer.ln_weight is not None:
            x = F.layer_norm(x, x.shape[-1:], layer.ln_weight, layer.ln_bias, layer.eps)
        if layer.act == "mish":
            x = F.mish(x, inplace=True)
        elif layer.act == "simnorm":
            groups = x.view(*x.shape[:-1], -1, layer.simnorm_dim)
            x = F.softmax(groups, dim=-1).view(x.shape)
    return x


def act_norm(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """The actor's and a critic's layers: Linear, Mish, LayerNorm."""
    for layer in layers:
        x = F.linear(x, layer.weight, layer.bias)
        if layer.act == "mish":
            x = F.mish(x)
        if layer.ln_weight is not None:
            x = F.layer_norm(x, x.shape[-1:], layer.ln_weight, layer.ln_bias, layer.eps)
    return x


def critics(layers: Sequence[Layer], z: Tensor) -> Tensor:
    """Values ``[E, ...]`` of an ensemble whose tensors are stacked along a first axis."""
    return ensemble(act_norm, layers, z).squeeze(-1)


def ensemble(
    run: Callable[[Sequence[Layer], Tensor], Tensor], layers: Sequence[Layer], x: Tensor
) -> Tensor:
    """``[E, ...]``: members whose tensors are stacked along a first axis, under torch.vmap."""
    tensors = [p for layer in layers for p in layer[:4] if p is not None]

    def one(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        rest = iter(parameters)
        member = [
            layer._replace(
                weight=next(rest),
                bias=next(rest),
                ln_weight=None if layer.ln_weight is None else next(rest),
                ln_bias=None if layer.ln_bias is None else next(rest),
            )
            for layer in layers
        ]
        return run(member, x)

    values: Tensor = torch.vmap(one, in_dims=(0, None))(tensors, x)
    return values


def velocity(net: Sequence[Layer], z: Tensor, a: Tensor, tau: float | Tensor) -> Tensor:
    column = torch.zeros(*z.shape[:-1], 1, dtype=z.dtype, device=z.device) + tau
    return normed(net, torch.cat([z, a, column], dim=-1))


def next_latent(dynamics: Dynamics, z: Tensor, a: Tensor) -> Tensor:
    if not isinstance(dynamics, Flow):
        return normed(dynamics.net, torch.cat([z, a], dim=-1))
    dt = 1.0 / dynamics.substeps
    for k in range(dynamics.substeps):
        k1 = velocity(dynamics.net, z, a, k * dt)
        if dynamics.method == "euler":
            z = z + dt * k1
        else:
            k2 = velocity(dynamics.net, z + dt * k1, a, (k + 1) * dt)
            z = z + 0.5 * dt * (k1 + k2)
    return z


def symexp(x: Tensor) -> Tensor:
    return torch.sign(x) * (torch.exp(torch.abs(x)) - 1)


def symlog(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.log(1 + torch.abs(x))


def two_hot_decode(logits: Tensor, vmin: float, vmax: float) -> Tensor:
    bins = torch.linspace(vmin, vmax, logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return symexp(torch.sum(F.softmax(logits, dim=-1) * bins, dim=-1))


def two_hot_encode(x: Tensor, bins: int, vmin: float, vmax: float) -> Tensor:
    width = (vmax - vmin) / (bins - 1)
    x = torch.clamp(symlog(x), vmin, vmax)
    index = torch.floor((x - vmin) / width).long().clamp(0, bins - 2)
    offset = ((x - vmin) / width - index).unsqueeze(-1)
    target = torch.zeros(*x.shape, bins, dtype=x.dtype, device=x.device)
    target.scatter_(-1, index.unsqueeze(-1), 1 - offset)
    return target.scatter_(-1, index.unsqueeze(-1) + 1, offset)


def two_hot_cross_entropy(logits: Tensor, x: Tensor, vmin: float, vmax: float) -> Tensor:
    target = two_hot_encode(x, logits.shape[-1], vmin, vmax)
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1)


def td_lambda(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """Targets ``[H, B]`` of rewards ``[H, B]`` and the values ``[H, B]`` of their successors."""
    targets = torch.zeros_like(reward)
    following = value[-1]
    for t in reversed(range(reward.shape[0])):
        following = reward[t] + gamma * ((1 - lam) * value[t] + lam * following)
        targets[t] = following
    return targets


def esnr(gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Signal and noise of flat gradient samples, by stack, mean and norms."""
    samples = torch.stack(list(gradients))
    signal = (samples.mean(dim=0) ** 2).sum()
    return signal, (samples**2).sum(dim=1).mean() - signal


# --- imagined rollout ---------------------------------------------------------------------------

Step = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Rollout(NamedTuple):
    """Latents ``[H+1, B, D]``, rewards ``[H, B]``, values, and the return ``[B]``."""

    z: Tensor
    reward: Tensor
    value: Tensor
    returns: Tensor


def macro_step(
    policy: Policy, dynamics: Dynamics, heads: Heads, z: Tensor, noise: Tensor, detach: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Next latent, action and reward."""
    mu = act_norm(policy.layers, z.detach() if detach else z)
    a = torch.tanh(mu + policy.std * noise)
    reward = two_hot_decode(normed(heads.reward, torch.cat([z, a], dim=-1)), heads.vmin, heads.vmax)
    return next_latent(dynamics, z, a), a, reward


def rollout(
    policy: Policy,
    dynamics: Dynamics,
    heads: Heads,
    z: Tensor,
    noise: Tensor,
    *,
    gamma: float,
    detach: bool,
    step: Step = macro_step,
    every_value: bool = False,
) -> Rollout:
    """Roll the policy out; ``value`` is ``[B]``, or ``[H, B]`` of every successor."""
    assert heads.value is not None
    latents, rewards, values = [z], [], []
    total, discount = torch.zeros_like(z[:, 0]), 1.0
    for eps in noise:
        z, _, reward = step(policy, dynamics, heads, z, eps, detach)
        total = total + discount * reward
        discount *= gamma
        latents.append(z)
        rewards.append(reward)
        if every_value:
            values.append(critics(heads.value, z).min(dim=0).values)
    value = values[-1] if values else critics(heads.value, z).min(dim=0).values
    returns = total + discount * value
    every = torch.stack(values) if values else value
    return Rollout(torch.stack(latents), torch.stack(rewards), every, returns)


# --- learning -----------------------------------------------------------------------------------


class Learner:
    """Networks of an agent, copied, with plain optimisers: the three updates of an epoch."""

    def __init__(self, agent: PWM, dtype: torch.dtype = torch.float32) -> None:
        self.config: AlgConfig = agent.config
        self.world_model = copy.deepcopy(agent.world_model).to(dtype)
        self.actor = copy.deepcopy(agent.actor).to(dtype)
        self.critic = copy.deepcopy(agent.critic).to(dtype)
        self.return_rms = copy.deepcopy(agent.return_rms)
        config, self.dtype = self.config, dtype
        self.optimizers = {
            "wm": _adam(self.world_model, config.model_learning),
            "actor": _adam(self.actor, config.actor),
            "critic": _adam(self.critic, config.critic),
        }
        self.next_latent = next_latent

    def encode(self, obs: Tensor) -> Tensor:
        return normed(self.world_model._encoder.layers(), obs)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        policy = self.actor.policy()
        mu = act_norm(policy.layers, self.encode(obs))
        return torch.tanh(mu + policy.std * torch.randn_like(mu))

    def heads(self) -> Heads:
        return self.world_model.heads()._replace(value=self.critic.layers())

    def world_model_loss(self, windows: Windows) -> Tensor:
        learning, gamma = self.config.model_learning, self.config.gamma
        model, dynamics = self.world_model, self.world_model.learned_dynamics(learning)
        horizon, batch = windows.action.shape[:2]
        tau: float | Tensor = 0.5
        if isinstance(dynamics, Flow) and dynamics.share < 1.0:
            tau = torch.full((batch, 1), 0.5, dtype=windows.obs.dtype, device=windows.obs.device)
            tau[dynamics.drawn(batch) :] = 0.0
        with torch.no_grad():
            target = self.encode(windows.obs[1:])
        z = self.encode(windows.obs[0])
        latents, error = [], torch.zeros((), dtype=z.dtype, device=z.device)
        for t in range(horizon):
            a = windows.action[t]
            latents.append(z)
            if isinstance(dynamics, Flow):
                wanted = target[t] - z
                found = velocity(dynamics.net, (1.0 - tau) * z + tau * target[t], a, tau)
                error = error + gamma**t * F.mse_loss(found, wanted)
                z = self.next_latent(dynamics, z, a)
            else:
                z = self.next_latent(dynamics, z, a)
                error = error + gamma**t * F.mse_loss(z, target[t])
        logits = normed(
            model._reward.layers(), torch.cat([torch.stack(latents), windows.action], dim=-1)
        )
        discount = gamma ** torch.arange(horizon, device=z.device).unsqueeze(-1)
        entropy = two_hot_cross_entropy(
            logits, windows.reward, model.config.vmin, model.config.vmax
        )
        reward = (entropy * discount).mean(dim=1).sum()
        return (learning.dynamics_coef * error + learning.reward_coef * reward) / horizon

    def update_world_model(self, windows: Windows) -> None:
        """One update; the clipped gradients stay in ``.grad``, as they do in the published code."""
        self.optimizers["wm"].zero_grad()
        self._step("wm", self.world_model, self.world_model_loss(windows))

    def update_policy(self, obs: Tensor) -> None:
        """The actor's update with nothing frozen, then the critics'."""
        config = self.config
        self.optimizers["actor"].zero_grad()
        for p in (*self.world_model.parameters(), *self.critic.parameters()):
            p.grad = None  # computed by the backward pass below, and thrown away
        z = self.encode(obs)
        noise = torch.randn(config.imagined_steps, *obs.shape[:1], self.actor.action_dim)
        imagined = rollout(
            self.actor.policy(),
            self.world_model.dynamics(),
            self.heads(),
            z,
            noise.to(z),
            gamma=config.gamma,
            detach=config.actor.detach,
            every_value=True,
        )
        self.return_rms.update(imagined.returns)
        loss = -imagined.returns.mean() / self.return_rms.scale()
        self._step("actor", self.actor, loss)
        self.update_critics(imagined.z[:-1], imagined.reward, imagined.value)

    def update_critics(self, z: Tensor, reward: Tensor, value: Tensor) -> None:
        """Passes over states ``[H, B, D]`` towards TD(lambda) of rewards and next values."""
        config = self.config.critic
        with torch.no_grad():
            targets = td_lambda(reward, value, self.config.gamma, config.lam).flatten()
            states = z.flatten(0, 1)
        size = -(-states.shape[0] // config.minibatches)
        for _ in range(config.passes):
            for i in range(0, states.shape[0], size):
                self.optimizers["critic"].zero_grad()
                found = critics(self.critic.layers(), states[i : i + size])
                loss = ((found - targets[i : i + size]) ** 2).mean()
                self._step("critic", self.critic, loss)

    def _step(self, name: str, module: nn.Module, loss: Tensor) -> None:
        section = {"wm": "model_learning", "actor": "actor", "critic": "critic"}[name]
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), getattr(self.config, section).grad_norm)
        self.optimizers[name].step()


def _adam(module: nn.Module, section: object) -> torch.optim.Adam:
    lr, betas = section.lr, tuple(section.betas)  # type: ignore[attr-defined]
    return torch.optim.Adam(module.parameters(), lr=lr, betas=betas)
