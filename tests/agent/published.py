"""PWM's published single-task updates in plain PyTorch, from their description alone.

A second implementation: nothing of pwm_fast is called here, and every constant is the published
one, not the configuration's. Sizes come from the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

GAMMA, LAMBDA = 0.99, 0.95
EPS = 1e-5  # beside variances
CLIP = 5.0  # deviations of observations and rewards
MIN_LOGSTD = -1.427
PASSES, MINIBATCHES = 8, 4

Params = dict[str, Tensor]


class Statistics(NamedTuple):
    """Running mean and variance."""

    mean: Tensor
    var: Tensor

    def normalize(self, x: Tensor) -> Tensor:
        """Deviations from the mean, clipped."""
        scaled = (x - self.mean.to(x.dtype)) / (self.var + EPS).sqrt().to(x.dtype)
        return scaled.clip(-CLIP, CLIP)


class Adam:
    """Adam after Kingma and Ba, on gradients whose norm is clipped."""

    def __init__(self, lr: float, betas: tuple[float, float], max_norm: float) -> None:
        self.lr, self.betas, self.max_norm = lr, betas, max_norm
        self.steps = 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    def step(self, params: Params, grads: Params) -> Params:
        """The parameters after a step."""
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        factor = (self.max_norm / (norm + 1e-6)).clip(max=1.0)
        self.steps += 1
        b1, b2 = self.betas
        after = {}
        for name, p in params.items():
            g = grads[name] * factor
            m, v = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            self.moments[name] = m, v
            mean, square = m / (1 - b1**self.steps), v / (1 - b2**self.steps)
            after[name] = p - self.lr * mean / (square.sqrt() + 1e-8)
        return after


def gradients(loss: Tensor, params: Params) -> Params:
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(params.items(), grads, strict=True)
    }


def leaves(params: Mapping[str, Tensor], dtype: torch.dtype) -> Params:
    return {k: p.detach().to(dtype, copy=True).requires_grad_() for k, p in params.items()}


# --- networks -------------------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def mish(x: Tensor) -> Tensor:
    return x * torch.tanh(torch.log1p(torch.exp(x)))


def simnorm(x: Tensor) -> Tensor:
    e = x.unflatten(-1, (-1, 8)).exp()
    return (e / e.sum(-1, keepdim=True)).flatten(-2)


def model_mlp(params: Params, name: str, x: Tensor, last: str) -> Tensor:
    """Linear, LayerNorm, Mish; the last layer is plain, or has SimNorm in place of Mish."""
    depth = 1 + max(int(k.split(".")[1]) for k in params if k.startswith(f"{name}."))
    for i in range(depth):
        x = x @ params[f"{name}.{i}.weight"].T + params[f"{name}.{i}.bias"]
        if i == depth - 1 and last == "linear":
            return x
        x = layer_norm(x, params[f"{name}.{i}.ln.weight"], params[f"{name}.{i}.ln.bias"])
        x = mish(x) if i < depth - 1 else simnorm(x)
    return x


def policy_mlp(params: list[Tensor], x: Tensor) -> Tensor:
    """Linear, Mish, LayerNorm; the last layer is plain."""
    *hidden, weight, bias = params
    for i in range(0, len(hidden), 4):
        w, b, gain, shift = hidden[i : i + 4]
        x = layer_norm(mish(x @ w.T + b), gain, shift)
    return x @ weight.T + bias


def encode(model: Params, obs: Tensor) -> Tensor:
    return model_mlp(model, "_encoder", obs, "simnorm")


def following(model: Params, z: Tensor, a: Tensor) -> Tensor:
    return model_mlp(model, "_dynamics", torch.cat([z, a], -1), "simnorm")


def reward_of(model: Params, z: Tensor, a: Tensor) -> Tensor:
    return model_mlp(model, "_reward", torch.cat([z, a], -1), "linear")[..., 0]


def values_of(critic: Params, z: Tensor) -> Tensor:
    """Of every member, ``[E, ...]``."""
    tensors = list(critic.values())
    return torch.stack(
        [policy_mlp([p[i] for p in tensors], z)[..., 0] for i in range(len(tensors[0]))]
    )


# --- losses ---------------------------------------------------------------------------------------


def world_model_loss(
    model: Params, obs: Tensor, action: Tensor, reward: Tensor, rewards: Statistics
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, dynamics and reward loss of windows whose observations are normalised already."""
    horizon = len(action)
    with torch.no_grad():
        target = encode(model, obs[1:])
    wanted = rewards.normalize(reward)
    z = encode(model, obs[0])
    dynamics, errors = torch.zeros_like(z[0, 0]), []
    for t in range(horizon):
        errors.append(GAMMA**t * (reward_of(model, z, action[t]) - wanted[t]).square())
        z = following(model, z, action[t])
        dynamics = dynamics + GAMMA**t * (z - target[t]).square().mean()
    reward_loss = torch.stack(errors).mean()  # over the steps, too
    return (dynamics + reward_loss) / horizon, dynamics / horizon, reward_loss / horizon


class Imagined(NamedTuple):
    """Latents ``[H+1, B, D]``, rewards ``[H, B]`` and the returns ``[B]`` of the actor's loss."""

    z: Tensor
    reward: Tensor
    returns: Tensor


def imagine(model: Params, actor: Params, critic: Params, obs: Tensor, noise: Tensor) -> Imagined:
    """From observations that are normalised already; the policy sees detached latents."""
    z = encode(model, obs)
    latents, rewards = [z], []
    mu_net = [p for name, p in actor.items() if name != "logstd"]
    std = actor["logstd"].clip(min=MIN_LOGSTD).exp()
    returns = torch.zeros_like(z[:, 0])
    for t, eps in enumerate(noise):
        a = torch.tanh(policy_mlp(mu_net, z.detach()) + std * eps)
        rewards.append(reward_of(model, z, a))
        returns = returns + GAMMA**t * rewards[-1]
        z = following(model, z, a)
        latents.append(z)
    returns = returns + GAMMA ** (len(noise) + 1) * values_of(critic, z).amin(0)
    return Imagined(torch.stack(latents), torch.stack(rewards), returns)


def actor_loss(returns: Tensor) -> Tensor:
    """Of the first update: the variance is that of these returns."""
    detached = returns.detach()
    variance = (detached - detached.mean()).square().mean()
    return -returns.mean() / (variance + EPS).sqrt()


def critic_targets(critic: Params, z: Tensor, reward: Tensor, online: bool = True) -> Tensor:
    """``[H, B]``; offline an episode counts as ended at every step, so only one step is left."""
    with torch.no_grad():
        value = values_of(critic, z).amin(0)
        if not online:
            return reward + GAMMA * value[1:]
        target, targets = value[-1], []
        for t in reversed(range(len(reward))):
            target = reward[t] + GAMMA * ((1 - LAMBDA) * value[t + 1] + LAMBDA * target)
            targets.append(target)
        return torch.stack(targets[::-1])


def train_critics(
    critic: Params, adam: Adam, z: Tensor, targets: Tensor
) -> tuple[Params, list[Tensor]]:
    """All passes over states ``[H, B, D]`` in time order: parameters, and each minibatch's loss."""
    states, wanted = z.flatten(0, 1).detach(), targets.flatten()
    size = -(-len(states) // MINIBATCHES)
    losses = []
    for _ in range(PASSES):
        for i in range(0, len(states), size):
            critic = leaves(critic, states.dtype)
            error = values_of(critic, states[i : i + size]) - wanted[i : i + size]
            losses.append(error.square().mean())
            critic = adam.step(critic, gradients(losses[-1], critic))
    return critic, losses
