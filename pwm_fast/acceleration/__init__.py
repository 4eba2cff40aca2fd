"""``pwm_fast.accelerate``: run somebody's own modules on the operations."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from pwm_fast.acceleration.checking import check
from pwm_fast.acceleration.functional import holds_stacked, mapped_again, mapped_module
from pwm_fast.acceleration.matching import Mismatch, is_candidate, match, member_of
from pwm_fast.acceleration.stack import AcceleratedStack, assemble, own_dictionaries

__all__ = ["AccelerationReport", "AccelerationWarning", "Found", "accelerate"]


class AccelerationWarning(UserWarning):
    """Something that looks like a stack of layers was left alone."""


@dataclass(frozen=True)
class Found:
    """A module that was looked at.

    Attributes:
        name: its path within the module that was given, ``""`` for that module itself.
        kind: name of its class.
        parameters: how many numbers it holds.
        reason: why it was left alone; None where it is accelerated.
    """

    name: str
    kind: str
    parameters: int
    reason: str | None = None

    def __str__(self) -> str:
        """One line."""
        line = f"{found_name(self.name)} ({self.kind}, {self.parameters:,} parameters)"
        return line if self.reason is None else f"{line}: {self.reason}"


@dataclass(frozen=True)
class AccelerationReport:
    """What :func:`accelerate` did; ``print`` it.

    Attributes:
        accelerated: the stacks that run on the operations.
        left: stacks of layers that do not, with the reasons.
        others: modules with parameters that are no stacks of layers.
        notes: what else to know.
    """

    accelerated: tuple[Found, ...]
    left: tuple[Found, ...]
    others: tuple[Found, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Several lines."""
        lines = []
        for title, found in (
            ("accelerated", self.accelerated),
            ("left alone", self.left),
            ("no stack of layers", self.others),
        ):
            lines.append(f"{title}:" if found else f"{title}: none")
            lines += [f"  {f}" for f in found]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def accelerate(module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Run the stacks of layers in a module on :mod:`pwm_fast.ops`.

    A stack is an ``nn.Sequential`` of

    - NormedLinear modules as TD-MPC2 and PWM write them: ``weight``, ``bias``, ``ln`` (an
      ``nn.LayerNorm``), ``act`` (Mish, SimNorm with its group width as ``dim``, Identity) and
      perhaps a ``dropout``; or ``nn.Linear``, ``nn.LayerNorm``, such an activation in a row;
    - or, the actor's and critics' order, ``nn.Linear``, ``nn.Mish``, ``nn.LayerNorm`` in a row;

    ended by any of these or a plain ``nn.Linear``, with an ``nn.Dropout`` after a Linear or
    without. Stacks are looked for in all of the module's children. Each is checked by its structure
    and by running it against the operations, on a copy with random parameters: values and
    gradients. What is not the same is left alone.

    Of a functional ensemble the stack is the module that the stacked parameters are put into: a
    child or attribute, perhaps on the meta device, or what ``torch.vmap`` of functorch's
    ``combine_state_for_ensemble`` calls. Under ``torch.vmap`` it then is one operation for all
    members. An ensemble whose stack cannot be reached is left alone, and the report says what to
    do.

    The stack's own modules stay and go on holding the parameters: parameters are the same objects,
    state_dict has the same keys, optimisers keep working, ``to``, ``train``, ``deepcopy``, pickle
    and ``torch.compile`` do what they did. A stack whose modules are changed later (a hook, a
    replaced layer, a new Dropout) goes back to running them one by one.

    Args:
        module: a stack, or a module with stacks among its children.
        inplace: put the accelerated stacks into ``module`` itself, so that everything that holds it
            gains. A ``module`` that is itself a stack cannot be changed in place.

    Returns:
        A new module of the same class that shares parameters, buffers, and all children in which
        nothing was accelerated; with ``inplace`` the module itself; for a stack an
        ``nn.Sequential``. Where nothing can be accelerated, ``module``. Its attribute
        ``acceleration_report`` is an :class:`AccelerationReport`.

    Warns:
        AccelerationWarning: a stack was left alone, or there was none.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    walk = _Walk(inplace)
    result = walk.visit(module, "")
    report = AccelerationReport(
        tuple(walk.accelerated),
        tuple(walk.left),
        tuple(_others(result, "", {f.name for f in walk.left})),
        tuple(walk.notes),
    )
    result.acceleration_report = report  # type: ignore[assignment]
    if report.left:
        text = "\n".join(f"  {f}" for f in report.left)
        warnings.warn(f"left alone:\n{text}", AccelerationWarning, stacklevel=2)
    elif not report.accelerated:
        warnings.warn(
            f"{type(module).__name__} holds no nn.Sequential of layers to accelerate",
            AccelerationWarning,
            stacklevel=2,
        )
    return result


_SEALED = {
    "OptimizedModule": "it is compiled: accelerate first, then compile",
    "DistributedDataParallel": "it is wrapped: accelerate first, then wrap",
    "FullyShardedDataParallel": "it is wrapped: accelerate first, then wrap",
    "ScriptModule": "it is scripted",
    "GraphModule": "it is a traced graph",
}


_TEMPLATE = "is on the meta device: it runs on the parameters that its owner puts into it"
_HIDDEN = (
    "it holds stacked parameters but not the module that they are put into: accelerate each member "
    "before you stack them"
)


class _Walk:
    def __init__(self, inplace: bool) -> None:
        self.inplace = inplace
        self.accelerated: list[Found] = []
        self.left: list[Found] = []
        self.notes: list[str] = []
        self._done: dict[int, nn.Module] = {}

    def visit(self, module: nn.Module, name: str) -> nn.Module:
        """The module that takes this one's place: itself, where nothing in it changes."""
        if id(module) not in self._done:
            self._done[id(module)] = self._visit(module, name)
        return self._done[id(module)]

    def _visit(self, module: nn.Module, name: str) -> nn.Module:
        found = Found(name, type(module).__name__, _count(module))
        sealed = [_SEALED[c.__name__] for c in type(module).__mro__ if c.__name__ in _SEALED]
        if sealed:
            self.left.append(_because(found, sealed[0]))
            return module
        if isinstance(module, AcceleratedStack):
            self.accelerated.append(found)
            return module
        if is_candidate(module):
            assert isinstance(module, nn.Sequential)
            try:
                member = member_of(module)
                plan = match(member)
                check(member, plan)
            except Mismatch as reason:
                self.left.append(_because(found, str(reason)))
            else:
                self.accelerated.append(found)
                if next(member.parameters()).is_meta:
                    self.notes.append(f"{found_name(name)} {_TEMPLATE}")
                return assemble(module, plan)
        before = len(self.accelerated), len(self.left)
        prefix = f"{name}." if name else ""
        changed = {}
        for key, child in module._modules.items():
            if child is not None:
                new = self.visit(child, f"{prefix}{key}")
                if new is not child:
                    changed[key] = new
        attributes = self._attributes(module, prefix)
        if before == (len(self.accelerated), len(self.left)) and holds_stacked(module):
            self.left.append(_because(found, _HIDDEN))
        if not changed and not attributes:
            return module
        return self._with(module, name, changed, attributes)

    def _attributes(self, module: nn.Module, prefix: str) -> dict[str, Any]:
        """New values of attributes that are no children, but call or are a stack."""
        changed = {}
        for key, value in module.__dict__.items():
            called = mapped_module(value)
            if called is not None:
                new = self.visit(called, f"{prefix}{key}")
                if new is not called:
                    changed[key] = mapped_again(value, new)
            elif isinstance(value, nn.Module) and is_candidate(value):
                new = self.visit(value, f"{prefix}{key}")
                if new is not value:
                    changed[key] = new
        return changed

    def _with(
        self,
        module: nn.Module,
        name: str,
        changed: Mapping[str, nn.Module],
        attributes: Mapping[str, Any],
    ) -> nn.Module:
        """The module with other children and attributes."""
        if not self.inplace:
            original = module
            module = object.__new__(type(original))
            module.__dict__.update(original.__dict__)
            own_dictionaries(module)
            self._note_bound(original, name)
            if module.__dict__.pop("_compiled_call_impl", None) is not None:
                self.notes.append(f"{found_name(name)} was compiled, and is to be compiled again")
        module._modules.update(changed)
        module.__dict__.update(attributes)
        return module

    def _note_bound(self, module: nn.Module, name: str) -> None:
        """Attributes that go on calling the original module."""
        for key, value in module.__dict__.items():
            bound = getattr(value, "_torchdynamo_orig_callable", value)
            if getattr(bound, "__self__", None) is module:
                self.notes.append(
                    f"{name + '.' if name else ''}{key} is bound to the original module and goes "
                    "on calling it: use inplace=True, or set it again"
                )


def found_name(name: str) -> str:
    """How messages call a module."""
    return name or "the module itself"


def _because(found: Found, reason: str) -> Found:
    return Found(found.name, found.kind, found.parameters, reason)


def _count(module: nn.Module) -> int:
    return sum(0 if is_lazy(p) else p.numel() for p in module.parameters())


def _others(module: nn.Module, name: str, left: set[str]) -> Iterator[Found]:
    """Modules with parameters of their own outside of all stacks."""
    if isinstance(module, AcceleratedStack) or name in left:
        return
    own = sum(0 if is_lazy(p) else p.numel() for p in module.parameters(recurse=False))
    if own:
        yield Found(name, type(module).__name__, own)
    for key, child in module._modules.items():
        if child is not None:
            yield from _others(child, f"{name}.{key}" if name else key, left)
