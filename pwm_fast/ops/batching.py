"""How ``torch.vmap`` sees the operators.

Where only what varies by row is mapped over, the mapped axis joins the rows of one call. Where the
parameters of an ``act_norm`` MLP are, they are an ensemble. All else is a loop over that axis.
Inside vmap no tensor shows whether it requires a gradient, so what to keep for a backward pass is
decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pwm_fast.backends.specs import decode_layers
from pwm_fast.ops import (  # noqa: F401  they define
    library,
    library_centring,
    library_esnr,
    library_rows,
)
from pwm_fast.ops.library import needs_grad, no_gradient, register_vmap

Update = Callable[[list[Any]], list[Any]]


def _unchanged(args: list[Any]) -> list[Any]:
    return args


def _fold(x: Tensor, dim: int | None, size: int, axis: int, rows: int) -> Tensor:
    """Make the mapped axis part of the axis of rows, in front of them."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    if x.shape[axis + 1] != rows:  # one row that stands for all
        x = x.expand(*x.shape[: axis + 1], rows, *x.shape[axis + 2 :])
    return x.movedim(0, axis).flatten(axis, axis + 1)


def _unfold(y: Tensor, size: int, axis: int, members: int, rows: int) -> Tensor:
    """The mapped axis first again; with members rows are those of one member after another."""
    y = y.unflatten(axis, (members, size, rows)).movedim(axis + 1, 0)
    return y.flatten(axis + 1, axis + 2)


def _loop(
    operator: Any, size: int, in_dims: Sequence[Any], args: Sequence[Any], update: Update, read: int
) -> tuple[Any, Any]:
    """One call for each element of the mapped axis."""
    if size == 0:
        raise ValueError(f"{operator} cannot be mapped over an axis of length 0")
    flat, structure = pytree.tree_flatten(list(args))
    dims = _dims(args, in_dims)
    results = []
    for i in range(size):
        each = [x if d is None else x.select(d, i) for x, d in zip(flat, dims, strict=True)]
        result = operator(*update(pytree.tree_unflatten(each, structure)))
        results.append(_read(result, read))
    leaves = [pytree.tree_flatten(r)[0] for r in results]
    outputs = [torch.stack(parts) for parts in zip(*leaves, strict=True)]
    structure = pytree.tree_structure(results[0])
    return (
        pytree.tree_unflatten(outputs, structure),
        pytree.tree_unflatten([0] * len(outputs), structure),
    )


def _dims(args: Sequence[Any], in_dims: Sequence[Any]) -> list[int | None]:
    """The mapped axis of every leaf of ``args``."""
    dims: list[int | None] = []
    for arg, dim in zip(args, in_dims, strict=True):
        leaves = len(pytree.tree_flatten(arg)[0])
        dims += dim if isinstance(dim, (list, tuple)) else [dim] * leaves
    return dims


def _read(result: Any, read: int) -> Any:
    """Without the lists of buffers behind the outputs that callers read."""
    if not isinstance(result, (tuple, list)) or not read:
        return result
    return tuple(x if i < read else [] if isinstance(x, list) else x for i, x in enumerate(result))


def _mapped(dims: Any) -> bool:
    return any(d is not None for d in (dims if isinstance(dims, (list, tuple)) else (dims,)))


def _register(
    name: str,
    rows: Mapping[int, int] | None = None,
    outputs: Sequence[int] = (),
    *,
    update: Update = _unchanged,
    members: Callable[[Sequence[Any]], int] = lambda args: 1,
    broadcast: int | None = None,
    ensemble: Callable[..., Any] | None = None,
) -> None:
    """Register an operator's rule.

    Args:
        name: of the operator.
        rows: arguments (tensors or lists of them) that vary by row, each with its axis of rows.
        outputs: axes of rows of the outputs; further ones are buffers that callers do not read.
        update: decides anew what is kept for a backward pass.
        members: how many times the outputs' rows are those of the arguments.
        broadcast: the argument whose only row may stand for all.
        ensemble: another way to map, or None where it does not apply.
    """
    operator = getattr(torch.ops.pwm_fast, name).default
    rows = rows or {}

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if ensemble is not None:
            done = ensemble(operator, size, in_dims, args)
            if done is not None:
                return done
        if not rows or any(_mapped(d) for i, d in enumerate(in_dims) if i not in rows):
            return _loop(operator, size, in_dims, args, update, len(outputs))
        folded = list(args)
        count = -1
        for i, axis in rows.items():
            listed = isinstance(args[i], (list, tuple))
            tensors = args[i] if listed else [args[i]]
            dims = in_dims[i] if _mapped(in_dims[i]) else [None] * len(tensors)
            dims = dims if isinstance(dims, (list, tuple)) else [dims]
            if count < 0:
                x, d = tensors[0], dims[0]
                count = x.shape[axis + (d is not None and d % x.dim() <= axis)]
            if i == broadcast and not _mapped(dims) and tensors[0].shape[axis] == 1:
                continue
            new = [_fold(x, d, size, axis, count) for x, d in zip(tensors, dims, strict=True)]
            folded[i] = new if listed else new[0]
        result = operator(*update(folded))
        single = isinstance(result, Tensor)
        parts = [result] if single else list(result)
        each = members(args)
        unfolded: list[Any] = [
            _unfold(y, size, axis, each, count) for y, axis in zip(parts, outputs, strict=False)
        ]
        out_dims: list[Any] = [0 for _ in unfolded]
        for y in parts[len(outputs) :]:
            unfolded.append([] if isinstance(y, list) else y)
            out_dims.append([] if isinstance(y, list) else None)
        return (unfolded[0], 0) if single else (tuple(unfolded), tuple(out_dims))

    register_vmap(name, rule)


# --- MLP ----------------------------------------------------------------------------------------


def _update_mlp(args: list[Any]) -> list[Any]:
    inputs, params, spec, backend, _, _ = args
    igrad, wgrad = needs_grad(inputs, params)
    return [inputs, params, spec, backend, igrad or wgrad, wgrad]


def _members(args: Sequence[Any]) -> int:
    weight = args[1][0]
    return weight.shape[0] if weight.dim() == 3 else 1


def _ensemble(operator: Any, size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """Parameters mapped over and inputs shared: the members of an ensemble."""
    inputs, params, spec, backend, *_ = args
    orders = {layer.order for layer in decode_layers(spec)}
    if _mapped(in_dims[0]) or not _mapped(in_dims[1]) or orders != {"act_norm"}:
        return None
    first = params[0].dim() - (in_dims[1][0] is not None)
    if first == 3 or inputs[0].shape[0] == 0:
        return None
    stacked = [
        p.expand(size, *p.shape) if d is None else p.movedim(d, 0)
        for p, d in zip(params, in_dims[1], strict=True)
    ]
    stacked = [p.contiguous() if p.dim() == 2 else p for p in stacked]  # kernels index vectors
    y, _ = operator(*_update_mlp([inputs, stacked, spec, backend, False, False]))
    return (y.unflatten(0, (size, -1)), []), (0, [])


_register("mlp", {0: 0}, (0,), update=_update_mlp, members=_members, ensemble=_ensemble)


# --- rollouts -----------------------------------------------------------------------------------


def _update_rollout(args: list[Any]) -> list[Any]:
    z0, c, w_z, w_tau, params, spec, backend, _, _ = args
    tau = () if w_tau is None else (w_tau,)
    grad, wgrad = needs_grad((z0, c), (w_z, *params, *tau))
    return [z0.contiguous(), c, w_z, w_tau, params, spec, backend, grad or wgrad, wgrad]


def _update_imagine(args: list[Any]) -> list[Any]:
    z0, noise, base, w_a, w_z, w_tau, params, std, actor, *constants = args
    if needs_grad([noise])[0]:
        raise no_gradient("imagine", "noise")
    tau = () if w_tau is None else (w_tau,)
    grad, wgrad, agrad = needs_grad((z0, base, w_a, std), (w_z, *params, *tau), actor)
    constants[-3:] = grad or wgrad or agrad, wgrad, agrad
    z0, noise = z0.contiguous(), noise.contiguous()
    return [z0, noise, base, w_a, w_z, w_tau, params, std, actor, *constants]


_register("rollout", {0: 0, 1: 1}, (1,), update=_update_rollout)
_register("imagine", {0: 0, 1: 1, 2: 0}, (1, 1), update=_update_imagine, broadcast=2)


# --- row-wise operators -------------------------------------------------------------------------


def _update_layer_norm_act(args: list[Any]) -> list[Any]:
    x, weight, bias, *constants, _ = args
    (save,) = needs_grad((x, weight, bias))
    return [x.contiguous(), weight.contiguous(), bias.contiguous(), *constants, save]


def _contiguous(args: list[Any]) -> list[Any]:
    return [x.contiguous() if isinstance(x, Tensor) else x for x in args]


def _without_gradient(name: str, argument: int) -> Update:
    """Refuse an argument that requires a gradient: the public operation could not see it do so."""

    def update(args: list[Any]) -> list[Any]:
        x = args[argument]
        if needs_grad(x if isinstance(x, list) else [x])[0]:
            raise no_gradient(f"{name} under vmap", f"argument {argument}")
        return _contiguous(args)

    return update


_register("layer_norm_act", {0: 0}, (0,), update=_update_layer_norm_act)
_register("simnorm", {0: 0}, (0,), update=_contiguous)
_register("two_hot_decode", {0: 0}, (0, 0, 0), update=_contiguous)
_register(
    "two_hot_cross_entropy",
    {0: 0, 1: 0},
    (0, 0),
    update=_without_gradient("two_hot_cross_entropy", 1),
)
_register("esnr", update=_without_gradient("esnr", 0))
for _name in (
    "centred",
    "centred_backward",
    "mlp_backward",
    "rollout_backward",
    "imagine_backward",
    "layer_norm_act_backward",
    "simnorm_backward",
    "two_hot_decode_backward",
    "two_hot_cross_entropy_backward",
):
    _register(_name)
