"""Modules around the operations of :mod:`pwm_fast.ops`, with the published parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.ops import Activation, Layer


class Mish(nn.Module):
    """Mish as a module; it has no parameters, so it can stand where ``nn.Mish`` stood."""

    def forward(self, x: Tensor) -> Tensor:
        """``[...] -> [...]``."""
        return ops.mish(x)


class NormedLinear(nn.Linear):
    """Linear, LayerNorm, activation; parameters ``weight``, ``bias``, ``ln.weight``, ``ln.bias``.

    Args:
        in_features: K.
        out_features: N.
        act: ``"mish"``, ``"simnorm"`` or ``"none"``.
        simnorm_dim: group width for ``act="simnorm"``.
    """

    def __init__(
        self, in_features: int, out_features: int, act: Activation = "mish", simnorm_dim: int = 8
    ) -> None:
        super().__init__(in_features, out_features)
        if act == "simnorm" and out_features % simnorm_dim:
            raise ValueError(
                f"out_features={out_features} is no multiple of simnorm_dim={simnorm_dim}"
            )
        self.ln = nn.LayerNorm(out_features, eps=1e-5)
        self.act: Activation = act
        self.simnorm_dim = simnorm_dim

    def layer(self) -> Layer:
        """The parameters as the operations take them."""
        return Layer(
            self.weight,
            self.bias,
            self.ln.weight,
            self.ln.bias,
            self.act,
            self.simnorm_dim,
            self.ln.eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K] -> [..., N]``."""
        return ops.linear_norm_act(x, self.layer())

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{super().extra_repr()}, act={self.act}"


class MLP(nn.Sequential):
    """NormedLinear layers and a last layer, over logically concatenated inputs."""

    def layers(self) -> tuple[Layer, ...]:
        """Parameters of every layer, as the operations take them."""
        return tuple(
            m.layer() if isinstance(m, NormedLinear) else Layer(m.weight, m.bias)  # type: ignore[arg-type]
            for m in self
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """``[..., K_i]`` each, widths adding up to K, to ``[..., N]``."""
        return ops.mlp(inputs, self.layers())


def mlp(
    in_features: int, units: Sequence[int], out_features: int, last: Activation | None = None
) -> MLP:
    """An MLP of NormedLinear(Mish) layers; ``last=None`` ends in a plain Linear."""
    widths = [in_features, *units]
    modules: list[nn.Module] = [NormedLinear(k, n) for k, n in pairwise(widths)]
    if last is None:
        modules.append(nn.Linear(widths[-1], out_features))
    else:
        modules.append(NormedLinear(widths[-1], out_features, act=last))
    return MLP(*modules)


@torch.no_grad()
def init_world_model_(module: nn.Module) -> None:
    """TD-MPC2's initialisation: truncated normal weights of std 0.02, zero biases."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def act_norm_mlp(
    in_features: int,
    units: Sequence[int],
    out_features: int,
    gain: float | None,
    input_gain: float = 1.0,
) -> nn.Sequential:
    """The actor's and critics' MLP: Linear, Mish, LayerNorm layers and a last Linear.

    Weights are orthogonal of that gain and biases zero; with ``gain=None`` both are as
    ``torch.nn.Linear`` draws them. The first layer's weights are multiplied by ``input_gain``.
    """
    modules: list[nn.Module] = []
    width = in_features
    for n in units:
        modules += [nn.Linear(width, n), Mish(), nn.LayerNorm(n)]
        width = n
    net = nn.Sequential(*modules, nn.Linear(width, out_features))
    if gain is not None:
        init_orthogonal_(net, gain, input_gain)
    else:
        first = net[0]
        assert isinstance(first, nn.Linear)
        with torch.no_grad():
            first.weight.mul_(input_gain)
    return net


def act_norm_layers(net: nn.Sequential) -> list[Layer]:
    """The parameters of an :func:`act_norm_mlp` as the operations take them."""
    linears = [m for m in net if isinstance(m, nn.Linear)]
    norms = [m for m in net if isinstance(m, nn.LayerNorm)]
    *hidden, last = linears
    layers = [
        Layer(linear.weight, linear.bias, norm.weight, norm.bias, act="mish", eps=norm.eps)
        for linear, norm in zip(hidden, norms, strict=True)
    ]
    return [*layers, Layer(last.weight, last.bias)]


@torch.no_grad()
def init_orthogonal_(module: nn.Module, gain: float, input_gain: float = 1.0) -> None:
    """Orthogonal weights of that gain (the first layer's times ``input_gain``), zero biases."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    for i, m in enumerate(linears):
        nn.init.orthogonal_(m.weight, gain if i else gain * input_gain)
        nn.init.zeros_(m.bias)
