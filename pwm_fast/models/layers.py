"""Modules around the operations of :mod:`pwm_fast.ops`, with the published parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.config import WorldModelConfig
from pwm_fast.hooks import hooked, hooked_everywhere, why_not_itself
from pwm_fast.ops import Activation, Layer, Order

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


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
        ln: Any = self._modules["ln"]
        weight, bias = parameters(self)
        ln_weight, ln_bias = parameters(ln)
        return Layer(weight, bias, ln_weight, ln_bias, self.act, self.simnorm_dim, ln.eps)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K] -> [..., N]``."""
        if not hooked_everywhere() and why_no_norm(self.ln) is None:
            return ops.linear_norm_act(x, self.layer())
        x = self.ln(F.linear(x, self.weight, self.bias))
        if self.act == "simnorm":
            return ops.simnorm(x, self.simnorm_dim)
        return ops.mish(x) if self.act == "mish" else x

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{super().extra_repr()}, act={self.act}"


def parameters(module: Any) -> tuple[Tensor, Tensor]:
    """A module's weight and bias; ``nn.Module.__getattr__`` takes longer than all else here."""
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or bias is None:  # parametrized, perhaps
        return module.weight, module.bias
    return weight, bias


def why_no_norm(module: nn.Module | None) -> str | None:
    """Why a module is not the LayerNorm that the operations compute; None if it is."""
    if not isinstance(module, nn.LayerNorm):
        return "is no LayerNorm"
    weight, bias = parameters(module)
    if weight is None or bias is None or len(module.normalized_shape) != 1:
        return "is a LayerNorm without weight and bias of one axis"
    return why_not_itself(module, nn.LayerNorm.forward)


def _nothing(module: nn.Module) -> bool:
    """Whether a module returns its input."""
    if isinstance(module, _DROPOUTS):
        return module.p == 0.0 or not module.training
    return isinstance(module, nn.Identity)


class Skipped(ValueError):
    """A network cannot run as one operation: it would skip what a module of it does."""


def taken_apart(net: nn.Module, order: Order, root: bool) -> list[Layer]:
    """The layers of a network as the operations take them.

    Args:
        net: an :class:`MLP` (``norm_act``) or an :func:`act_norm_mlp`.
        order: of its LayerNorms and activations.
        root: the network itself is not called either, so its hooks count as well.

    Raises:
        Skipped: it has hooks, or modules that the operations do not know.
    """
    if root and hooked(net):
        raise Skipped(f"{type(net).__name__} has hooks, {ADVICE}")
    layers: list[Layer] = []
    parts: list[tuple[str, nn.Module]] = []
    for name, module in net._modules.items():
        if module is None:
            continue
        known = isinstance(module, (nn.Linear, nn.LayerNorm, Mish))
        if not known and not hooked(module) and _nothing(module):
            continue
        if order == "norm_act":
            layers.append(_norm_act_layer(name, module))
        else:
            parts.append((name, module))
    return _act_norm_layers(parts) if order == "act_norm" else layers


ADVICE = (
    "which one operation for the whole network would skip: take them off, or call the network's "
    "modules themselves"
)


def _skipped(name: str, module: nn.Module | None, reason: str) -> Skipped:
    return Skipped(f"layer {name} ({type(module).__name__}) {reason}, {ADVICE}")


def _linear_layer(name: str, module: nn.Module) -> Layer:
    if hooked(module):
        raise _skipped(name, module, "has hooks")
    if not isinstance(module, nn.Linear):
        rate = f" with p={module.p} in training mode" if isinstance(module, _DROPOUTS) else ""
        raise _skipped(name, module, f"is no layer that the operations know{rate}")
    reason = why_not_itself(module, nn.Linear.forward)
    if reason is not None:
        raise _skipped(name, module, reason)
    return Layer(*parameters(module))


def _norm_act_layer(name: str, module: nn.Module) -> Layer:
    if not isinstance(module, NormedLinear):
        return _linear_layer(name, module)
    reason = why_not_itself(module, NormedLinear.forward)
    if reason is not None:
        raise _skipped(name, module, reason)
    ln = module._modules["ln"]
    reason = why_no_norm(ln)
    if reason is not None:
        raise _skipped(f"{name}.ln", ln, reason)
    return module.layer()


def _act_norm_layers(parts: list[tuple[str, nn.Module]]) -> list[Layer]:
    """Linear, Mish, LayerNorm in a row, and a last Linear."""
    layers: list[Layer] = []
    rest = iter(parts)
    for part in rest:
        layer = _linear_layer(*part)
        name, act = next(rest, ("", None))
        if act is None:
            return [*layers, layer]
        reason = _why_no_mish(act)
        if reason is not None:
            raise _skipped(name, act, reason)
        name, norm = next(rest, (name, None))
        reason = "is not followed by a LayerNorm" if norm is None else why_no_norm(norm)
        if reason is not None:
            raise _skipped(name, act if norm is None else norm, reason)
        assert norm is not None
        layers.append(Layer(*layer[:2], *parameters(norm), "mish", 8, norm.eps))  # type: ignore[arg-type]
    return layers


def _why_no_mish(module: nn.Module) -> str | None:
    if isinstance(module, Mish):
        return why_not_itself(module, Mish.forward)
    if isinstance(module, nn.Mish):
        return why_not_itself(module, nn.Mish.forward)
    return "has hooks" if hooked(module) else "is no Mish"


def known_layers(net: nn.Module, order: Order, *, root: bool) -> list[Layer] | None:
    """As :func:`taken_apart`; None where the modules have to run themselves, one by one."""
    if hooked_everywhere():
        return None
    try:
        return taken_apart(net, order, root)
    except Skipped:
        return None


class MLP(nn.Sequential):
    """NormedLinear layers and a last layer, over logically concatenated inputs.

    They run as one operation. Where that would skip something (a hook of one of the modules, a
    Dropout in training mode, a module of another kind), they run one after another.
    """

    def layers(self) -> tuple[Layer, ...]:
        """Parameters of every layer, as the operations take them.

        Raises:
            Skipped: a module has hooks, drops something, or is none that the operations know.
        """
        return tuple(taken_apart(self, "norm_act", root=True))

    def forward(self, *inputs: Tensor) -> Tensor:
        """``[..., K_i]`` each, widths adding up to K, to ``[..., N]``."""
        layers = known_layers(self, "norm_act", root=False)
        if layers is not None:
            return ops.mlp(inputs, layers, order="norm_act")
        return super().forward(inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1))


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
    """The parameters of an :func:`act_norm_mlp` as the operations take them.

    Raises:
        Skipped: a module has hooks, drops something, or is none that the operations know.
    """
    return taken_apart(net, "act_norm", root=True)


def run_act_norm(net: nn.Sequential, *inputs: Tensor) -> Tensor:
    """An :func:`act_norm_mlp` as one operation, or one by one where that would skip something.

    The inputs are logically concatenated: ``[..., K_i]`` each.
    """
    layers = known_layers(net, "act_norm", root=True)
    if layers is not None:
        return ops.mlp(inputs, layers, order="act_norm")
    found = net(inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1))
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def init_orthogonal_(module: nn.Module, gain: float, input_gain: float = 1.0) -> None:
    """Orthogonal weights of that gain (the first layer's times ``input_gain``), zero biases."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    for i, m in enumerate(linears):
        nn.init.orthogonal_(m.weight, gain if i else gain * input_gain)
        nn.init.zeros_(m.bias)


def task_width(config: WorldModelConfig, sees: bool | None, key: str) -> int:
    """E for a network beside the world model that sees the task's embedding, 0 for one that not.

    Args:
        config: of the world model, which has the embeddings.
        sees: what was asked for; None is where there are several tasks.
        key: of the configuration, which asked.

    Raises:
        ValueError: it is to see embeddings that the world model does not have.
    """
    if sees and config.task_dim == 0:
        raise ValueError(f"{key} must be false or null where alg.world_model.task_dim is 0")
    return config.task_dim if sees or (sees is None and config.num_tasks > 1) else 0
