"""The fused operations as torch operators: schemas, shapes, gradients.

Each public operation is one forward and one backward operator. ``backend``, with the precision of
products as in ``"native+bf16"``, is a constant of the call, so a compiler sees one opaque operator
whatever runs inside. The backward operators have no
gradient of their own: differentiating twice raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from pwm_fast.backends.base import Kernels, TorchKernels
from pwm_fast.backends.precision import BY_NAME
from pwm_fast.backends.specs import DynamicsSpec, LayerSpec, decode_dynamics, decode_layers
from pwm_fast.fused.dynamics import dynamics_saved_buffers
from pwm_fast.fused.imagine import imagine_backward, imagine_forward
from pwm_fast.fused.mlp import mlp_forward, saved_buffers
from pwm_fast.fused.mlp_backward import mlp_backward
from pwm_fast.fused.rollout import Sizes, rollout_backward, rollout_forward
from pwm_fast.fused.wgrad import takes_16bit

_LIB = torch.library.Library("pwm_fast", "DEF")
IMPLEMENTATIONS: dict[str, Any] = {}  # what runs inside each operator, for looking into it


@lru_cache(maxsize=32)
def kernels(backend: str) -> Kernels:
    """The element kernels of a backend, as :func:`pwm_fast.backends.select.select` names it."""
    name, _, mode = backend.partition("+")
    precision = BY_NAME[mode or "exact"]
    if name == "native":
        from pwm_fast.backends.native import NativeKernels

        return NativeKernels(precision)
    if name == "triton":
        from pwm_fast.backends.triton import TritonKernels

        return TritonKernels(precision)
    return TorchKernels(precision)


def operand_dtype(backend: str, state: torch.dtype) -> torch.dtype:
    """Dtype of a backend's operands of products, where the state has dtype ``state``."""
    _, _, mode = backend.partition("+")
    return BY_NAME[mode or "exact"].dtype(state)


def define(name: str, schema: str, impl: Any, fake: Any) -> None:
    """Register operator ``pwm_fast::name``: its schema, what runs, and the shapes it returns."""
    IMPLEMENTATIONS[name] = impl

    def run(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _check_tangents(name, args)
        return impl(*args)

    _LIB.define(f"{name}{schema}")
    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pwm_fast::{name}", fake, lib=_LIB)


def _check_tangents(name: str, args: Sequence[Any]) -> None:
    """Raise if a forward-mode derivative would be lost."""
    for x in pytree.tree_leaves(args):
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"pwm_fast::{name} has no forward-mode derivative; use backend='reference'"
            )


def check_alone(name: str, *grads: Tensor | None) -> None:
    """Raise if gradients come many at a time by autograd's own batching, which has no rules."""
    if torch.compiler.is_dynamo_compiling():
        return
    for g in grads:
        if g is not None and torch._C._functorch.is_legacy_batchedtensor(g):
            raise RuntimeError(
                f"pwm_fast::{name} takes no gradients from is_grads_batched or vectorize=True; use "
                "torch.func.vmap, or backend='reference'"
            )


def register_gradient(name: str, backward: Any, setup_context: Any) -> None:
    """Register an operator's gradient."""
    torch.library.register_autograd(
        f"pwm_fast::{name}", backward, setup_context=setup_context, lib=_LIB
    )


def register_vmap(name: str, rule: Any) -> None:
    """Register how ``torch.vmap`` sees an operator."""
    torch.library.register_vmap(f"pwm_fast::{name}", rule, lib=_LIB)


def needs_grad(*groups: Sequence[Tensor]) -> list[bool]:
    """For each group whether a gradient towards one of its tensors will be asked for."""
    on = torch.is_grad_enabled()
    return [on and any(t.requires_grad for t in group) for group in groups]


def first_order_only(name: str) -> None:
    """Make differentiating a backward operator an error."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"pwm_fast::{name} has no second derivative; use backend='reference' to differentiate "
            "twice"
        )

    register_gradient(name, backward, setup_context)


def check_kept(name: str, save: bool) -> None:
    """Raise if a backward pass comes that the forward pass was not told of.

    Something stood between the public operation and what requires a gradient, and hid it.
    """
    if not save:
        raise RuntimeError(
            f"pwm_fast::{name} kept nothing for a backward pass: its tensors did not seem to "
            "require a gradient; use backend='reference'"
        )


def no_gradient(name: str, argument: str) -> RuntimeError:
    """What is raised where a gradient is asked for that an operator does not compute."""
    return RuntimeError(
        f"pwm_fast::{name} has no gradient towards {argument}; use backend='reference'"
    )


def filled(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """A schema's list of gradients holds tensors: an empty one stands for None."""
    return [like.new_empty(0) if g is None else g for g in grads]


def _restored(grads: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [g if want else None for g, want in zip(grads, wanted, strict=True)]


def _empty(like: Tensor, buffers: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    return [like.new_empty(shape, dtype=dtype) for shape, dtype in buffers]


# --- MLP ----------------------------------------------------------------------------------------


def _mlp(
    inputs: list[Tensor], params: list[Tensor], spec: str, backend: str, save: bool, wgrad: bool
) -> tuple[Tensor, list[Tensor]]:
    return mlp_forward(kernels(backend), decode_layers(spec), inputs, params, save, wgrad)


def _widths(specs: Sequence[LayerSpec], params: Sequence[Tensor]) -> list[int]:
    widths, i = [], 0
    for s in specs:
        widths.append(params[i].shape[-2])
        i += s.fields
    return widths


def _mlp_fake(
    inputs: list[Tensor], params: list[Tensor], spec: str, backend: str, save: bool, wgrad: bool
) -> tuple[Tensor, list[Tensor]]:
    specs = decode_layers(spec)
    widths = _widths(specs, params)
    x = inputs[0]
    rows = x.shape[0] * (params[0].shape[0] if params[0].dim() == 3 else 1)
    operand = operand_dtype(backend, x.dtype)
    buffers = saved_buffers(specs, widths, 1, rows, save, wgrad, operand, x.dtype)
    return x.new_empty(rows, widths[-1]), _empty(x, buffers)


define(
    "mlp",
    "(Tensor[] inputs, Tensor[] params, str spec, str backend, bool save, bool wgrad)"
    " -> (Tensor, Tensor[])",
    _mlp,
    _mlp_fake,
)


def _mlp_backward(
    dy: Tensor,
    inputs: list[Tensor],
    params: list[Tensor],
    saved: list[Tensor],
    needs: list[bool],
    spec: str,
    backend: str,
    wgrad: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    dinputs, dparams = mlp_backward(
        kernels(backend), decode_layers(spec), dy, inputs, params, saved, needs, wgrad
    )
    return filled(dinputs, dy), filled(dparams, dy)


def _mlp_backward_fake(
    dy: Tensor,
    inputs: list[Tensor],
    params: list[Tensor],
    saved: list[Tensor],
    needs: list[bool],
    spec: str,
    backend: str,
    wgrad: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    return (
        [x.new_empty(x.shape if n else (0,)) for x, n in zip(inputs, needs, strict=True)],
        [p.new_empty(p.shape if wgrad else (0,)) for p in params],
    )


define(
    "mlp_backward",
    "(Tensor dy, Tensor[] inputs, Tensor[] params, Tensor[] saved, bool[] needs, str spec,"
    " str backend, bool wgrad) -> (Tensor[], Tensor[])",
    _mlp_backward,
    _mlp_backward_fake,
)
first_order_only("mlp_backward")


def _mlp_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    x, params, ctx.spec, ctx.backend, ctx.save, ctx.wgrad = inputs
    ctx.counts = (len(x), len(params))
    ctx.save_for_backward(*x, *params, *output[1])


def _mlp_grad(ctx: Any, dy: Tensor | None, _: Any) -> Any:
    if dy is None:
        return None, None, None, None, None, None
    check_kept("mlp", ctx.save)
    check_alone("mlp", dy)
    n, m = ctx.counts
    tensors = ctx.saved_tensors
    needs_inputs = ctx.needs_input_grad[0]
    dinputs, dparams = torch.ops.pwm_fast.mlp_backward(
        dy,
        list(tensors[:n]),
        list(tensors[n : n + m]),
        list(tensors[n + m :]),
        list(needs_inputs),
        ctx.spec,
        ctx.backend,
        ctx.wgrad,
    )
    grads = _restored(dparams, [ctx.wgrad] * m)
    return _restored(dinputs, needs_inputs), grads, None, None, None, None


register_gradient("mlp", _mlp_grad, _mlp_setup)


class _EagerMlp(torch.autograd.Function):
    """The operator without the dispatcher, whose handling of lists is a third of a small call."""

    @staticmethod
    def forward(
        ctx: Any, count: int, spec: str, backend: str, save: bool, wgrad: bool, *tensors: Tensor
    ) -> Tensor:
        inputs, params = list(tensors[:count]), list(tensors[count:])
        y, saved = _mlp(inputs, params, spec, backend, save, wgrad)
        ctx.constants = (count, len(params), spec, backend, wgrad)
        ctx.save_for_backward(*tensors, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        check_alone("mlp", dy)
        count, others, spec, backend, wgrad = ctx.constants
        tensors = list(ctx.saved_tensors)
        inputs, params = tensors[:count], tensors[count : count + others]
        needs = list(ctx.needs_input_grad[5 : 5 + count])
        # Where the gradient is itself to be differentiated, the operator refuses.
        direct = not (torch.is_grad_enabled() or watched() or forward_ad._current_level >= 0)
        run = _mlp_backward if direct else torch.ops.pwm_fast.mlp_backward
        dinputs, dparams = run(
            dy, inputs, params, tensors[count + others :], needs, spec, backend, wgrad
        )
        return (
            *(None,) * 5,
            *_restored(dinputs, needs),
            *_restored(dparams, [wgrad] * others),
        )


def run_mlp(
    inputs: list[Tensor], params: list[Tensor], spec: str, backend: str, save: bool, wgrad: bool
) -> Tensor:
    """Operator ``mlp``, its output alone."""
    if watched() or not all(type(x) in _PLAIN for x in (*inputs, *params)):
        return torch.ops.pwm_fast.mlp(inputs, params, spec, backend, save, wgrad)[0]
    return _EagerMlp.apply(len(inputs), spec, backend, save, wgrad, *inputs, *params)


_PLAIN = (Tensor, torch.nn.Parameter)  # any other class may be a tracer's, without values


def watched() -> bool:
    """Whether somebody looks at operators: a compiler, a transform or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
    )


# --- rollout under given actions ----------------------------------------------------------------


def _rollout(
    z0: Tensor,
    c: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    spec: str,
    backend: str,
    save: bool,
    wgrad: bool,
) -> tuple[Tensor, list[Tensor]]:
    return rollout_forward(
        kernels(backend), decode_dynamics(spec), z0, c, w_z, w_tau, params, save, wgrad
    )


def _dynamics_buffers(
    spec: DynamicsSpec,
    w_z: Tensor,
    params: Sequence[Tensor],
    horizon: int,
    batch: int,
    save: bool,
    wgrad: bool,
    backend: str,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    first, *others = spec.layers
    widths = [w_z.shape[0], *_widths(others, params[2 if first.norm else 0 :])]
    operand = operand_dtype(backend, w_z.dtype)
    narrow = takes_16bit(kernels(backend), w_z)
    return dynamics_saved_buffers(
        spec, widths, w_z.shape[1], horizon, batch, save, wgrad, operand, w_z.dtype, narrow
    )


def dynamics_sizes(spec: DynamicsSpec, w_z: Tensor, params: Sequence[Tensor], batch: int) -> Sizes:
    """What the choice of a rollout's way looks at, from an operator's arguments."""
    first, *others = spec.layers
    widths = [w_z.shape[0], *_widths(others, params[2 if first.norm else 0 :])]
    return Sizes(batch, widths[0], widths[-2] if spec.fold else widths[-1])


def _rollout_fake(
    z0: Tensor,
    c: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    spec: str,
    backend: str,
    save: bool,
    wgrad: bool,
) -> tuple[Tensor, list[Tensor]]:
    horizon, batch = c.shape[:2]
    buffers = _dynamics_buffers(
        decode_dynamics(spec), w_z, params, horizon, batch, save, wgrad, backend
    )
    return z0.new_empty(horizon + 1, *z0.shape), _empty(z0, buffers)


define(
    "rollout",
    "(Tensor z0, Tensor c, Tensor w_z, Tensor? w_tau, Tensor[] params, str spec, str backend,"
    " bool save, bool wgrad) -> (Tensor, Tensor[])",
    _rollout,
    _rollout_fake,
)


def _rollout_backward(
    dz: Tensor,
    z0: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    saved: list[Tensor],
    spec: str,
    backend: str,
    wgrad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    grads, flat = rollout_backward(
        kernels(backend),
        decode_dynamics(spec),
        dz.contiguous(),
        z0,
        w_z,
        w_tau,
        params,
        saved,
        wgrad,
    )
    dw_z, dw_tau = filled((grads.w_z, grads.w_tau), dz)
    return grads.z0, grads.c, dw_z, dw_tau, filled(flat, dz)


def _rollout_backward_fake(
    dz: Tensor,
    z0: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    saved: list[Tensor],
    spec: str,
    backend: str,
    wgrad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    none = (0,)
    return (
        torch.empty_like(z0),
        z0.new_empty(dz.shape[0] - 1, dz.shape[1], w_z.shape[0]),
        z0.new_empty(w_z.shape if wgrad else none),
        z0.new_empty(w_tau.shape if wgrad and w_tau is not None else none),
        [z0.new_empty(p.shape if wgrad else none) for p in params],
    )


define(
    "rollout_backward",
    "(Tensor dz, Tensor z0, Tensor w_z, Tensor? w_tau, Tensor[] params, Tensor[] saved, str spec,"
    " str backend, bool wgrad) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _rollout_backward,
    _rollout_backward_fake,
)
first_order_only("rollout_backward")


def _rollout_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    z0, _, w_z, w_tau, params, ctx.spec, ctx.backend, ctx.save, ctx.wgrad = inputs
    ctx.has_tau, ctx.count = w_tau is not None, len(params)
    head = (z0, w_z) if w_tau is None else (z0, w_z, w_tau)
    ctx.save_for_backward(*head, *params, *output[1])


def _rollout_grad(ctx: Any, dz: Tensor | None, _: Any) -> Any:
    if dz is None:
        return (None,) * 9
    check_kept("rollout", ctx.save)
    check_alone("rollout", dz)
    tensors = list(ctx.saved_tensors)
    z0, w_z = tensors[:2]
    w_tau = tensors[2] if ctx.has_tau else None
    rest = tensors[2 + ctx.has_tau :]
    dz0, dc, dw_z, dw_tau, dparams = torch.ops.pwm_fast.rollout_backward(
        dz,
        z0,
        w_z,
        w_tau,
        rest[: ctx.count],
        rest[ctx.count :],
        ctx.spec,
        ctx.backend,
        ctx.wgrad,
    )
    wgrad = ctx.wgrad
    return (
        dz0,
        dc,
        dw_z if wgrad else None,
        dw_tau if wgrad and ctx.has_tau else None,
        _restored(dparams, [wgrad] * ctx.count),
        None,
        None,
        None,
        None,
    )


register_gradient("rollout", _rollout_grad, _rollout_setup)


# --- imagination --------------------------------------------------------------------------------


def _imagine(
    z0: Tensor,
    noise: Tensor,
    base: Tensor,
    w_a: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    std: Tensor,
    actor: list[Tensor],
    spec: str,
    actor_spec: str,
    detach: bool,
    backend: str,
    save: bool,
    wgrad: bool,
    actor_wgrad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return imagine_forward(
        kernels(backend),
        decode_dynamics(spec),
        decode_layers(actor_spec),
        z0,
        noise,
        base,
        w_a,
        w_z,
        w_tau,
        params,
        std,
        actor,
        save,
        wgrad,
        actor_wgrad,
    )


def _imagine_fake(
    z0: Tensor,
    noise: Tensor,
    base: Tensor,
    w_a: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    std: Tensor,
    actor: list[Tensor],
    spec: str,
    actor_spec: str,
    detach: bool,
    backend: str,
    save: bool,
    wgrad: bool,
    actor_wgrad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    horizon, batch = noise.shape[:2]
    buffers = _dynamics_buffers(
        decode_dynamics(spec), w_z, params, horizon, batch, save, wgrad, backend
    )
    specs = decode_layers(actor_spec)
    operand = operand_dtype(backend, z0.dtype)
    widths = _widths(specs, actor)
    buffers += saved_buffers(specs, widths, horizon, batch, save, actor_wgrad, operand, z0.dtype)
    return (
        z0.new_empty(horizon + 1, *z0.shape),
        z0.new_empty(noise.shape),
        _empty(z0, buffers),
    )


define(
    "imagine",
    "(Tensor z0, Tensor noise, Tensor base, Tensor w_a, Tensor w_z, Tensor? w_tau, Tensor[] params,"
    " Tensor std, Tensor[] actor, str spec, str actor_spec, bool detach, str backend, bool save,"
    " bool wgrad, bool actor_wgrad) -> (Tensor, Tensor, Tensor[])",
    _imagine,
    _imagine_fake,
)


def _imagine_backward(
    dz: Tensor,
    daction: Tensor,
    z: Tensor,
    action: Tensor,
    noise: Tensor,
    base: Tensor,
    w_a: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    std: Tensor,
    actor: list[Tensor],
    saved: list[Tensor],
    spec: str,
    actor_spec: str,
    detach: bool,
    backend: str,
    wgrad: bool,
    actor_wgrad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor, list[Tensor]]:
    grads, flat, dw_a, dstd, dactor = imagine_backward(
        kernels(backend),
        decode_dynamics(spec),
        decode_layers(actor_spec),
        dz.contiguous(),
        daction.contiguous(),
        z,
        action,
        noise,
        w_a,
        w_z,
        w_tau,
        params,
        std,
        actor,
        saved,
        detach,
        wgrad,
        actor_wgrad,
    )
    dbase = grads.c.sum(0)
    if base.shape[0] == 1:
        dbase = dbase.sum(0, keepdim=True)
    dw_z, dw_tau = filled((grads.w_z, grads.w_tau), dz)
    return (
        grads.z0,
        dbase,
        dw_a,
        dw_z,
        dw_tau,
        filled(flat, dz),
        dstd,
        filled(dactor, dz),
    )


def _imagine_backward_fake(
    dz: Tensor,
    daction: Tensor,
    z: Tensor,
    action: Tensor,
    noise: Tensor,
    base: Tensor,
    w_a: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    std: Tensor,
    actor: list[Tensor],
    saved: list[Tensor],
    spec: str,
    actor_spec: str,
    detach: bool,
    backend: str,
    wgrad: bool,
    actor_wgrad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor, list[Tensor]]:
    none = (0,)
    return (
        z.new_empty(z.shape[1:]),
        z.new_empty(base.shape),
        z.new_empty(w_a.shape),
        z.new_empty(w_z.shape if wgrad else none),
        z.new_empty(w_tau.shape if wgrad and w_tau is not None else none),
        [z.new_empty(p.shape if wgrad else none) for p in params],
        z.new_empty(std.shape),
        [z.new_empty(p.shape if actor_wgrad else none) for p in actor],
    )


define(
    "imagine_backward",
    "(Tensor dz, Tensor daction, Tensor z, Tensor action, Tensor noise, Tensor base, Tensor w_a,"
    " Tensor w_z, Tensor? w_tau, Tensor[] params, Tensor std, Tensor[] actor, Tensor[] saved,"
    " str spec, str actor_spec, bool detach, str backend, bool wgrad, bool actor_wgrad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor, Tensor[])",
    _imagine_backward,
    _imagine_backward_fake,
)
first_order_only("imagine_backward")


def _imagine_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    _, noise, base, w_a, w_z, w_tau, params, std, actor, *constants = inputs
    ctx.spec, ctx.actor_spec, ctx.detach, ctx.backend, ctx.save = constants[:5]
    ctx.wgrad, ctx.actor_wgrad = constants[5:]
    ctx.has_tau, ctx.counts = w_tau is not None, (len(params), len(actor))
    z, action, saved = output
    head = [z, action, noise, base, w_a, w_z, std]
    if w_tau is not None:
        head.append(w_tau)
    ctx.save_for_backward(*head, *params, *actor, *saved)


def _imagine_grad(ctx: Any, dz: Tensor | None, daction: Tensor | None, _: Any) -> Any:
    check_kept("imagine", ctx.save)
    check_alone("imagine", dz, daction)
    if ctx.needs_input_grad[1]:
        raise no_gradient("imagine", "noise")
    tensors = list(ctx.saved_tensors)
    z, action, noise, base, w_a, w_z, std = tensors[:7]
    w_tau = tensors[7] if ctx.has_tau else None
    rest = tensors[7 + ctx.has_tau :]
    n, m = ctx.counts
    params, actor, saved = rest[:n], rest[n : n + m], rest[n + m :]
    dz0, dbase, dw_a, dw_z, dw_tau, dparams, dstd, dactor = torch.ops.pwm_fast.imagine_backward(
        torch.zeros_like(z) if dz is None else dz,
        torch.zeros_like(action) if daction is None else daction,
        z,
        action,
        noise,
        base,
        w_a,
        w_z,
        w_tau,
        params,
        std,
        actor,
        saved,
        ctx.spec,
        ctx.actor_spec,
        ctx.detach,
        ctx.backend,
        ctx.wgrad,
        ctx.actor_wgrad,
    )
    wgrad, actor_wgrad = ctx.wgrad, ctx.actor_wgrad
    return (
        dz0,
        None,
        dbase,
        dw_a,
        dw_z if wgrad else None,
        dw_tau if wgrad and ctx.has_tau else None,
        _restored(dparams, [wgrad] * n),
        dstd,
        _restored(dactor, [actor_wgrad] * m),
        *(None,) * 7,
    )


register_gradient("imagine", _imagine_grad, _imagine_setup)
