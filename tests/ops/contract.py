"""The numeric contract of the operations, as a table: what every backend must fulfil.

A case builds its inputs, calls the public operation, and calls PyTorch's own composition of it. The
composition in float64 on contiguous inputs is the truth; in the dtype under test it is the measure
of :func:`tests.helpers.assert_2x`. A backend is tested by running :func:`check` while it is chosen.

ESNR is not in the table: its result is float64 whatever the inputs are (see test_esnr.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.ops import Activation, Layer
from tests.helpers import PARAMETERS, assert_2x, errs_alike, random_layer

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

LOGSTD = (-4.0, 0.5)
WIDTHS = (1, 7, 510, 617, 777, 1788)
BATCHES = (0, 1, 199)


@dataclass(frozen=True)
class Case:
    """One operation under the contract.

    Attributes:
        name: of the test.
        build: ``(batch, width, generator)`` to named float64 inputs.
        call: the public operation on such inputs.
        torch_call: PyTorch's composition of the same formula.
        rows: inputs with the batch as their first axis.
        constants: inputs whose gradient is not compared.
        widths: sizes of the case's main axis.
        batches: sizes of its batch.
    """

    name: str
    build: Callable[[int, int, torch.Generator], Inputs]
    call: Callable[[Inputs], Outputs]
    torch_call: Callable[[Inputs], Outputs]
    rows: tuple[str, ...]
    constants: tuple[str, ...] = ()
    widths: tuple[int, ...] = WIDTHS
    batches: tuple[int, ...] = BATCHES

    def inputs(self, batch: int, width: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Draw inputs and round them to ``dtype``."""
        generator = torch.Generator().manual_seed(seed)
        return {k: v.to(dtype) for k, v in self.build(batch, width, generator).items()}


def check(case: Case, inputs: Inputs, *, summed: bool = False) -> None:
    """Compare values and all gradients of the operation with the truth, in the inputs' dtype.

    Args:
        case: the operation.
        inputs: of one dtype and any strides.
        summed: differentiate the plain sum, so that the incoming gradient has stride 0.
    """
    ours = values_and_gradients(case, case.call, inputs, summed)
    torch_same_dtype, ref = _torch_and_truth(case, inputs, summed)
    if next(iter(inputs.values())).dtype == torch.float64:
        torch.testing.assert_close(ours, ref, rtol=1e-11, atol=1e-12)
        return
    generator = torch.Generator().manual_seed(2)
    drawn: list[Inputs] = []
    nearby: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def refused(draws: int) -> dict[str, AssertionError]:
        while len(nearby) < draws:
            drawn.append(_nudged(inputs, generator))
            nearby.append(_torch_and_truth(case, drawn[-1], summed))
        found = {}
        for what in ref:
            more = [(near_torch[what], near_ref[what]) for near_torch, near_ref in nearby]
            try:
                assert_2x(
                    ours[what], torch_same_dtype[what], ref[what], f"{case.name}: {what}", more
                )
            except AssertionError as error:
                found[what] = error
        return found

    # A few draws of PyTorch's own error say little of its range in a tensor of few numbers: what
    # exceeds twice their worst is judged by more of them. More draws only allow more: they are not
    # made where one is enough, as nearly always.
    if not refused(0) or not refused(3) or not (found := refused(16)):
        return
    again = [values_and_gradients(case, case.call, x, summed) for x in drawn]
    for what, error in found.items():
        if not errs_alike(
            [x[what] for x in (ours, *again)],
            [x[what] for x in (torch_same_dtype, *(theirs for theirs, _ in nearby))],
            [x[what] for x in (ref, *(truth for _, truth in nearby))],
        ):
            raise error


@contextmanager
def _own(precision: str, device: str) -> Iterator[None]:
    """PyTorch's own way to a precision of products: autocast, or tf32 for them."""
    if precision == "tf32":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    else:
        with torch.autocast(
            device, dtype={"bf16": torch.bfloat16, "fast": torch.float16}[precision]
        ):
            yield


def check_precision(
    case: Case, precision: str, batch: int, width: int, device: str = "cpu"
) -> None:
    """Compare by the 2x rule with PyTorch in the same precision of products, on float32 inputs.

    The backend in force computes in ``precision``: ``tf32``, ``bf16`` or ``fast``.
    """

    def own(given: Inputs) -> Inputs:
        with _own(precision, device):
            found = values_and_gradients(case, case.torch_call, given, False)
        return {k: v.float() for k, v in found.items()}

    @functools.cache
    def drawn(seed: int) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
        found = case.inputs(batch, width, torch.float32, seed)
        inputs = {k: v.to(device) for k, v in found.items()}
        double = {k: v.double() for k, v in inputs.items()}
        return inputs, own(inputs), values_and_gradients(case, case.torch_call, double, False)

    inputs, torch_own, truth = drawn(0)
    with select.precision(precision):
        ours = values_and_gradients(case, case.call, inputs, False)
    rounding = 0.0
    for key, expected in truth.items():
        near = ((drawn(seed)[1][key], drawn(seed)[2][key]) for seed in (1, 2, 3))
        assert_2x(ours[key], torch_own[key], expected, f"{case.name}: {key}", near)
        if expected.numel():
            rounding = max(rounding, (ours[key].double() - expected).abs().max().item())
    assert rounding > 1e-6 or batch == 0  # it is no float32 in disguise


def _nudged(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Change every number by up to one percent."""
    return {
        k: (v.double() * (0.99 + 0.02 * _uniform(generator, *v.shape).to(v.device))).to(v.dtype)
        for k, v in inputs.items()
    }


def _torch_and_truth(
    case: Case, inputs: Inputs, summed: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run PyTorch's composition on contiguous inputs, in their dtype and in float64."""
    same = {k: v.clone(memory_format=torch.contiguous_format) for k, v in inputs.items()}
    double = {k: v.double() for k, v in same.items()}
    return (
        values_and_gradients(case, case.torch_call, same, summed),
        values_and_gradients(case, case.torch_call, double, summed),
    )


def values_and_gradients(
    case: Case, call: Callable[[Inputs], Outputs], inputs: Inputs, summed: bool
) -> dict[str, Tensor]:
    leaves = {k: v.detach().requires_grad_(k not in case.constants) for k, v in inputs.items()}
    outputs = call(leaves)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    wanted = {k: v for k, v in leaves.items() if v.requires_grad}
    if not wanted:
        return results
    generator = torch.Generator().manual_seed(1)
    # bfloat16 numbers, so that every dtype here gets the same cotangents
    cotangents = [
        torch.randn(y.shape, dtype=torch.float64, generator=generator).bfloat16().to(y)
        for y in outputs
    ]
    if summed:
        cotangents = [y.new_ones(()).expand(y.shape) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), cotangents)
    return results | {f"gradient of {k}": g for k, g in zip(wanted, gradients, strict=True)}


# Inputs.


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=generator)


def _eights(width: int) -> int:
    """Round up to whole SimNorm groups."""
    return -(-width // 8) * 8


def _layer_inputs(name: str, layer: Layer) -> Inputs:
    return {
        f"{name}.{field}": tensor
        for field in PARAMETERS
        if (tensor := getattr(layer, field)) is not None
    }


def _layer(inputs: Inputs, name: str, act: Activation) -> Layer:
    return Layer(**{field: inputs.get(f"{name}.{field}") for field in PARAMETERS}, act=act)


def _net(inputs: Inputs) -> list[Layer]:
    return [_layer(inputs, "hidden", "mish"), _layer(inputs, "last", "none")]


def _build_net(width_in: int, width_out: int, generator: torch.Generator) -> Inputs:
    hidden = random_layer(width_in, 33, generator=generator)
    last = random_layer(33, width_out, norm=False, generator=generator)
    return _layer_inputs("hidden", hidden) | _layer_inputs("last", last)


# PyTorch's compositions: nothing here calls pwm_fast.


def _torch_act(x: Tensor, act: Activation) -> Tensor:
    if act == "mish":
        return F.mish(x)
    if act == "simnorm":
        return F.softmax(x.reshape(*x.shape[:-1], x.shape[-1] // 8, 8), dim=-1).reshape(x.shape)
    return x


def _torch_norm(x: Tensor, inputs: Inputs, name: str) -> Tensor:
    weight, bias = inputs.get(f"{name}.ln_weight"), inputs.get(f"{name}.ln_bias")
    return x if weight is None else F.layer_norm(x, x.shape[-1:], weight, bias)


def _torch_linear_norm_act(x: Tensor, inputs: Inputs, name: str, act: Activation) -> Tensor:
    h = F.linear(x, inputs[f"{name}.weight"], inputs.get(f"{name}.bias"))
    return _torch_act(_torch_norm(h, inputs, name), act)


def _torch_net(x: Tensor, inputs: Inputs) -> Tensor:
    h = _torch_linear_norm_act(x, inputs, "hidden", "mish")
    return _torch_linear_norm_act(h, inputs, "last", "none")


def _torch_linear_act_norm(i: Inputs) -> Outputs:
    h = F.mish(F.linear(i["x"], i["layer.weight"], i["layer.bias"]))
    return (_torch_norm(h, i, "layer"),)


def _torch_ensemble(i: Inputs) -> Outputs:
    x = i["x"].expand(3, *i["x"].shape[-2:])
    h = F.mish(torch.bmm(x, i["layer.weight"].mT) + i["layer.bias"][:, None])
    h = F.layer_norm(h, h.shape[-1:])
    return (h * i["layer.ln_weight"][:, None] + i["layer.ln_bias"][:, None],)


def _torch_member(x: Tensor, i: Inputs, e: int) -> Tensor:
    own = {name: p[e] for name, p in i.items() if name not in ("z", "a")}
    h = F.linear(x, own["hidden.weight"], own["hidden.bias"])
    if "mask" in own:
        h = h * own["mask"]
    h = F.mish(_torch_norm(h, own, "hidden"))
    h = _torch_linear_norm_act(h, own, "middle", "simnorm")
    return _torch_linear_norm_act(h, own, "last", "none")


def _torch_members(members: Sequence[int]) -> Callable[[Inputs], Outputs]:
    def call(i: Inputs) -> Outputs:
        x = torch.cat((i["z"], i["a"]), dim=1)
        return (torch.stack([_torch_member(x, i, e) for e in members]),)

    return call


def _torch_velocity(z: Tensor, tau: Tensor, i: Inputs) -> Tensor:
    return _torch_net(torch.cat((z, i["a"], tau[:, None], i["task"]), dim=1), i)


def _torch_heun(i: Inputs) -> Outputs:
    z = i["z"]
    for k in range(2):
        start, end = (z.new_full((z.shape[0],), (k + s) / 2) for s in (0, 1))
        k1 = _torch_velocity(z, start, i)
        k2 = _torch_velocity(z + 0.5 * k1, end, i)
        z = z + 0.25 * (k1 + k2)
    return (z,)


def _torch_euler(i: Inputs) -> Outputs:
    z = i["z"]
    for k in range(3):
        z = z + _torch_velocity(z, z.new_full((z.shape[0],), k / 3), i) * (1 / 3)
    return (z,)


def _torch_two_hot(x: Tensor, bins: int) -> Tensor:
    x = (x.sign() * x.abs().log1p()).clamp(-10.0, 10.0)
    position = (x + 10.0) * ((bins - 1) / 20.0)
    lower = position.floor().clamp(max=bins - 2)
    upper_weight = (position - lower)[..., None]
    below = F.one_hot(lower.long(), bins).to(x.dtype)
    above = F.one_hot(lower.long() + 1, bins).to(x.dtype)
    return below * (1.0 - upper_weight) + above * upper_weight


def _torch_decode(i: Inputs) -> Outputs:
    logits = i["logits"]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    centres = torch.linspace(-10.0, 10.0, logits.shape[-1], dtype=dtype).to(logits)
    value = F.softmax(logits, dim=-1) @ centres
    return (value.sign() * value.abs().expm1(),)


def _torch_cross_entropy(i: Inputs) -> Outputs:
    target = _torch_two_hot(i["x"], i["logits"].shape[-1])
    return (F.cross_entropy(i["logits"], target, reduction="none"),)


def _torch_td_lambda(i: Inputs) -> Outputs:
    rewards, values, continues = i["rewards"], i["values"], i["continues"]
    target, targets = values[-1], []
    for t in reversed(range(rewards.shape[0])):
        target = rewards[t] + 0.99 * continues[t] * (0.05 * values[t + 1] + 0.95 * target)
        targets.insert(0, target)
    return (torch.stack(targets),)


# The table.


def _pointwise(name: str, call: Callable, torch_call: Callable) -> Case:
    return Case(
        name,
        lambda b, w, g: {"x": _normal(g, b, w, scale=2.0)},
        lambda i: (call(i["x"]),),
        lambda i: (torch_call(i["x"]),),
        rows=("x",),
    )


def _layer_norm_act(act: Activation) -> Case:
    def build(batch: int, width: int, g: torch.Generator) -> Inputs:
        width = _eights(width) if act == "simnorm" else width
        return {
            "x": _normal(g, batch, width, scale=2.0) + 0.5,
            "norm.ln_weight": 1.0 + _normal(g, width, scale=0.3),
            "norm.ln_bias": _normal(g, width, scale=0.3),
        }

    return Case(
        f"layer_norm_act_{act}",
        build,
        lambda i: (ops.layer_norm_act(i["x"], i["norm.ln_weight"], i["norm.ln_bias"], act=act),),
        lambda i: (_torch_act(_torch_norm(i["x"], i, "norm"), act),),
        rows=("x",),
    )


def _linear_norm_act(act: Activation) -> Case:
    def build(batch: int, width: int, g: torch.Generator) -> Inputs:
        outputs = _eights(width) if act == "simnorm" else width
        inputs = min(width, 257)
        layer = random_layer(inputs, outputs, generator=g)
        return {"x": _normal(g, batch, inputs)} | _layer_inputs("layer", layer)

    return Case(
        f"linear_norm_act_{act}",
        build,
        lambda i: (ops.linear_norm_act(i["x"], _layer(i, "layer", act)),),
        lambda i: (_torch_linear_norm_act(i["x"], i, "layer", act),),
        rows=("x",),
    )


def _linear_act_norm() -> Case:
    return Case(
        "linear_act_norm",
        lambda b, w, g: (
            {"x": _normal(g, b, w)}
            | _layer_inputs("layer", random_layer(w, min(w, 257), generator=g))
        ),
        lambda i: (ops.linear_act_norm(i["x"], _layer(i, "layer", "mish")),),
        _torch_linear_act_norm,
        rows=("x",),
    )


def _ensemble(shared: bool) -> Case:
    def build(batch: int, width: int, g: torch.Generator) -> Inputs:
        x = _normal(g, batch, width) if shared else _normal(g, 3, batch, width)
        layer = random_layer(width, 33, members=(3,), generator=g)
        return {"x": x} | _layer_inputs("layer", layer)

    return Case(
        f"linear_act_norm_ensemble_{'shared' if shared else 'own'}_input",
        build,
        lambda i: (ops.linear_act_norm(i["x"], _layer(i, "layer", "mish")),),
        _torch_ensemble,
        rows=("x",) if shared else (),
    )


def _linear_norm_act_ensemble() -> Case:
    def build(batch: int, width: int, g: torch.Generator) -> Inputs:
        layer = random_layer(width, 33, members=(3,), generator=g)
        return {"x": _normal(g, batch, width)} | _layer_inputs("layer", layer)

    def torch_call(i: Inputs) -> Outputs:
        own = [{name: p[e] for name, p in i.items() if name != "x"} for e in range(3)]
        return (torch.stack([_torch_linear_norm_act(i["x"], p, "layer", "mish") for p in own]),)

    return Case(
        "linear_norm_act_ensemble_shared_input",
        build,
        lambda i: (ops.linear_norm_act(i["x"], _layer(i, "layer", "mish")),),
        torch_call,
        rows=("x",),
    )


def _mlp_ensemble(name: str, members: Sequence[int] | None = None, *, drop: bool = False) -> Case:
    """TD-MPC2's Q functions, with SimNorm between: an ensemble that normalises first."""

    def build(batch: int, width: int, g: torch.Generator) -> Inputs:
        inputs = {"z": _normal(g, batch, width), "a": _normal(g, batch, 3)}
        inputs |= _layer_inputs("hidden", random_layer(width + 3, 33, members=(3,), generator=g))
        inputs |= _layer_inputs("middle", random_layer(33, 24, members=(3,), generator=g))
        last = random_layer(24, 5, norm=False, members=(3,), generator=g)
        if drop:
            inputs["mask"] = (_uniform(g, 3, batch, 33) < 0.75).double() / 0.75
        return inputs | _layer_inputs("last", last)

    def call(i: Inputs) -> Outputs:
        layers = [
            _layer(i, "hidden", "mish"),
            _layer(i, "middle", "simnorm"),
            _layer(i, "last", "none"),
        ]
        if drop:
            layers[0] = layers[0]._replace(dropout=i["mask"])
        return (ops.mlp((i["z"], i["a"]), layers, members=members),)

    chosen = _torch_members(range(3) if members is None else members)
    constants = ("mask",) if drop else ()
    return Case(name, build, call, chosen, rows=("z", "a"), constants=constants)


def _build_field(batch: int, width: int, g: torch.Generator) -> Inputs:
    data = {
        "z": _normal(g, batch, width),
        "a": _normal(g, batch, 3),
        "task": _normal(g, batch, 5),
    }
    return data | _build_net(width + 3 + 1 + 5, width, g)


def _rollout_case(name: str, dynamics: Callable[[Inputs], ops.Dynamics], imagined: bool) -> Case:
    """Two macro steps; ``imagined`` with a policy, detached from the latents or not by the name.

    A fold is what runs where the dynamics are frozen: their gradients are compared in float64
    alone. A policy of TD-MPC2's kind sees the task and gives each state its deviation; a mask
    leaves out components of actions.
    """
    own_std, masked = "tdmpc2" in name, "masked" in name
    one_shot = name.endswith("map")
    residual, told = "residual" in name, "shortcut" in name
    simnorm = one_shot or name.endswith("simnorm_head")
    detach = "attached" not in name

    def build(batch: int, width: int, g: torch.Generator) -> Inputs:
        width = _eights(width) if simnorm else width
        inputs = width + 3 + 5 + (not (one_shot or residual)) + told
        data = {"z": _normal(g, batch, width), "task": _normal(g, batch, 5)}
        data |= _layer_inputs("hidden", random_layer(inputs, 33, generator=g))
        data |= _layer_inputs("middle", random_layer(33, 29, generator=g))
        data |= _layer_inputs("last", random_layer(29, width, norm=simnorm, generator=g))
        if not imagined:
            return data | {"a": _normal(g, 2, batch, 3)}
        data |= {"noise": _normal(g, 2, batch, 3), "std": 0.2 + _uniform(g, 3)}
        if masked:
            data["mask"] = (_uniform(g, batch, 3) < 0.6).double()
        if own_std:
            del data["std"]
        seen, outputs = (width + 5, 6) if own_std else (width, 3)
        data |= _layer_inputs("policy", random_layer(seen, 31, generator=g))
        return data | _layer_inputs("mu", random_layer(31, outputs, norm=False, generator=g))

    def call(i: Inputs) -> Outputs:
        if not imagined:
            return (ops.latent_rollout(i["z"], i["a"], dynamics(i), task=i["task"]),)
        layers = [_layer(i, "policy", "mish"), _layer(i, "mu", "none")]
        policy = ops.Policy(layers, i.get("std"))
        if own_std:
            policy = ops.Policy(layers, None, "norm_act", True, *LOGSTD)
        # Without heads worth the name: their gradients are those of mlp, tested for themselves.
        heads = ops.Heads([Layer(i["z"].new_zeros(1, i["z"].shape[1] + 8))])
        result = ops.imagine(
            i["z"],
            policy,
            dynamics(i),
            heads,
            noise=i["noise"],
            detach=detach,
            task=i["task"],
            action_mask=i.get("mask"),
        )
        return result.z, result.action

    def torch_step(z: Tensor, a: Tensor, i: Inputs) -> Tensor:
        def net(x: Tensor) -> Tensor:
            h = _torch_linear_norm_act(x, i, "hidden", "mish")
            h = _torch_linear_norm_act(h, i, "middle", "mish")
            return _torch_linear_norm_act(h, i, "last", "simnorm" if simnorm else "none")

        def velocity(z: Tensor, tau: float) -> Tensor:
            times = [z.new_full((z.shape[0], 1), tau), i["task"]]
            if told:
                times.append(z.new_full((z.shape[0], 1), dt))
            return net(torch.cat((z, a, *times), dim=1))

        if one_shot or residual:
            change = net(torch.cat((z, i["task"], a), dim=1))
            return z + change if residual else change
        flow = dynamics(i)
        assert isinstance(flow, (ops.Flow, ops.Shortcut))
        dt = 1.0 / flow.substeps
        for k in range(flow.substeps):
            k1 = velocity(z, k * dt)
            if told or flow.method == "euler":  # type: ignore[union-attr]
                z = z + dt * k1
            else:
                z = z + (0.5 * dt) * (k1 + velocity(z + dt * k1, (k + 1) * dt))
        return z

    def torch_action(x: Tensor, eps: Tensor, i: Inputs) -> Tensor:
        if own_std:
            h = torch.cat((x, i["task"]), dim=1)
            h = _torch_linear_norm_act(h, i, "policy", "mish")
            mu, raw = _torch_linear_norm_act(h, i, "mu", "none").chunk(2, dim=1)
            low, high = LOGSTD
            std = torch.exp(low + 0.5 * (high - low) * (torch.tanh(raw) + 1.0))
        else:
            h = F.mish(F.linear(x, i["policy.weight"], i["policy.bias"]))
            mu = F.linear(_torch_norm(h, i, "policy"), i["mu.weight"], i["mu.bias"])
            std = i["std"]
        a = torch.tanh(mu + std * eps)
        return a * i["mask"] if masked else a

    def torch_call(i: Inputs) -> Outputs:
        z, zs, actions = i["z"], [i["z"]], []
        for t in range(2):
            if imagined:
                x = z.detach() if detach else z
                actions.append(torch_action(x, i["noise"][t], i))
            z = torch_step(z, actions[-1] if imagined else i["a"][t], i)
            zs.append(z)
        return (torch.stack(zs), torch.stack(actions)) if imagined else (torch.stack(zs),)

    frozen = tuple(
        f"{layer}.{field}" for layer in ("hidden", "middle", "last") for field in PARAMETERS
    )
    return Case(
        name,
        build,
        call,
        torch_call,
        rows=("z", "task", "mask") if masked else ("z", "task"),
        constants=("noise", "mask", *frozen) if "folded" in name else ("noise", "mask"),
        widths=(1, 7, 510),
    )


def _dynamics(
    method: str, fold: bool = False, last: Activation = "none"
) -> Callable[[Inputs], ops.Dynamics]:
    def build(i: Inputs) -> ops.Dynamics:
        net = [
            _layer(i, "hidden", "mish"),
            _layer(i, "middle", "mish"),
            _layer(i, "last", last),
        ]
        if method == "map":
            return ops.LatentMap(net)
        if method == "residual":
            return ops.ResidualMLP(net, fold=fold)
        if method == "shortcut":
            return ops.Shortcut(net, 2, fold=fold)
        return ops.Flow(net, 2, method, fold=fold)  # type: ignore[arg-type]

    return build


ROLLOUTS = tuple(
    _rollout_case(f"{kind}_{name}", dynamics, imagined)
    for kind, imagined in (("rollout", False), ("imagine", True), ("imagine_attached", True))
    for name, dynamics in (
        ("heun", _dynamics("heun")),
        ("heun_folded", _dynamics("heun", fold=True)),
        ("euler", _dynamics("euler")),
        ("euler_folded", _dynamics("euler", fold=True)),
        ("simnorm_head", _dynamics("heun", last="simnorm")),
        ("residual", _dynamics("residual")),
        ("residual_folded", _dynamics("residual", fold=True)),
        ("shortcut", _dynamics("shortcut")),
        ("map", _dynamics("map", last="simnorm")),
    )
)

# Not one operator: each network is one at each step.
POLICIES = tuple(
    _rollout_case(name, dynamics, True)
    for name, dynamics in (
        ("imagine_tdmpc2_map", _dynamics("map", last="simnorm")),
        ("imagine_attached_tdmpc2_masked_map", _dynamics("map", last="simnorm")),
        ("imagine_attached_masked_heun", _dynamics("heun")),
    )
)

CASES = (
    *ROLLOUTS,
    *POLICIES,
    Case(
        "simnorm",
        lambda b, w, g: {"x": _normal(g, b, _eights(w), scale=2.0)},
        lambda i: (ops.simnorm(i["x"]),),
        lambda i: (_torch_act(i["x"], "simnorm"),),
        rows=("x",),
    ),
    _pointwise("mish", ops.mish, F.mish),
    _layer_norm_act("none"),
    _layer_norm_act("mish"),
    _layer_norm_act("simnorm"),
    _linear_norm_act("mish"),
    _linear_norm_act("simnorm"),
    _linear_act_norm(),
    _ensemble(shared=True),
    _ensemble(shared=False),
    _linear_norm_act_ensemble(),
    _mlp_ensemble("mlp_ensemble"),
    _mlp_ensemble("mlp_ensemble_members", (2, 0)),
    _mlp_ensemble("mlp_ensemble_dropout", drop=True),
    Case(
        "mlp",
        lambda b, w, g: {"z": _normal(g, b, w), "a": _normal(g, b, 3)} | _build_net(w + 3, w, g),
        lambda i: (ops.mlp((i["z"], i["a"]), _net(i)),),
        lambda i: (_torch_net(torch.cat((i["z"], i["a"]), dim=1), i),),
        rows=("z", "a"),
    ),
    Case(
        "velocity_field",
        lambda b, w, g: _build_field(b, w, g) | {"tau": _uniform(g, b)},
        lambda i: (ops.velocity_field(i["z"], i["a"], i["tau"], _net(i), task=i["task"]),),
        lambda i: (_torch_velocity(i["z"], i["tau"], i),),
        rows=("z", "a", "task", "tau"),
    ),
    Case(
        "flow_step_heun",
        _build_field,
        lambda i: (ops.flow_step(i["z"], i["a"], _net(i), 2, "heun", task=i["task"]),),
        _torch_heun,
        rows=("z", "a", "task"),
    ),
    Case(
        "flow_step_euler",
        _build_field,
        lambda i: (ops.flow_step(i["z"], i["a"], _net(i), 3, "euler", task=i["task"]),),
        _torch_euler,
        rows=("z", "a", "task"),
    ),
    Case(
        "flow_interpolate",
        lambda b, w, g: {
            "z0": _normal(g, b, w),
            "z1": _normal(g, b, w),
            "tau": _uniform(g, b),
        },
        lambda i: ops.flow_interpolate(i["z0"], i["z1"], i["tau"]),
        lambda i: (
            (1.0 - i["tau"][:, None]) * i["z0"] + i["tau"][:, None] * i["z1"],
            i["z1"] - i["z0"],
        ),
        rows=("z0", "z1", "tau"),
    ),
    _pointwise("symlog", ops.symlog, lambda x: x.sign() * x.abs().log1p()),
    _pointwise("symexp", ops.symexp, lambda x: x.sign() * x.abs().expm1()),
    # A two-hot code is piecewise linear: rounding moves its kinks, so x gets its gradient tested in
    # float64 only (test_two_hot.py). The tensor "bins" stands for its length.
    Case(
        "two_hot_encode",
        lambda b, w, g: {"x": _normal(g, b, scale=5.0), "bins": torch.zeros(w + 1)},
        lambda i: (ops.two_hot_encode(i["x"], i["bins"].numel()),),
        lambda i: (_torch_two_hot(i["x"], i["bins"].numel()),),
        rows=("x",),
        constants=("x", "bins"),
        widths=(1, 7, 100),
    ),
    Case(
        "two_hot_decode",
        lambda b, w, g: {"logits": _normal(g, b, w + 1, scale=0.5)},
        lambda i: (ops.two_hot_decode(i["logits"]),),
        _torch_decode,
        rows=("logits",),
        widths=(1, 7, 100),
    ),
    Case(
        "two_hot_cross_entropy",
        lambda b, w, g: {"logits": _normal(g, b, w + 1), "x": _normal(g, b, scale=5.0)},
        lambda i: (ops.two_hot_cross_entropy(i["logits"], i["x"]),),
        _torch_cross_entropy,
        rows=("logits", "x"),
        constants=("x",),
        widths=(1, 7, 100),
    ),
    Case(
        "td_lambda",
        lambda b, w, g: {
            "rewards": _normal(g, w, b),
            "values": _normal(g, w + 1, b),
            "continues": _uniform(g, w, b),
        },
        lambda i: (ops.td_lambda(i["rewards"], i["values"], continues=i["continues"]),),
        _torch_td_lambda,
        rows=(),
        widths=(1, 7, 16),
    ),
)
