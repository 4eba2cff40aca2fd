"""Torch operators, declared once: schema, shapes, gradients, vmap and the short way past all that.

An :class:`Operator` is a forward and a backward function of tensors and constants, on the kernels
of a backend. The class makes of them ``pwm_fast::<name>`` and ``pwm_fast::<name>_backward``, which
compilers see as one opaque call each. Where nobody looks at operators, a call goes past the
dispatcher, whose handling of lists takes a third of a small call's time.

What to keep for a backward pass is decided before a call, from the tensors that require gradients;
inside ``torch.vmap``, where no tensor shows it, by the rule (:mod:`pwm_fast.ops.batching`). The
backward operators have no gradient of their own: differentiating twice raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from pwm_fast.backends import select
from pwm_fast.backends.select import Choice
from pwm_fast.backends.transforms import PLAIN, compiled_or_mapped, in_memory, watched
from pwm_fast.ops import batching
from pwm_fast.ops.registration import (
    WHERE,
    check_alone,
    define,
    first_order_only,
    keep_nothing,
    no_gradient,
    parameters,
    register_gradient,
    register_vmap,
    registered,
)


class _NoKernels:
    """Kernels that do nothing: on fake tensors a function then gives its shapes."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class Operator:
    """One operator with its gradient. A subclass is the declaration, an instance the operator.

    A subclass has ``forward(k, ...)`` and, if it has a gradient, ``backward(k, ...)``, both static:
    ``k`` are the kernels of the chosen backend, the annotations make the schema. The parameters of
    ``backward`` name what it needs: ``d<output>`` is the gradient of an output, ``needs`` says
    which tensors of the first input, a list, want a gradient, and any other name is an input or an
    output of ``forward``. A gradient that nobody asked for is None.

    Attributes:
        name: of the operator.
        family: of its kernels, see :data:`pwm_fast.backends.base.FAMILIES`.
        outputs: names of what ``forward`` returns, in order.
        results: how many of them callers see; the others are kept for the backward pass.
        grads: inputs that ``backward`` returns gradients of, in order.
        refused: inputs that never get a gradient: asking for one raises.
        flags: bool parameters of ``forward``, each true where one of the named inputs requires a
            gradient; ``save``, if there is such a parameter, where any does.
        mutates: inputs that ``forward`` writes to.
        contiguous: inputs (or lists of them) that kernels index without strides.
        rows: for vmap, inputs that vary by row, each with its axis of rows; without any a mapped
            call is a loop.
        row_axes: axes of rows of the results.
        broadcast: the input whose only row may stand for all, or None.
        eager: calls may go past the dispatcher; not where a result is a list.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    results: ClassVar[int] = 1
    grads: ClassVar[tuple[str, ...]] = ()
    refused: ClassVar[tuple[str, ...]] = ()
    flags: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    mutates: ClassVar[tuple[str, ...]] = ()
    contiguous: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[Mapping[str, int]] = {}
    row_axes: ClassVar[tuple[int, ...]] = ()
    broadcast: ClassVar[str | None] = None
    eager: ClassVar[bool] = True

    forward: ClassVar[Any]
    backward: ClassVar[Any] = None

    def __init__(self) -> None:
        self.inputs = parameters(self.forward)
        self._position = {name: i for i, name in enumerate(self.inputs)}
        self._decided = [n for n in self.inputs if n == "save" or n in self.flags]
        types = inspect.signature(self.forward).parameters
        self._lists = {n for n in self.inputs if types[n].annotation.startswith("list[Tensor")}
        self._tensors = [n for n in self.inputs if "Tensor" in types[n].annotation]
        self._refused = [(n, self._position[n]) for n in self.refused]
        self._contiguous = [self._position[n] for n in self.contiguous]
        define(self.name, self.forward, self.fake, self.family, self.mutates)
        if self.backward is None:
            if self.refused:
                register_gradient(self.name, self._refuse, keep_nothing)
        else:
            # Of its own name, which PyTorch's messages have: "output 0 of pwm_fast_simnorm".
            self._eager: Any = type(f"pwm_fast_{self.name}", (_Eager,), {})
            self._needed = parameters(self.backward)
            annotations = inspect.get_annotations(self.backward).values()
            self._alone = any("list" in text for text in annotations)
            define(f"{self.name}_backward", _filled(self.backward), self.fake_backward, self.family)
            first_order_only(f"{self.name}_backward")
            register_gradient(self.name, self._gradient, self._setup)
            register_vmap(
                f"{self.name}_backward", batching.rule(registered(f"{self.name}_backward"))
            )
        self._operator = registered(self.name)
        if not self.mutates:
            self._map()

    # --- what a subclass may say otherwise ------------------------------------------------------

    @classmethod
    def fake(cls, k: Any, a: Any) -> Any:
        """Shapes of what ``forward`` returns for arguments ``a``, its attributes."""
        return cls.forward(_NoKernels(), **vars(a))

    @classmethod
    def fake_backward(cls, k: Any, a: Any) -> Any:
        """Shapes of the gradients: those of the inputs, empty where nobody asks for one.

        An input that ``backward`` does not take is shaped as the first result, unless a subclass
        sets it as an attribute of ``a``.
        """
        like = getattr(a, f"d{cls.outputs[0]}")
        flagged = {n: getattr(a, flag) for flag, names in cls.flags.items() for n in names}

        def shaped(x: Tensor | None, wanted: bool) -> Tensor:
            return like.new_empty((0,) if x is None or not wanted else x.shape)

        grads: list[Any] = []
        for n in cls.grads:
            x, wanted = getattr(a, n, like), flagged.get(n, True)
            if isinstance(x, list):
                each = a.needs if n == cls.grads[0] and hasattr(a, "needs") else [wanted] * len(x)
                grads.append([shaped(y, need) for y, need in zip(x, each, strict=True)])
            else:
                grads.append(shaped(x, wanted))
        return grads[0] if len(grads) == 1 else tuple(grads)

    @classmethod
    def members(cls, args: Mapping[str, Any]) -> int:
        """How many times the rows of the results are those of the inputs, for vmap."""
        return 1

    @classmethod
    def ensemble(
        cls, size: int, dims: Mapping[str, Any], args: Mapping[str, Any]
    ) -> Sequence[Any] | None:
        """Another way to map: arguments of one call, rows of whose result are ``[size, R]``."""
        return None

    # --- a call ---------------------------------------------------------------------------------

    def __call__(self, *args: Any, choice: Choice) -> Any:
        """Run on a backend: the inputs of ``forward`` in order, without the flags.

        Returns:
            The results: a tensor, or a tuple where there are several.
        """
        named, differentiated = self.prepare(list(args))
        where = choice.backend.name, choice.precision.name
        if watched() or not self.eager or not self._plain(named):
            out = self._operator(*named, *where)
            if not isinstance(out, (tuple, list)):
                return out
            return out[0] if self.results == 1 else tuple(out[: self.results])
        if not differentiated or self.backward is None:
            out = self.forward(select.kernels(self.family, *where), *named)
            if not isinstance(out, tuple):
                return out
            return out[0] if self.results == 1 else out[: self.results]
        flat: list[Tensor] = []
        counts: list[Any] = []
        for n, value in zip(self.inputs, named, strict=True):
            if n in self._lists:
                counts.append(len(value))
                flat += value
            elif isinstance(value, Tensor):
                counts.append(None)
                flat.append(value)
            else:
                counts.append((value,))
        return self._eager.apply(self, counts, where, *flat)

    def prepare(self, args: list[Any]) -> tuple[list[Any], bool]:
        """The inputs of ``forward`` with its flags, and whether there will be a backward pass.

        Args:
            args: the inputs without flags, in order; changed.

        Raises:
            RuntimeError: a gradient is asked for that the operator does not compute.
        """
        for name in self._decided:
            args.insert(self._position[name], False)
        for i in self._contiguous:
            x = args[i]
            args[i] = [y.contiguous() for y in x] if isinstance(x, list) else _contiguous(x)
        if not torch.is_grad_enabled():
            return args, False
        for name, i in self._refused:
            if _requires_grad(args[i]):
                raise no_gradient(self.name, name)
        wanted = {n: _requires_grad(args[self._position[n]]) for n in self.grads}
        for flag, members in self.flags.items():
            args[self._position[flag]] = any(wanted[n] for n in members)
        kept = any(wanted.values())
        if "save" in self._position:
            args[self._position["save"]] = kept
        if kept and not compiled_or_mapped():  # autograd refuses to keep tensors of inference mode
            for n in self._tensors:
                args[self._position[n]] = savable(args[self._position[n]])
        return args, kept

    def _plain(self, args: Sequence[Any]) -> bool:
        """Whether all tensors hold their values themselves."""
        for n in self._tensors:
            x = args[self._position[n]]
            for y in x if isinstance(x, list) else (x,):
                if y is not None and not (type(y) in PLAIN and in_memory(y)):
                    return False
        return True

    # --- gradients ------------------------------------------------------------------------------

    def _refuse(self, ctx: Any, *grads: Any) -> Any:
        raise no_gradient(self.name, self.refused[0])

    def _setup(self, ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        self._keep(ctx, inputs[: len(self.inputs)], outputs)
        ctx.where = tuple(inputs[len(self.inputs) :])

    def _keep(self, ctx: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Keep what the backward function names."""
        named = {**dict(zip(self.inputs, inputs, strict=True)), **dict(zip(self.outputs, outputs))}  # noqa: B905
        tensors: list[Tensor | None] = []
        ctx.kept = {}
        for n in self._needed:
            value = named.get(n)
            if isinstance(value, Tensor):
                ctx.kept[n] = len(tensors)
                tensors.append(value)
            elif isinstance(value, list) and (n in self._lists or n in self.outputs):
                ctx.kept[n] = slice(len(tensors), len(tensors) + len(value))
                tensors += value
            elif n in named:
                ctx.kept[n] = (value,)
        ctx.save = named.get("save", True)
        ctx.save_for_backward(*tensors)

    def _arguments(self, ctx: Any, grads: Sequence[Tensor | None], needs: Sequence[Any]) -> Any:
        """What the backward function is called with; ``needs`` is what autograd says."""
        if not ctx.save:
            # Something stood between the public operation and what requires a gradient.
            raise RuntimeError(
                f"pwm_fast::{self.name} kept nothing for a backward pass: its tensors did not seem "
                "to require a gradient; use backend='reference'"
            )
        if self._alone:
            check_alone(self.name, *grads)
        for n, i in self._refused:
            if any(needs[i]) if isinstance(needs[i], (tuple, list)) else needs[i]:
                raise no_gradient(self.name, n)
        saved = ctx.saved_tensors
        args: list[Any] = []
        for n in self._needed:
            if n == "needs":
                args.append(list(needs[0]))
            elif n in ctx.kept:
                where = ctx.kept[n]
                if isinstance(where, tuple):
                    args.append(where[0])
                else:
                    args.append(list(saved[where]) if isinstance(where, slice) else saved[where])
            else:
                output = self.outputs.index(n[1:])
                grad = grads[output]
                if grad is None:
                    grad = torch.zeros_like(saved[ctx.kept[n[1:]]])
                args.append(grad)
        return args

    def _gradient(self, ctx: Any, *grads: Any) -> Any:
        size = len(self.inputs) + len(WHERE)
        if all(g is None for g in grads[: self.results]) and not isinstance(grads[0], list):
            return (None,) * size
        needs = ctx.needs_input_grad
        args = self._arguments(ctx, grads, needs)
        found = registered(f"{self.name}_backward")(*args, *ctx.where)
        # PyTorch wants a list for each list, None for those of constants alone.
        result: list[Any] = [
            [None] * len(need) if isinstance(need, (tuple, list)) else None for need in needs
        ]
        for n, grad in zip(self.grads, _several(found, self.grads), strict=True):
            i = self._position[n]
            result[i] = self._wanted(grad, needs[i])
        return tuple(result)

    def _wanted(self, grad: Any, needs: Any) -> Any:
        if isinstance(grad, list):
            each = needs if isinstance(needs, (tuple, list)) else [needs] * len(grad)
            return [self._wanted(g, need) for g, need in zip(grad, each, strict=True)]
        if grad is None or not needs:
            return None
        return None if tuple(grad.shape) == (0,) else grad  # an operator's empty one is None

    # --- vmap -----------------------------------------------------------------------------------

    def _map(self) -> None:
        def update(args: list[Any]) -> list[Any]:
            """Decide anew, inside vmap."""
            where = args[len(self.inputs) :]
            own = [x for n, x in zip(self.inputs, args, strict=False) if n not in self._decided]
            for n, i in self._refused:
                if torch.is_grad_enabled() and _requires_grad(args[i]):
                    raise no_gradient(f"{self.name} under vmap", n)
            return [*self.prepare(own)[0], *where]

        def named(values: Sequence[Any]) -> dict[str, Any]:
            return dict(zip((*self.inputs, *WHERE), values, strict=True))

        def ensemble(size: int, dims: Sequence[Any], args: Sequence[Any]) -> Any:
            return self.ensemble(size, named(dims), named(args))

        rule = batching.rule(
            self._operator,
            {self._position[n]: axis for n, axis in self.rows.items()},
            self.row_axes,
            update=update,
            members=lambda args: self.members(named(args)),
            broadcast=None if self.broadcast is None else self._position[self.broadcast],
            ensemble=ensemble,
        )
        register_vmap(self.name, rule)


class _Eager(torch.autograd.Function):
    """An operator with a gradient, without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Operator,
        counts: list[Any],
        where: tuple[str, str],
        *flat: Tensor,
    ) -> Any:
        inputs: list[Any] = []
        i = 0
        for count in counts:
            if count is None:
                inputs.append(flat[i])
                i += 1
            elif isinstance(count, tuple):
                inputs.append(count[0])
            else:
                inputs.append(list(flat[i : i + count]))
                i += count
        out = operator.forward(select.kernels(operator.family, *where), *inputs)
        outputs = out if isinstance(out, tuple) else (out,)
        ctx.set_materialize_grads(False)
        operator._keep(ctx, inputs, outputs)
        ctx.operator, ctx.counts, ctx.where = operator, counts, where
        return outputs[0] if operator.results == 1 else outputs[: operator.results]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        operator, counts = ctx.operator, ctx.counts
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        flags = iter(ctx.needs_input_grad[3:])
        needs: list[Any] = []
        for count in counts:
            if count is None:
                needs.append(next(flags))
            elif isinstance(count, tuple):
                needs.append(False)
            else:
                needs.append([next(flags) for _ in range(count)])
        args = operator._arguments(ctx, grads, needs)
        # Where the gradient is itself to be differentiated, the operator refuses.
        seen = torch.is_grad_enabled() or watched() or forward_ad._current_level >= 0
        if seen or not all(g is None or in_memory(g) for g in grads):
            found = registered(f"{operator.name}_backward")(*args, *ctx.where)
        else:
            found = operator.backward(select.kernels(operator.family, *ctx.where), *args)
        result: list[Any] = [None] * 3
        by_name = dict(zip(operator.grads, _several(found, operator.grads), strict=True))
        for n, count, need in zip(operator.inputs, counts, needs, strict=True):
            if isinstance(count, tuple):
                continue
            grad = by_name.get(n)
            if grad is None:
                result += [None] * (1 if count is None else count)
            elif count is None:
                result.append(operator._wanted(grad, need))
            else:
                result += operator._wanted(grad, need)
        return tuple(result)


def _several(found: Any, grads: Sequence[str]) -> Sequence[Any]:
    """What a backward function returned, an entry for each of its gradients."""
    return (found,) if len(grads) == 1 else found


def _filled(backward: Any) -> Any:
    """A backward function with an empty tensor for each None, which no schema can return."""

    @wraps(backward)
    def run(k: Any, *args: Any) -> Any:
        def fill(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(fill(y) for y in x)
            if x is not None:
                return x
            return next(y for y in pytree.tree_leaves(args) if isinstance(y, Tensor)).new_empty(0)

        return fill(backward(k, *args))

    return run


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) else x


def _requires_grad(x: Any) -> bool:
    if isinstance(x, list):
        return any(y.requires_grad for y in x)
    return x is not None and x.requires_grad


def savable(x: Any) -> Any:
    """A tensor or a list of them; copies of those of inference mode, which autograd refuses."""
    if isinstance(x, list):
        return [savable(y) for y in x]
    return x.clone() if x is not None and x.is_inference() else x


def require_grad(*groups: Sequence[Tensor]) -> bool:
    """Whether a gradient towards one of these tensors will be asked for."""
    return torch.is_grad_enabled() and any(t.requires_grad for group in groups for t in group)


def as_rows(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[R, K]`` with a last stride of 1."""
    x = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
