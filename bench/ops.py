"""Every public operation, one by one.

An operation is a line in :data:`OPERATIONS`: its inputs, the same thing in plain PyTorch, the
operation itself, and the GEMMs it contains (or else its memory traffic is its floor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import floor, providers, published
from bench.cases import QUICK, Case, Provider, Workload, assemble
from bench.gate import Outputs
from bench.measure import Effort
from bench.sizes import ACTION, HORIZON
from pwm_fast import ops
from pwm_fast.ops import Layer

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Tensor | Sequence[Tensor]]
TITLE = "operation"


class Size(NamedTuple):
    """Widths of a published size: latent, flow units, reward units."""

    latent: int
    units: int
    reward: int


SIZES = {"5M": Size(512, 510, 512), "48M": Size(768, 1788, 1792)}
BINS, MEMBERS, CRITIC = 101, 3, 400
Q_FUNCTIONS, USED = 5, (1, 3)  # TD-MPC2's; two of them, drawn anew each time, are used


class Operation(NamedTuple):
    """One operation.

    Attributes:
        inputs: makes the inputs of a size and batch.
        plain: plain PyTorch.
        ours: the operation.
        gemms: GEMMs of a forward pass, if there are any.
        fixed: inputs towards which no gradient is asked for.
        batches: by size; the first of ``5M`` has all providers.
        differentiable: it is used in training with gradients.
    """

    inputs: Callable[[Size, int, torch.Generator], Inputs]
    plain: Function
    ours: Function
    gemms: Callable[[Size, int], list[floor.Gemm]] | None = None
    fixed: tuple[str, ...] = ()
    batches: Mapping[str, Sequence[int]] = {"5M": (4096,)}
    differentiable: bool = True


def _rows(width: str) -> Callable[[Size, int, torch.Generator], Inputs]:
    def make(size: Size, batch: int, g: torch.Generator) -> Inputs:
        return {"x": torch.randn(batch, getattr(size, width), generator=g)}

    return make


def _layer(
    n: int, k: int, g: torch.Generator, prefix: str, *, norm: bool = True, members: int = 0
) -> Inputs:
    lead = (members,) if members else ()
    values = {
        f"{prefix}.weight": torch.randn(*lead, n, k, generator=g) / k**0.5,
        f"{prefix}.bias": 0.1 * torch.randn(*lead, n, generator=g),
    }
    if norm:
        values[f"{prefix}.ln_weight"] = 1.0 + 0.1 * torch.randn(*lead, n, generator=g)
        values[f"{prefix}.ln_bias"] = 0.1 * torch.randn(*lead, n, generator=g)
    return values


def _layers(inputs: Inputs, last: str = "none") -> list[Layer]:
    """Layers whose parameters are the inputs ``0.weight``, ``0.bias``, ..."""
    count = sum(name.endswith(".weight") for name in inputs)
    found = []
    for i in range(count):
        parts = {n.partition(".")[2]: x for n, x in inputs.items() if n.startswith(f"{i}.")}
        act = "mish" if i < count - 1 else last
        found.append(Layer(**parts, act=act))  # type: ignore[arg-type]
    return found


def _norm_inputs(size: Size, batch: int, g: torch.Generator) -> Inputs:
    n = size.units
    return {
        "x": torch.randn(batch, n, generator=g),
        "weight": 1.0 + 0.1 * torch.randn(n, generator=g),
        "bias": 0.1 * torch.randn(n, generator=g),
    }


def _plain_norm(i: Inputs) -> Tensor:
    y = F.layer_norm(i["x"], i["x"].shape[-1:], i["weight"], i["bias"], 1e-5)
    return F.mish(y, inplace=True)


def _linear_inputs(size: Size, batch: int, g: torch.Generator) -> Inputs:
    return {
        "x": torch.randn(batch, size.units, generator=g),
        **_layer(size.units, size.units, g, "0"),
    }


def _ensemble_inputs(size: Size, batch: int, g: torch.Generator) -> Inputs:
    return {
        "x": torch.randn(batch, size.latent, generator=g),
        **_layer(CRITIC, size.latent, g, "0", members=MEMBERS),
    }


def _plain_ensemble(i: Inputs) -> Tensor:
    layer = _layers(i, "mish")[0]
    tensors = (layer.weight, layer.bias, layer.ln_weight, layer.ln_bias)
    call = lambda w, b, g, s, x: published.act_norm([Layer(w, b, g, s, "mish")], x)  # noqa: E731
    return torch.vmap(call, in_dims=(0, 0, 0, 0, None))(*tensors, i["x"])


def _pair(size: Size, batch: int, g: torch.Generator) -> Inputs:
    return {
        "z": torch.randn(batch, size.latent // 8, 8, generator=g).softmax(-1).flatten(1),
        "a": torch.rand(batch, ACTION, generator=g) * 2 - 1,
    }


def _head_inputs(size: Size, batch: int, g: torch.Generator) -> Inputs:
    wide = size.reward
    return {
        **_pair(size, batch, g),
        **_layer(wide, size.latent + ACTION, g, "0"),
        **_layer(wide, wide, g, "1"),
        **_layer(BINS, wide, g, "2", norm=False),
    }


def _q_inputs(size: Size, batch: int, g: torch.Generator) -> Inputs:
    wide = size.reward
    return {
        **_pair(size, batch, g),
        **_layer(wide, size.latent + ACTION, g, "0", members=Q_FUNCTIONS),
        **_layer(wide, wide, g, "1", members=Q_FUNCTIONS),
        **_layer(BINS, wide, g, "2", norm=False, members=Q_FUNCTIONS),
    }


def _plain_q(i: Inputs) -> Tensor:
    x = torch.cat([i["z"], i["a"]], dim=-1)
    return published.ensemble(published.normed, _layers(i), x)


def _q_gemms(size: Size, batch: int, members: int) -> list[floor.Gemm]:
    sizes = [size.latent + ACTION, size.reward, size.reward, BINS]
    return floor.stack(batch, sizes, members=members)


def _field_inputs(size: Size, batch: int, g: torch.Generator) -> Inputs:
    return {
        **_pair(size, batch, g),
        **_layer(size.units, size.latent + ACTION + 1, g, "0"),
        **_layer(size.units, size.units, g, "1"),
        **_layer(size.latent, size.units, g, "2", norm=False),
    }


def _rollout_inputs(size: Size, batch: int, g: torch.Generator) -> Inputs:
    inputs = _field_inputs(size, batch, g)
    # A gentle field: 16 macro steps of a strong one would only measure its growth.
    inputs["2.weight"] *= 0.1
    return {**inputs, "a": torch.rand(HORIZON, batch, ACTION, generator=g) * 2 - 1}


def _field_gemms(size: Size, batch: int) -> list[floor.Gemm]:
    sizes = [size.latent, size.units, size.units, size.latent]
    return [*floor.stack(batch, sizes), floor.Gemm(batch, ACTION, size.units)]


def _flow_gemms(size: Size, batch: int, steps: int = 1) -> list[floor.Gemm]:
    inner = size.latent + ACTION + 1
    shapes = [(size.units, inner), (size.units, size.units), (size.latent, size.units)]
    net = [Layer(torch.empty(shape)) for shape in shapes]
    sequential = floor.dynamics_gemms(ops.Flow(net), size.latent, batch, steps)
    return [*sequential, floor.Gemm(batch * steps, ACTION, size.units)]


def _plain_latents(i: Inputs) -> Tensor:
    z, flow = i["z"], ops.Flow(_layers(i))
    latents = [z]
    for a in i["a"]:
        z = published.next_latent(flow, z, a)
        latents.append(z)
    return torch.stack(latents)


def _project(x: Tensor) -> Tensor:
    groups = torch.clamp(x.view(*x.shape[:-1], -1, 8), min=0.0)
    return (groups / groups.sum(-1, keepdim=True).clamp(min=1e-6)).view(x.shape)


def _softmax_groups(x: Tensor) -> Tensor:
    return F.softmax(x.view(*x.shape[:-1], -1, 8), dim=-1).view(x.shape)


def _logits(size: Size, batch: int, g: torch.Generator) -> Inputs:
    return {
        "logits": torch.randn(batch, BINS, generator=g),
        "x": 10.0 * torch.randn(batch, generator=g),
    }


def _returns(size: Size, batch: int, g: torch.Generator) -> Inputs:
    return {
        "reward": torch.randn(HORIZON, batch, generator=g),
        "value": torch.randn(HORIZON + 1, batch, generator=g),
    }


def _path(size: Size, batch: int, g: torch.Generator) -> Inputs:
    return {
        "z0": torch.randn(batch, size.latent, generator=g),
        "z1": torch.randn(batch, size.latent, generator=g),
        "tau": torch.rand(batch, generator=g),
    }


def _plain_path(i: Inputs) -> tuple[Tensor, Tensor]:
    tau = i["tau"].unsqueeze(-1)
    return (1 - tau) * i["z0"] + tau * i["z1"], i["z1"] - i["z0"]


def _spiral(z: Tensor, tau: float) -> Tensor:
    return torch.tanh(z) * (0.5 - tau)


def _plain_integral(i: Inputs) -> Tensor:
    z = i["x"]
    for k in range(2):
        k1 = _spiral(z, k / 2)
        k2 = _spiral(z + 0.5 * k1, (k + 1) / 2)
        z = z + 0.25 * (k1 + k2)
    return z


# Sizes and batches that users have, for what the time goes into.
MANY = {"5M": (512, 64, 4096), "48M": (512, 64, 4096)}

OPERATIONS: dict[str, Operation] = {
    "layer_norm_act": Operation(
        _norm_inputs,
        _plain_norm,
        lambda i: ops.layer_norm_act(i["x"], i["weight"], i["bias"], act="mish"),
        batches={"5M": (512, 64, 4096), "48M": (512, 4096)},
    ),
    "linear_norm_act": Operation(
        _linear_inputs,
        lambda i: published.normed(_layers(i, "mish"), i["x"]),
        lambda i: ops.linear_norm_act(i["x"], _layers(i, "mish")[0]),
        lambda s, b: floor.stack(b, [s.units, s.units]),
        batches=MANY,
    ),
    "linear_act_norm": Operation(
        _ensemble_inputs,
        _plain_ensemble,
        lambda i: ops.linear_act_norm(i["x"], _layers(i, "mish")[0]),
        lambda s, b: floor.stack(b, [s.latent, CRITIC], members=MEMBERS),
        batches={"5M": (512,)},
    ),
    "mlp": Operation(
        _head_inputs,
        lambda i: published.normed(_layers(i), torch.cat([i["z"], i["a"]], dim=-1)),
        lambda i: ops.mlp((i["z"], i["a"]), _layers(i)),
        lambda s, b: floor.stack(b, [s.latent + ACTION, s.reward, s.reward, BINS]),
        batches=MANY,
    ),
    "velocity_field": Operation(
        _field_inputs,
        lambda i: published.velocity(_layers(i), i["z"], i["a"], 0.25),
        lambda i: ops.velocity_field(i["z"], i["a"], i["z"].new_tensor(0.25), _layers(i)),
        _field_gemms,
        batches={"5M": (512,)},
    ),
    "flow_step": Operation(
        _field_inputs,
        lambda i: published.next_latent(ops.Flow(_layers(i)), i["z"], i["a"]),
        lambda i: ops.flow_step(i["z"], i["a"], _layers(i)),
        _flow_gemms,
        batches=MANY,
    ),
    "latent_rollout": Operation(
        _rollout_inputs,
        _plain_latents,
        lambda i: ops.latent_rollout(i["z"], i["a"], ops.Flow(_layers(i))),
        partial(_flow_gemms, steps=HORIZON),
        batches={"5M": (128,)},
    ),
    "mish": Operation(_rows("units"), lambda i: F.mish(i["x"]), lambda i: ops.mish(i["x"])),
    "simnorm": Operation(
        _rows("latent"), lambda i: _softmax_groups(i["x"]), lambda i: ops.simnorm(i["x"])
    ),
    "project_simplex": Operation(
        _rows("latent"), lambda i: _project(i["x"]), lambda i: ops.project_simplex(i["x"])
    ),
    "integrate": Operation(
        _rows("latent"), _plain_integral, lambda i: ops.integrate(_spiral, i["x"])
    ),
    "flow_interpolate": Operation(
        _path,
        _plain_path,
        lambda i: ops.flow_interpolate(i["z0"], i["z1"], i["tau"]),
        fixed=("tau",),
    ),
    "symlog": Operation(
        _rows("latent"), lambda i: published.symlog(i["x"]), lambda i: ops.symlog(i["x"])
    ),
    "symexp": Operation(
        _rows("latent"), lambda i: published.symexp(i["x"]), lambda i: ops.symexp(i["x"])
    ),
    "two_hot_encode": Operation(
        _logits,
        lambda i: published.two_hot_encode(i["x"], BINS, -10.0, 10.0),
        lambda i: ops.two_hot_encode(i["x"]),
        fixed=("logits", "x"),
        differentiable=False,
    ),
    "two_hot_decode": Operation(
        _logits,
        lambda i: published.two_hot_decode(i["logits"], -10.0, 10.0),
        lambda i: ops.two_hot_decode(i["logits"]),
        fixed=("x",),
    ),
    "two_hot_cross_entropy": Operation(
        _logits,
        lambda i: published.two_hot_cross_entropy(i["logits"], i["x"], -10.0, 10.0),
        lambda i: ops.two_hot_cross_entropy(i["logits"], i["x"]),
        fixed=("x",),
    ),
    "td_lambda": Operation(
        _returns,
        lambda i: published.td_lambda(i["reward"], i["value"][1:], 0.99, 0.95),
        lambda i: ops.td_lambda(i["reward"], i["value"]),
        fixed=("reward", "value"),
        differentiable=False,
    ),
}
# The same operations on other inputs: TD-MPC2's Q functions, all and those that planning uses. The
# published code computes all in either case.
VARIANTS: dict[str, Operation] = {
    "mlp_ensemble": Operation(
        _q_inputs,
        _plain_q,
        lambda i: ops.mlp((i["z"], i["a"]), _layers(i)),
        partial(_q_gemms, members=Q_FUNCTIONS),
        batches={"5M": (256, 1, 512)},
    ),
    "mlp_members": Operation(
        _q_inputs,
        lambda i: _plain_q(i)[[*USED]],
        lambda i: ops.mlp((i["z"], i["a"]), _layers(i), members=USED),
        partial(_q_gemms, members=len(USED)),
        batches={"5M": (256, 1, 512)},
    ),
}
# Measured otherwise, in these modules.
ELSEWHERE = {"imagine": "rollouts", "esnr": "esnr", "world_model_loss": "agent"}
SOME = {
    ("layer_norm_act", "forward"),
    ("layer_norm_act", "backward"),
    ("linear_norm_act", "backward"),
    ("flow_step", "backward"),
}


def cases(device: torch.device) -> list[Case]:
    found = []
    for name, op in {**OPERATIONS, **VARIANTS}.items():
        for model, batches in op.batches.items():
            if device.type == "cuda":
                batches = [*batches, 16384]
            for batch in batches:
                for mode in ("forward", "backward") if op.differentiable else ("forward",):
                    found.append(_case(device, name, op, model, batch, mode))
    return found


def _case(
    device: torch.device, name: str, op: Operation, model: str, batch: int, mode: str
) -> Case:
    first = model == "5M" and batch == op.batches["5M"][0]
    names = ["published", "autocast"] if op.gemms is not None else ["published"]
    if device.type == "cuda":
        names += ["tf32", "graph"] if op.gemms is not None else ["graph"]
    # One compilation takes from some seconds to a minute.
    compiles = name in ("layer_norm_act", "linear_norm_act", "mlp", "flow_step") and first
    if compiles or device.type == "cuda":
        names += ["compile"]
    names += ["reference"]
    if op.gemms is not None:
        names += ["algebra"]
    names += ["fast"]
    if op.gemms is not None:
        names += ["fast_bf16", "floor", "floor_bf16"]
    else:
        names += ["floor"]
    marks = set()
    if name == "layer_norm_act" and batch in (512, 4096):
        marks.add("figures")
    quick = QUICK if first and (name, mode) in SOME else frozenset()
    if quick and name == "layer_norm_act" and mode == "backward":
        quick |= {"compile"}  # to see that it runs; each compilation takes its time
    return Case(
        f"{name}-{model}-b{batch}-{mode}",
        {"work": f"ops.{name}", "model": model, "batch": batch, "mode": mode},
        partial(build, op, SIZES[model], batch, mode),
        tuple(names),
        frozenset(marks),
        quick,
        effort=Effort(seconds=2.0, min_rounds=5, max_rounds=60),
    )


def build(
    op: Operation, size: Size, batch: int, mode: str, device: torch.device, seed: int = 0
) -> Workload:
    """An operation on random inputs; ``backward`` is forward and backward to every input."""
    inputs = op.inputs(size, batch, torch.Generator().manual_seed(seed))
    inputs = {name: x.to(device) for name, x in inputs.items()}
    gradient = mode == "backward"
    wanted = [name for name in inputs if name not in op.fixed] if gradient else []

    def prepare(dtype: torch.dtype) -> tuple[Inputs, list[Tensor]]:
        own = {n: x.to(dtype).detach().requires_grad_(n in wanted) for n, x in inputs.items()}
        return own, [own[n] for n in wanted]

    shapes = [y.shape for y in _list(op.plain(prepare(torch.float32)[0]))]
    g = torch.Generator().manual_seed(seed + 1)
    upstream = [torch.randn(shape, generator=g).to(device) for shape in shapes]

    def caller(function: Any, name: str, dtype: torch.dtype = torch.float32) -> Provider:
        own, leaves = prepare(dtype)
        dy = [u.to(dtype) for u in upstream]

        def call() -> Outputs:
            with torch.set_grad_enabled(gradient):
                with providers.eager(name, device):
                    y = _list(function(own))
                if not gradient:
                    return {"output": y}
                dys = [u.to(v.dtype) for u, v in zip(dy, y, strict=True)]
                return {"output": y, "gradient": list(torch.autograd.grad(y, leaves, dys))}

        return Provider(call, call)

    def plain(name: str, compiled: Callable[[Any], Any]) -> Provider:
        return caller(compiled(op.plain), name)

    def ours(name: str) -> Provider:
        def within(own: Inputs) -> Any:
            with providers.backend(name, device):
                return op.ours(own)

        return caller(within, name)

    def truth() -> Outputs:
        check = caller(op.plain, "published", torch.float64).check
        assert check is not None
        return check() or {}

    def bottom(dtype: torch.dtype) -> Callable[[], object]:
        if op.gemms is not None:
            gemms = op.gemms(size, batch)
            if gradient:
                gemms += [*floor.backward(gemms), *floor.weight_gradients(gemms)]
            return floor.floor(gemms, dtype, device)
        x = max(inputs.values(), key=Tensor.numel)
        y = torch.empty_like(x)

        def traffic() -> None:
            """Read and write the largest tensor; backward reads two and writes one."""
            y.copy_(x)
            if gradient:
                torch.add(x, y, out=y)

        return traffic

    again = partial(build, op, size, batch, mode, device, seed + 1)
    return Workload(assemble(device, plain, ours, bottom), truth, again)


def _list(y: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)
