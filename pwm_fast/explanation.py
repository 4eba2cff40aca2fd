"""``pwm_fast.explain``: what a call of an operation would do, without doing it.

The call runs on tensors without data (PyTorch's fake tensors), and what it does is written down. So
nothing here repeats what the operations decide for themselves.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.backends.specs import decode_dynamics
from pwm_fast.backends.transforms import STANDS_FOR
from pwm_fast.fused.dynamics import dynamics_weights
from pwm_fast.fused.rollout import Candidate, candidates, sizes_of


@dataclass(frozen=True)
class Verdict:
    """What a backend says of a call.

    Attributes:
        backend: its name.
        reason: why it cannot run the call, or None if it can.
        automatic: ``auto`` may take it.
    """

    backend: str
    reason: str | None
    automatic: bool


@dataclass(frozen=True)
class Selection:
    """A choice of backend.

    Attributes:
        operation: the name that it was declared with.
        asked: what was asked for by argument, context or environment: a backend, or ``auto``.
        backend: the one that runs, or None where what was asked for cannot.
        verdicts: of all backends, in the order of preference.
    """

    operation: str
    asked: str
    backend: str | None
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Explanation:
    """What a call would do; ``print`` it.

    Attributes:
        op: name of the public operation.
        backend: the backend that runs its first and largest part; None where the call raises.
        selections: every choice that the call makes, each once, in order. Empty for operations
            that are plain PyTorch and nothing else.
        operators: the fused operators that run, with what they are told; empty on ``reference``.
        fold: whether the velocity head is folded into the hidden state; None where there is none.
        architecture: ways to run a rollout's macro steps, in the order of preference, the first
            without a reason being taken; empty for other operations and on ``reference``.
        copies: arguments that are copied, and why.
        gradients: arguments towards which a backward pass computes gradients.
        constants: arguments that get none.
        error: what the call raises, or None.
    """

    op: str
    backend: str | None
    selections: tuple[Selection, ...]
    operators: tuple[str, ...]
    fold: bool | None
    architecture: tuple[Candidate, ...]
    copies: tuple[str, ...]
    gradients: tuple[str, ...]
    constants: tuple[str, ...]
    error: str | None

    def __str__(self) -> str:
        """Several lines."""
        rows: list[tuple[str, str]] = []
        if not self.selections:
            rows.append(("backend", "plain PyTorch; it has no other"))
        for i, s in enumerate(self.selections):
            taken = "none" if s.backend is None else s.backend
            rows.append(
                ("backend" if i == 0 else f"its {s.operation}", f"{taken} (asked for: {s.asked})")
            )
            if i == 0 or s.backend != self.backend:
                rows += [(f"  {v.backend}", _verdict(v)) for v in s.verdicts]
        rows += [("operators" if i == 0 else "", o) for i, o in enumerate(self.operators)]
        if self.fold is not None:
            rows.append(("fold", "yes" if self.fold else "no"))
        for i, way in enumerate(self.architecture):
            text = "can" if way.reason is None else f"cannot: {way.reason}"
            if i == 0:
                taken = next(w.name for w in self.architecture if w.reason is None)
                rows.append(("macro steps", taken))
            rows.append((f"  {way.name}", text))
        rows += [("copies" if i == 0 else "", c) for i, c in enumerate(self.copies or ("none",))]
        rows.append(("gradients", ", ".join(self.gradients) or "none"))
        if self.gradients and self.constants:
            rows.append(("  none towards", ", ".join(self.constants)))
        if self.error is not None:
            rows.append(("raises", self.error))
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"ops.{self.op}", *(f"  {name:{width}}  {text}" for name, text in rows)])


def _verdict(v: Verdict) -> str:
    if v.reason is not None:
        return f"cannot: {v.reason}"
    return "can" if v.automatic else "can, but only where it is asked for"


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run a call and what it would do, without running it.

    Args:
        op: a function of :mod:`pwm_fast.ops`, or its name.
        *args: what it would be called with.
        **kwargs: likewise.

    Raises:
        ValueError: there is no such operation, or it raises this for these arguments.
        TypeError: the operation raises it for these arguments.
    """
    name, function = _operation(op)
    bound = inspect.signature(function).bind(*args, **kwargs)
    named = dict(_tensors(bound.arguments))
    trace = _Trace()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = {id(x): _fake(mode, x) for x in named.values()}
    trace.names = {fakes[id(x)].untyped_storage()._cdata: n for n, x in reversed(named.items())}
    selections: dict[Selection, None] = {}

    def observe(operation: str, asked: str, taken: str | None, call: select.Call) -> None:
        verdicts = tuple(
            Verdict(v.backend.name, v.reason, v.backend.automatic)
            for v in select.verdicts(operation, call)
        )
        selections[Selection(operation, asked, taken, verdicts)] = None

    error = None
    with select.observed(observe), mode, trace:
        try:
            function(*_faked(bound.args, fakes), **_faked(bound.kwargs, fakes))
        except select.BackendError as refusal:
            error = f"BackendError: {refusal}"
    first = next(iter(selections), None)
    towards, constants = _gradients(named)
    return Explanation(
        name,
        "reference" if first is None else first.backend,
        tuple(selections),
        tuple(trace.operators()),
        trace.fold,
        trace.architecture,
        tuple(trace.copies()),
        towards,
        constants,
        error,
    )


def _fake(mode: FakeTensorMode, x: Tensor) -> Tensor:
    """A tensor without data that operations treat as ``x``."""
    tangent = None if forward_ad._current_level < 0 else forward_ad.unpack_dual(x).tangent
    if tangent is None:
        fake = mode.from_tensor(x)
        setattr(fake, STANDS_FOR, type(x))
        return fake
    return forward_ad.make_dual(mode.from_tensor(x.detach()), mode.from_tensor(tangent.detach()))


def _operation(op: Callable[..., Any] | str) -> tuple[str, Callable[..., Any]]:
    names = [n for n in ops.__all__ if inspect.isfunction(getattr(ops, n))]
    for name in names:
        if op == name or op is getattr(ops, name):
            return name, getattr(ops, name)
    raise ValueError(f"op must be a function of pwm_fast.ops ({', '.join(names)}), got {op!r}")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of an argument, by names such as ``net[0].weight``."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, key)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for field, part in zip(value._fields, value, strict=True):
            yield from _tensors(part, f"{name}.{field}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _tensors(part, f"{name}[{i}]")


def _faked(value: Any, fakes: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fakes[id(value)]
    if isinstance(value, dict):
        return {key: _faked(part, fakes) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_faked(part, fakes) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_faked(part, fakes) for part in value)
    return value


def _gradients(named: dict[str, Tensor]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Arguments with and without gradients; several tensors of one are counted."""
    on = torch.is_grad_enabled()
    total: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for name, x in named.items():
        argument = name.partition("[")[0]
        total[argument] += 1
        wanted[argument] += on and x.requires_grad
    towards = [
        n if total[n] == 1 else f"{n} ({wanted[n]} of {total[n]} tensors)"
        for n in total
        if wanted[n]
    ]
    return tuple(towards), tuple(n for n in total if not wanted[n])


_COPIES = {
    "aten::clone": "made contiguous",
    "aten::_to_copy": "converted",
    "aten::cat": "concatenated",
    "aten::copy_": "copied",
}


class _Trace(TorchDispatchMode):
    """Writes down fused operators, and copies of tensors whose storages have names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        self.fold: bool | None = None
        self.architecture: tuple[Candidate, ...] = ()
        self._operators: Counter[str] = Counter()
        self._copies: dict[tuple[str, str], list[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if func.namespace == "pwm_fast":
            self._note_operator(func, args)
        elif name in _COPIES and isinstance(result, Tensor):
            sources = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
            for x in sources if name != "aten::copy_" else args[1:2]:
                argument = self.names.get(x.untyped_storage()._cdata)
                if argument is not None:
                    size = x.numel() * x.element_size()
                    self._copies.setdefault((argument, _COPIES[name]), []).append(size)
        return result

    def _note_operator(self, func: Any, args: tuple[Any, ...]) -> None:
        told = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        if "w_z" in told:
            spec = decode_dynamics(told["spec"])
            self.fold = spec.fold if spec.method != "map" else None
            z0 = told["z0"]
            weights = dynamics_weights(spec, told["w_z"], told["w_tau"], told["params"])
            sizes = sizes_of(spec, weights, z0.shape[0])
            kernels = select.kernels("gemm", told["backend"], told["precision"])
            found = candidates(kernels, spec, sizes, z0.device)
            self.architecture = tuple(found)
        facts = []
        for flag, whose in (("wgrad", "parameters"), ("actor_wgrad", "the policy's parameters")):
            if flag in told:
                facts.append(f"gradients of {whose}: {'yes' if told[flag] else 'no'}")
        precision = told["precision"]
        if precision != "exact":
            facts.append(f"precision: {precision}")
        if "save" in told:
            facts.append(f"kept for a backward pass: {'yes' if told['save'] else 'nothing'}")
        self._operators[
            f"{func._schema.name} ({'; '.join(facts)})" if facts else func._schema.name
        ] += 1

    def operators(self) -> list[str]:
        return [f"{n} times {text}" if n > 1 else text for text, n in self._operators.items()]

    def copies(self) -> list[str]:
        return [
            f"{name} {how}"
            + (f" {len(sizes)} times" if len(sizes) > 1 else "")
            + f", {sum(sizes) / 1024:.1f} KiB"
            for (name, how), sizes in self._copies.items()
        ]
