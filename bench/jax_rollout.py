"""The imagined rollout in JAX: plain ``jit``, or with diffrax as its integrator.

Written from the formulas as :mod:`bench.published` is, with a scan over the macro steps. Reward and
critics run once over all states, which JAX users would do too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.providers import Absent
from pwm_fast.agent import PWM
from pwm_fast.ops import Flow, Layer

# Before JAX is imported: else it takes three quarters of the GPU's memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

Result = tuple[Tensor, Tensor, Tensor, list[Tensor]]


class Work(NamedTuple):
    """A rollout.

    Attributes:
        call: rolls out and waits for the result.
        result: calls; rewards ``[H, B]``, values ``[B]``, the last latent ``[B, D]`` and the
            gradients, as torch tensors on the CPU.
    """

    call: Callable[[], Any]
    result: Callable[[], Result]


def rollout(
    name: str, agent: PWM, z: Tensor, noise: Tensor, *, gamma: float, gradient: bool
) -> Work:
    """The rollout, compiled at its first call.

    Args:
        name: ``jax``, ``jax_bf16`` (operands of GEMMs in bf16, sums in float32) or ``diffrax``.
        agent: whose networks and configuration.
        z: ``[B, D]``.
        noise: ``[H, B, A]``.
        gamma: discount.
        gradient: towards the actor's parameters, of minus the mean return.

    Raises:
        Absent: JAX or diffrax is not installed, or JAX sees no GPU where the tensors are on one.
    """
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise Absent(f"JAX is not installed: {error}") from error
    if name == "diffrax":
        try:
            import diffrax
        except ImportError as error:
            raise Absent(f"diffrax is not installed: {error}") from error
    kind = "gpu" if z.device.type == "cuda" else "cpu"
    try:
        device = jax.devices(kind)[0]
    except RuntimeError as error:
        raise Absent(f"JAX has no {kind}: {str(error).splitlines()[0]}") from error

    dynamics = agent.world_model.dynamics()
    if not isinstance(dynamics, Flow) or dynamics.project:
        raise Absent("the JAX rollout is written for flow dynamics without projection")
    heads, value = agent.world_model.heads(), agent.critic.layers()
    detach = agent.config.actor.detach

    def array(x: Tensor) -> Any:
        return jax.device_put(np.asarray(x.detach().cpu()), device)

    def stack(layers: Sequence[Layer]) -> list[dict[str, Any]]:
        found = []
        for p in layers:
            names = ("weight", "bias", "ln_weight", "ln_bias")
            found.append({n: array(x) for n in names if (x := getattr(p, n)) is not None})
        return found

    def product(x: Any, w: Any) -> Any:
        """``x w^T``."""
        if name == "jax_bf16":
            x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        return jnp.matmul(x, w.T, preferred_element_type=jnp.float32)

    def norm(x: Any, p: dict[str, Any], eps: float) -> Any:
        mean = x.mean(-1, keepdims=True)
        var = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + eps) * p["ln_weight"] + p["ln_bias"]

    def mish(x: Any) -> Any:
        return x * jnp.tanh(jax.nn.softplus(x))

    def normed(specs: Sequence[Layer], params: list[dict[str, Any]], x: Any) -> Any:
        for spec, p in zip(specs, params, strict=True):
            x = product(x, p["weight"]) + p["bias"]
            if "ln_weight" in p:
                x = norm(x, p, spec.eps)
            if spec.act == "mish":
                x = mish(x)
            elif spec.act == "simnorm":
                groups = x.reshape(*x.shape[:-1], -1, spec.simnorm_dim)
                x = jax.nn.softmax(groups, axis=-1).reshape(x.shape)
        return x

    def act_norm(specs: Sequence[Layer], params: list[dict[str, Any]], x: Any) -> Any:
        for spec, p in zip(specs, params, strict=True):
            x = product(x, p["weight"]) + p["bias"]
            if spec.act == "mish":
                x = mish(x)
            if "ln_weight" in p:
                x = norm(x, p, spec.eps)
        return x

    def velocity(tau: Any, state: Any, net: list[dict[str, Any]], a: Any) -> Any:
        column = jnp.full((*state.shape[:-1], 1), tau, state.dtype)
        return normed(dynamics.net, net, jnp.concatenate([state, a, column], -1))

    def integrate(state: Any, a: Any, net: list[dict[str, Any]]) -> Any:
        dt = 1.0 / dynamics.substeps
        if name == "diffrax":
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: velocity(t, y, *args)),
                diffrax.Heun() if dynamics.method == "heun" else diffrax.Euler(),
                t0=0.0,
                t1=1.0,
                dt0=dt,
                y0=state,
                args=(net, a),
                saveat=diffrax.SaveAt(t1=True),
                max_steps=dynamics.substeps + 1,
            )
            return solution.ys[0]
        for k in range(dynamics.substeps):
            k1 = velocity(k * dt, state, net, a)
            if dynamics.method == "euler":
                state = state + dt * k1
            else:
                k2 = velocity((k + 1) * dt, state + dt * k1, net, a)
                state = state + 0.5 * dt * (k1 + k2)
        return state

    policy = agent.actor.policy()
    specs = {"policy": policy.layers, "reward": heads.reward, "value": value}
    frozen = {"net": stack(dynamics.net), "reward": stack(heads.reward), "value": stack(value)}
    learnt = {"policy": stack(policy.layers), "logstd": array(agent.actor.logstd)}
    smallest = agent.actor.min_logstd
    bins = jnp.linspace(heads.vmin, heads.vmax, heads.reward[-1].weight.shape[0])

    def roll(learnt: dict[str, Any], frozen: dict[str, Any], z: Any, noise: Any) -> Any:
        std = jnp.exp(jnp.maximum(learnt["logstd"], smallest))

        def step(state: Any, eps: Any) -> tuple[Any, tuple[Any, Any]]:
            seen = jax.lax.stop_gradient(state) if detach else state
            a = jnp.tanh(act_norm(specs["policy"], learnt["policy"], seen) + std * eps)
            return integrate(state, a, frozen["net"]), (state, a)

        last, (states, actions) = jax.lax.scan(step, z, noise)
        logits = normed(specs["reward"], frozen["reward"], jnp.concatenate([states, actions], -1))
        expected = (jax.nn.softmax(logits, axis=-1) * bins).sum(-1)
        reward = jnp.sign(expected) * jnp.expm1(jnp.abs(expected))
        values = jax.vmap(lambda p: act_norm(specs["value"], p, last)[..., 0])(frozen["value"])
        values = values.min(0)
        discount = gamma ** jnp.arange(noise.shape[0])
        returns = (discount[:, None] * reward).sum(0) + gamma ** noise.shape[0] * values
        return -returns.mean(), (reward, values, last)

    compiled = jax.jit(jax.value_and_grad(roll, has_aux=True) if gradient else roll)
    start, noises = array(z), array(noise)
    order = _parameters(agent)

    def tensors(found: Any) -> list[Tensor]:
        return [torch.from_numpy(np.array(x)) for x in found]

    def call() -> Any:
        return jax.block_until_ready(compiled(learnt, frozen, start, noises))

    def result() -> Result:
        found = call()
        grads: list[Tensor] = []
        if gradient:
            (_, (reward, values, last)), tree = found
            grads = tensors(_pick(tree, path) for path in order)
        else:
            _, (reward, values, last) = found
        return (*tensors((reward, values, last)), grads)  # type: ignore[return-value]

    return Work(call, result)


def _parameters(agent: PWM) -> list[tuple[Any, ...]]:
    """Where each of ``actor.parameters()`` stands in the tree of learnt arrays."""
    places: dict[int, tuple[Any, ...]] = {id(agent.actor.logstd): ("logstd",)}
    for i, layer in enumerate(agent.actor.policy().layers):
        for name in ("weight", "bias", "ln_weight", "ln_bias"):
            if getattr(layer, name) is not None:
                places[id(getattr(layer, name))] = ("policy", i, name)
    return [places[id(p)] for p in agent.actor.parameters()]


def _pick(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
