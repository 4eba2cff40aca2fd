"""Modules in the manner of TD-MPC2 and PWM, and others that only look like them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import functorch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

# --- TD-MPC2's manner -----------------------------------------------------------------------------


class SimNorm(nn.Module):
    """Softmax over groups; the group width comes in a configuration."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dim = width

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(*x.shape[:-1], x.shape[-1] // self.dim, self.dim)
        return groups.softmax(-1).reshape(x.shape)


class NormedLinear(nn.Linear):
    """Linear with an optional dropout, LayerNorm and activation."""

    def __init__(
        self,
        k: int,
        n: int,
        *,
        act: nn.Module | None = None,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__(k, n, bias=bias)
        self.ln = nn.LayerNorm(n)
        self.act = nn.Mish(inplace=False) if act is None else act
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.dropout is not None:
            x = self.dropout(x)
        return self.act(self.ln(x))


def mlp(
    k: int, units: Sequence[int], n: int, *, act: nn.Module | None = None, dropout: float = 0.0
) -> nn.Sequential:
    """Dropout in the first layer alone; the last is plain unless it has an activation."""
    widths = [k, *units]
    layers: list[nn.Module] = [
        NormedLinear(i, o, dropout=dropout * (j == 0)) for j, (i, o) in enumerate(pairwise(widths))
    ]
    last = nn.Linear(widths[-1], n) if act is None else NormedLinear(widths[-1], n, act=act)
    return nn.Sequential(*layers, last)


class TdMpc2World(nn.Module):
    """Encoders by kind of observation, dynamics, reward, policy and an ensemble of values."""

    def __init__(self, obs: int = 10, action: int = 3, latent: int = 16, task: int = 4) -> None:
        super().__init__()
        self._task_emb = nn.Embedding(5, task, max_norm=1)
        self._encoder = nn.ModuleDict({"state": mlp(obs + task, [20], latent, act=SimNorm(8))})
        pair = latent + task + action
        self._dynamics = mlp(pair, [24, 24], latent, act=SimNorm(8))
        self._reward = mlp(pair, [24, 24], 101)
        self._pi = mlp(latent + task, [24, 24], 2 * action)
        self._Qs = nn.ModuleList(mlp(pair, [24, 24], 101, dropout=0.01) for _ in range(2))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self._reward[-1].weight)

    def forward(self, obs: Tensor, action: Tensor, task: Tensor) -> dict[str, Tensor]:
        e = self._task_emb(task)
        z = self._encoder["state"](torch.cat([obs, e], -1))
        za = torch.cat([z, e, action], -1)
        return {
            "z": z,
            "next": self._dynamics(za),
            "reward": self._reward(za),
            "pi": self._pi(torch.cat([z, e], -1)),
            "q": torch.stack([q(za) for q in self._Qs]),
        }


# --- functional ensembles, whose parameters are stacked -------------------------------------------


class Stacked(nn.Module):
    """A nested dictionary of stacked parameters, which it can put into a module for a while."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        super().__init__()
        self._keys = [*tensors]
        for key, x in tensors.items():
            setattr(self, f"_{key}", Stacked(x) if isinstance(x, dict) else nn.Parameter(x))

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return getattr(self, f"_{key}")

    def keys(self) -> list[str]:
        return self._keys

    def tree(self) -> dict[str, Any]:
        """The tensors as torch.vmap takes them."""
        found = {key: self[key] for key in self._keys}
        return {key: x.tree() if isinstance(x, Stacked) else x for key, x in found.items()}


def nested(module: nn.Module, members: Sequence[nn.Module]) -> dict[str, Any]:
    own: dict[str, Any] = {
        key: torch.stack([x.get_parameter(key).detach() for x in members])
        for key, p in module._parameters.items()
        if p is not None
    }
    for name, child in module.named_children():
        inner = nested(child, [x.get_submodule(name) for x in members])
        if inner:
            own[name] = inner
    return own


def put(module: nn.Module, key: str, x: Tensor) -> None:
    """In place of a parameter, or of a plain attribute."""
    if key in module._parameters:
        module._parameters[key] = x  # type: ignore[assignment]
    else:
        setattr(module, key, x)


@contextmanager
def put_into(module: nn.Module, tensors: dict[str, Any]) -> Iterator[None]:
    before = {key: getattr(module, key) for key, x in tensors.items() if not isinstance(x, dict)}
    with ExitStack() as stack:
        for key, x in tensors.items():
            if isinstance(x, dict):
                stack.enter_context(put_into(module.get_submodule(key), x))
            else:
                put(module, key, x)
        try:
            yield
        finally:
            for key, x in before.items():
                put(module, key, x)


def without_parameters(module: nn.Module) -> nn.Module:
    """With plain attributes in their place."""
    for part in module.modules():
        for key, p in [*part._parameters.items()]:
            if p is not None:
                del part._parameters[key]
                setattr(part, key, p.detach())
    return module


class TdMpc2Ensemble(nn.Module):
    """In the manner of TD-MPC2 since 2025.

    ``whole``: the module has the shapes of all members. ``bare``: it has plain attributes in place
    of parameters, as with tensordict before 0.14.
    """

    def __init__(
        self, members: Sequence[nn.Module], *, whole: bool = False, bare: bool = False
    ) -> None:
        super().__init__()
        self.params = Stacked(nested(members[0], members))
        self.module = copy.deepcopy(members[0])
        if whole:
            for name, x in [*stack_module_state(list(members))[0].items()]:  # type: ignore[arg-type]
                path, _, key = name.rpartition(".")
                self.module.get_submodule(path)._parameters[key] = nn.Parameter(x.detach())
        self.module.to("meta")
        if bare:
            without_parameters(self.module)

    def one(self, params: dict[str, Any], x: Tensor) -> Tensor:
        with put_into(self.module, params):
            return self.module(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.one, (0, None), randomness="different")(self.params.tree(), x)


class FunctorchEnsemble(nn.Module):
    """In the manner of PWM, and of TD-MPC2 before: functorch keeps the module."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        one, params, _ = functorch.combine_state_for_ensemble(nn.ModuleList(members))
        self.run = torch.vmap(one, in_dims=(0, 0, None), randomness="different")
        self.params = nn.ParameterList([nn.Parameter(p) for p in params])

    def forward(self, x: Tensor) -> Tensor:
        return self.run([*self.params], (), x)


class FuncEnsemble(nn.Module):
    """In the manner of torch.func's documentation; ``where`` the module is kept."""

    def __init__(self, members: Sequence[nn.Module], where: str = "child") -> None:
        super().__init__()
        params, _ = stack_module_state(list(members))  # type: ignore[arg-type]
        self.names = [*params]
        self.params = nn.ParameterList([nn.Parameter(params[name]) for name in self.names])
        base = copy.deepcopy(members[0]).to("meta")
        if where == "child":
            self.base = base
        elif where == "attribute":
            self.__dict__["base"] = base  # its parameters are none of this module's
        else:
            self.hidden = lambda: base

    def forward(self, x: Tensor) -> Tensor:
        base = self.hidden() if "hidden" in self.__dict__ else self.base
        params = dict(zip(self.names, self.params, strict=True))
        one = lambda p: functional_call(base, p, (x,))  # noqa: E731
        return torch.vmap(one, randomness="different")(params)


# --- PWM's manner ---------------------------------------------------------------------------------


SHARED_MISH = nn.Mish(inplace=True)


class PwmNormedLinear(nn.Linear):
    """All layers share one activation module."""

    def __init__(self, k: int, n: int, act: nn.Module = SHARED_MISH) -> None:
        super().__init__(k, n)
        self.ln = nn.LayerNorm(n)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.ln(super().forward(x)))


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def act_norm(
    k: int, units: Sequence[int], n: int, *, end: nn.Module | None = None
) -> nn.Sequential:
    """Linear, Mish, LayerNorm, as actors and critics have them."""
    layers: list[nn.Module] = []
    for width in units:
        layers += [nn.Linear(k, width), nn.Mish(), nn.LayerNorm(width)]
        k = width
    layers.append(nn.Linear(k, n))
    return nn.Sequential(*layers, *([] if end is None else [end]))


class PwmActor(nn.Module):
    def __init__(self, latent: int = 16, action: int = 3) -> None:
        super().__init__()
        self.mu_net = act_norm(latent, [20, 12, 8], action, end=Identity())
        self.logstd = nn.Parameter(torch.full((action,), -1.0))

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.mu_net(z))


class PwmCritics(nn.Module):
    def __init__(self, latent: int = 16) -> None:
        super().__init__()
        self.members = nn.ModuleList(act_norm(latent, [20, 12], 1) for _ in range(3))

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([m(z) for m in self.members]).amin(0)


class PwmWorld(nn.Module):
    def __init__(self, obs: int = 10, action: int = 3, latent: int = 16) -> None:
        super().__init__()
        self._encoder = nn.Sequential(
            PwmNormedLinear(obs, 20), PwmNormedLinear(20, latent, act=SimNorm(8))
        )
        self._velocity = nn.Sequential(
            PwmNormedLinear(latent + action + 1, 22), PwmNormedLinear(22, 22), nn.Linear(22, latent)
        )
        self._reward = nn.Sequential(
            PwmNormedLinear(latent + action, 20), PwmNormedLinear(20, 20), nn.Linear(20, 101)
        )

    def forward(self, obs: Tensor, action: Tensor) -> dict[str, Tensor]:
        z = self._encoder(obs)
        tau = torch.full_like(z[..., :1], 0.5)
        return {
            "v": self._velocity(torch.cat([z, action, tau], -1)),
            "reward": self._reward(torch.cat([z, action], -1)),
        }


# --- what only looks like them --------------------------------------------------------------------


class ActThenNorm(NormedLinear):
    """The other order."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.act(F.linear(x, self.weight, self.bias)))


class NormTwice(NormedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.ln(self.ln(F.linear(x, self.weight, self.bias))))


class Detached(NormedLinear):
    """The same values with another gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach() + 0.5 * (x - x.detach()))


class FrozenScale(NormedLinear):
    """The LayerNorm's scale gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight, self.bias)
        h = F.layer_norm(h, h.shape[-1:], self.ln.weight.detach(), self.ln.bias, self.ln.eps)
        return self.act(h)


class OtherEpsilon(NormedLinear):
    """An epsilon that is not the LayerNorm's."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight, self.bias)
        return self.act(F.layer_norm(h, h.shape[-1:], self.ln.weight, self.ln.bias, 1e-3))


class NoiseInTraining(NormedLinear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 0.1 * torch.randn_like(y) if self.training else y


class OtherInEvaluation(NormedLinear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.training else y.clamp(-1.0, 1.0)


class DropsLater(NormedLinear):
    """Its dropout comes after the activation."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.ln(F.linear(x, self.weight, self.bias)))
        return y if self.dropout is None else self.dropout(y)


class DropsAlways(NormedLinear):
    """In evaluation mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight, self.bias)
        return self.act(self.ln(F.dropout(h, 0.0 if self.dropout is None else self.dropout.p)))


class Clipped(NormedLinear):
    """The same for inputs of ordinary size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-20.0, 20.0))


class InFloat32(NormedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float().to(x.dtype))


class Residual(NormedLinear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + x if y.shape == x.shape else y


class FunctionAct(nn.Linear):
    """Its activation is a function."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        self.ln = nn.LayerNorm(n)
        self.act = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.ln(super().forward(x)))


class Keeps(NormedLinear):
    """Others may read what it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = super().forward(x)
        return self.hidden


class Transposed(nn.Module):
    """Its weight lies the other way, and comes second."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n))
        self.weight = nn.Parameter(torch.randn(k, n))
        self.ln = nn.LayerNorm(k)
        self.act = nn.Mish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.layer_norm(x @ self.weight + self.bias, self.bias.shape))


class NoLinear(nn.Module):
    """A NormedLinear that is no nn.Linear."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n))
        self.weight = nn.Parameter(torch.randn(n, k))
        self.ln = nn.LayerNorm(n)
        self.act = nn.Mish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.ln(x @ self.weight.mT + self.bias))


class ComputedWeight(nn.Linear):
    """Its weight is no parameter."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        del self._parameters["weight"]
        self.weight = torch.randn(n, k)


class OwnBuffer(NormedLinear):
    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        self.register_buffer("steps", torch.zeros(()))


class Gated(NormedLinear):
    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        self.gate = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate


class LowRank(nn.Linear):
    """A Linear with an addend that is 0 at first."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        self.down = nn.Linear(k, 2, bias=False)
        self.up = nn.Linear(2, n, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class Standardized(nn.Linear):
    """Its weight is standardised before use."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, w / w.norm(dim=1, keepdim=True), self.bias)


class Fails(NormedLinear):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not for this input")


class Uncopyable(NormedLinear):
    def __deepcopy__(self, memo: dict) -> Uncopyable:
        raise RuntimeError("this holds a socket")


class Swish(nn.Module):
    """Close to Mish, but another function."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Scaled(nn.Module):
    """A SimNorm with a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 8

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(*x.shape[:-1], -1, self.dim)
        return (groups / 2.0).softmax(-1).reshape(x.shape)


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(x * self.slope)


class OwnMish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(F.softplus(x))


class OwnStack(nn.Sequential):
    """A subclass may do anything."""


def changed(stack: nn.Sequential, change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    change(stack)
    return stack
