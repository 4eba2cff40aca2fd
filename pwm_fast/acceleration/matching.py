"""Which stacks of modules are what the operations compute, judged by their structure."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from pwm_fast import ops
from pwm_fast.acceleration.plan import Path, Plan, Step, Watched, forward_of
from pwm_fast.acceleration.stack import assemble
from pwm_fast.hooks import hooked
from pwm_fast.ops import Activation, Order, coverage
from pwm_fast.ops.types import ORDERS

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_PARTS = {"ln", "act", "dropout"}


class Mismatch(Exception):
    """A stack is not what the operations compute; the message says why."""


class _Token(NamedTuple):
    """A module of a flattened stack.

    Attributes:
        kind: ``"normed"`` (Linear, LayerNorm, activation in one), ``"linear"``, ``"norm"``,
            ``"act"``, ``"dropout"`` or ``"nothing"``.
        path: where it is.
        module: it.
        act: what the activation is.
        simnorm: where a SimNorm is, or None.
        dropout: where the Dropout of a Linear is, or None.
    """

    kind: str
    path: Path
    module: Any
    act: Activation = "none"
    simnorm: Path | None = None
    dropout: Path | None = None


def is_linear(module: nn.Module) -> bool:
    """Whether a module has a Linear's parameters, whatever its class."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return True
    if not hasattr(module, "ln") or not isinstance(weight, Tensor):
        return False
    return weight.dim() == 2 or (weight.dim() == 3 and weight.is_meta)


def is_candidate(module: nn.Module) -> bool:
    """Whether somebody may expect a module to be accelerated: a Sequential with a Linear."""
    return isinstance(module, nn.Sequential) and any(is_linear(m) for _, m in _flat(module, ()))


def member_of(stack: nn.Sequential) -> nn.Sequential:
    """One member, with parameters, where a stack on the meta device is for those of an ensemble.

    TD-MPC2's ensembles hold such ones to put their parameters into. In place of parameters they
    have plain attributes with tensordict before 0.14, and in its target and detached ensembles the
    shapes of all members.

    Raises:
        Mismatch: it cannot be copied.
    """
    linear = next((m for _, m in _flat(stack, ()) if is_linear(m)), None)
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or is_lazy(weight) or not weight.is_meta:
        return stack
    whole, bare = weight.dim() == 3, not any(True for _ in stack.parameters())
    if not (whole or bare):
        return stack
    member = copied(stack)
    for module in member.modules():
        held: dict[str, Any] = {**module._parameters}
        if bare:  # what is on another device nobody replaces: it is no parameter of a member
            found = vars(module).items()
            held |= {name: x for name, x in found if isinstance(x, Tensor) and x.is_meta}
        for name, x in held.items():
            if x is not None:
                vars(module).pop(name, None)
                one = x.detach()[0] if whole and x.dim() else x.detach()
                module._parameters[name] = nn.Parameter(one, requires_grad=False)
    return member


def copied(stack: nn.Sequential) -> nn.Sequential:
    """A copy of its own.

    Raises:
        Mismatch: there is none.
    """
    try:
        return copy.deepcopy(stack)
    except Exception as error:  # whatever a stranger's module raises
        raise Mismatch(f"it cannot be copied to be compared: {said(error)}") from None


def said(error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def match(stack: nn.Sequential) -> Plan:
    """How to run a stack as one operation, as far as its structure says.

    Raises:
        Mismatch: it is something else.
    """
    if type(stack) is not nn.Sequential:
        if _ours(stack):
            raise Mismatch("it is pwm_fast's own, which runs on the operations already")
        raise Mismatch("it is a subclass of nn.Sequential, which may do anything")
    if stack._compiled_call_impl is not None:
        raise Mismatch("it is compiled: accelerate first, then compile")
    if hooked(stack):
        raise Mismatch("it has forward or backward hooks")
    if "forward" in stack.__dict__:
        raise Mismatch("its forward is replaced on the instance")
    _check_parameters(stack)
    tokens = [_token(path, m) for path, m in _flat(stack, ())]
    steps, order = _parse([t for t in tokens if t.kind != "nothing"])
    if all(s.norm is None and s.act == "none" for s in steps):
        raise Mismatch("there is nothing to fuse: no LayerNorm and no activation")
    plan = Plan(order, tuple(steps), tuple(_watch(stack, {s.dropout for s in steps})))
    reason = coverage.unsupported(assemble(stack, plan).layers(), order)
    if reason is not None:
        raise Mismatch(f"no operation covers it: {reason}")
    return plan


def _ours(module: object) -> bool:
    return type(module).__module__.partition(".")[0] == "pwm_fast"


def _flat(stack: nn.Module, path: Path) -> Iterator[tuple[Path, nn.Module]]:
    """The modules of a stack, those of plain Sequentials within it in their place."""
    for name, module in stack._modules.items():
        if module is None:
            continue
        if type(module) is nn.Sequential and not hooked(module):
            yield from _flat(module, (*path, name))
        else:
            yield (*path, name), module


def _name(path: Path, module: object) -> str:
    return f"{'.'.join(path)} ({type(module).__name__})"


def _token(path: Path, module: nn.Module) -> _Token:
    name = _name(path, module)
    if _ours(module):
        raise Mismatch(f"{name} is pwm_fast's own, which runs on the operations already")
    for where, part in module.named_modules():
        inner = _name((*path, *where.split(".")) if where else path, part)
        if hooked(part):
            raise Mismatch(f"{inner} has forward or backward hooks")
        if "forward" in part.__dict__:
            raise Mismatch(f"{inner} has a forward replaced on the instance")
        if parametrize.is_parametrized(part):
            raise Mismatch(f"{inner} has parametrizations")
    if isinstance(module, _DROPOUTS):
        return _Token("dropout" if _drops(name, module) else "nothing", path, module)
    if isinstance(module, nn.Identity):
        return _Token("nothing", path, module)
    if isinstance(module, nn.LayerNorm):
        _check_norm(name, module)
        return _Token("norm", path, module)
    if not is_linear(module):
        act, simnorm = _activation(name, module, path)
        return _Token("act", path, module, act, simnorm)
    return _linear_token(name, path, module)


def _linear_token(name: str, path: Path, module: Any) -> _Token:
    own = {key for key, x in module._parameters.items() if x is not None}
    if own - {"weight", "bias"}:
        raise Mismatch(
            f"{name} has parameters besides weight and bias: {_list(own - {'weight', 'bias'})}"
        )
    if "weight" not in own or not hasattr(module, "bias"):
        raise Mismatch(f"{name} has no parameter `weight`, or no attribute `bias`")
    if isinstance(module.bias, Tensor) and "bias" not in own:
        raise Mismatch(f"{name}.bias is no parameter")
    buffers = {key for key, _ in module.named_buffers()}
    if buffers:
        raise Mismatch(f"{name} has buffers: {_list(buffers)}")
    parts = {key for key, part in module._modules.items() if part is not None}
    if not parts <= _PARTS:
        raise Mismatch(f"{name} has parts besides {_list(_PARTS)}: {_list(parts - _PARTS)}")
    drop: Path | None = None
    if getattr(module, "dropout", None) is not None:
        dropout = module.dropout
        if isinstance(dropout, _DROPOUTS):
            if _drops(f"{name}.dropout", dropout):
                drop = (*path, "dropout")
        elif not isinstance(dropout, nn.Identity):
            raise Mismatch(f"{name}.dropout is {dropout!r}, neither a Dropout nor None")
    norm = getattr(module, "ln", None)
    if norm is None:
        if "act" in parts or callable(getattr(module, "act", None)):
            raise Mismatch(f"{name} has an activation but no LayerNorm `ln`")
        return _Token("linear", path, module, dropout=drop)
    if not isinstance(norm, nn.LayerNorm):
        raise Mismatch(f"{name}.ln is {type(norm).__name__}, not nn.LayerNorm")
    _check_norm(f"{name}.ln", norm)
    if tuple(norm.normalized_shape) != (module.weight.shape[0],):
        raise Mismatch(
            f"{name}.ln normalises {tuple(norm.normalized_shape)}, not the layer's width"
        )
    act, simnorm = _activation(f"{name}.act", getattr(module, "act", None), (*path, "act"))
    return _Token("normed", path, module, act, simnorm, drop)


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _drops(name: str, dropout: Any) -> bool:
    """Whether a Dropout does anything in training mode."""
    if dropout.p == 0.0:
        return False
    if type(dropout) is not nn.Dropout:
        kind = type(dropout).__name__
        raise Mismatch(f"{name} drops with probability {dropout.p} as {kind} does, not nn.Dropout")
    return True


def _check_norm(name: str, norm: nn.LayerNorm) -> None:
    if len(norm.normalized_shape) != 1:
        raise Mismatch(f"{name} normalises over {len(norm.normalized_shape)} axes")
    if norm.weight is None:
        raise Mismatch(f"{name} is a LayerNorm without affine parameters")
    if norm.bias is None:
        raise Mismatch(f"{name} is a LayerNorm without a bias")
    extra = set(norm._parameters) - {"weight", "bias"} | set(norm._modules) | set(norm._buffers)
    if extra:
        raise Mismatch(f"{name} has more than weight and bias: {_list(extra)}")


def _activation(name: str, act: Any, path: Path) -> tuple[Activation, Path | None]:
    """What an activation is, and where it is if it is a SimNorm."""
    if act is None or type(act) is nn.Identity:
        return "none", None
    if type(act) is nn.Mish:
        return "mish", None
    known = "Mish, SimNorm or Identity"
    if not isinstance(act, nn.Module) or type(act).__module__.startswith("torch."):
        label = type(act).__name__ if isinstance(act, nn.Module) else repr(act)
        raise Mismatch(f"{name} is {label}, not {known}")
    if any(True for _ in act.parameters()) or any(True for _ in act.buffers()) or act._modules:
        raise Mismatch(f"{name} is of an unknown class with a state of its own, not {known}")
    found = _probe(act)
    if found is None:
        raise Mismatch(f"{name} computes neither of {known}")
    return found, path if found == "simnorm" else None


def _probe(act: nn.Module) -> Activation | None:
    """What a module without state computes, judged by its values."""
    dim = getattr(act, "dim", None)
    group = dim if isinstance(dim, int) and not isinstance(dim, bool) and dim > 0 else None
    x = torch.linspace(-4.0, 4.0, 7 * 3 * (group or 8), dtype=torch.float64, device="cpu")
    x = x.view(7, -1)
    try:
        with torch.no_grad():
            y = copy.deepcopy(act)(x.clone())
    except Exception:  # whatever a stranger's module raises: it is then nothing that we know
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    expected: dict[Activation, Tensor] = {"none": x, "mish": F.mish(x)}
    if group is not None:
        expected["simnorm"] = ops.simnorm(x, group, backend="reference")
    for name, value in expected.items():
        if torch.allclose(y, value, rtol=1e-9, atol=1e-12):
            return name
    return None


def _parse(tokens: list[_Token]) -> tuple[list[Step], Order]:
    """The layers of a sequence of modules, in the one order or the other."""
    reasons: list[tuple[int, str]] = []
    for order in ORDERS:
        steps, reason = _layers(tokens, order)
        if reason is None:
            return steps, order
        reasons.append((len(steps), reason))
    raise Mismatch(max(reasons)[1])  # that of the order which went further


def _layers(tokens: list[_Token], order: Order) -> tuple[list[Step], str | None]:
    """The layers, and why what follows them is none; None where nothing does."""
    steps: list[Step] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        i += 1
        name = _name(token.path, token.module)
        if token.kind == "normed":
            if order == "act_norm":
                return steps, f"{name} is LayerNorm before activation among layers the other way"
            norm_at = (*token.path, "ln")
            steps.append(Step(token.path, norm_at, token.act, token.simnorm, token.dropout))
            continue
        if token.kind == "dropout":
            return steps, (
                f"{name} drops with probability {token.module.p}, which is known right after a "
                "Linear alone"
            )
        if token.kind != "linear":
            return steps, f"{name} follows no Linear in an order that is known"
        parts: dict[str, _Token] = {}
        drop = token.dropout
        if i < len(tokens) and tokens[i].kind == "dropout" and drop is None:
            drop = tokens[i].path
            i += 1
        for kind in ("norm", "act") if order == "norm_act" else ("act", "norm"):
            if i < len(tokens) and tokens[i].kind == kind:
                parts[kind] = tokens[i]
                i += 1
        norm, act = parts.get("norm"), parts.get("act")
        width = (token.module.weight.shape[0],)
        if norm is not None and tuple(norm.module.normalized_shape) != width:
            return steps, f"{_name(norm.path, norm.module)} is not of the width of {name}"
        steps.append(
            Step(
                token.path,
                None if norm is None else norm.path,
                "none" if act is None else act.act,
                None if act is None else act.simnorm,
                drop,
            )
        )
    return steps, None


def _watch(stack: nn.Module, dropouts: set[Path | None]) -> Iterator[Watched]:
    """What is to stay as it is; the rates of ``dropouts`` may change."""
    for where, module in stack.named_modules(remove_duplicate=False):
        path = tuple(where.split(".")) if where else ()
        forward_of(type(module))  # which another may take the place of
        yield Watched(
            path,
            type(module),
            sum(child is not None for child in module._modules.values()),
            isinstance(module, _DROPOUTS) and path not in dropouts,
            isinstance(module, nn.LayerNorm),
        )


def _check_parameters(stack: nn.Module) -> None:
    parameters = dict(stack.named_parameters())
    for name, x in parameters.items():
        if is_lazy(x):
            raise Mismatch(f"{name} has no shape yet: run the module once before")
        if not (x.is_floating_point() or x.is_complex()):
            raise Mismatch(f"{name} is of {x.dtype}, which has no gradient")
    for what in ("dtype", "device"):
        found = {str(getattr(x, what)) for x in parameters.values()}
        if len(found) > 1:
            raise Mismatch(f"its parameters are of several {what}s: {_list(found)}")
