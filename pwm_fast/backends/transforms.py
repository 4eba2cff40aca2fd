"""Who stands between tensors and their values: derivatives, transforms, tracers, subclasses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

#: Attribute of a fake tensor: the class of the tensor that it stands for.
STANDS_FOR = "_pwm_fast_stands_for"

#: Any other class may be a tracer's, without values, or hold them elsewhere.
PLAIN = (Tensor, torch.nn.Parameter)


def constant_result(function: F) -> F:
    """What ``torch.compiler.assume_constant_result`` does, which would import the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def transformed() -> bool:
    """Whether forward mode, a ``torch.func`` transform or ``torch.jit.trace`` is at work."""
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def hidden() -> bool:
    """Whether ``requires_grad`` says nothing: of tensors in a transform, or of a trace's inputs."""
    if transformed():
        return True
    if torch.compiler.is_dynamo_compiling():  # which recompiles for other inputs
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx


def functionalized() -> bool:
    """Whether autograd functions of ours cannot run: ``functionalize`` and traces have no rule."""
    if torch._C._get_tracing_state() is not None:
        return True
    if not torch._C._are_functorch_transforms_active() or torch.compiler.is_dynamo_compiling():
        return False
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    interpreters = retrieve_all_functorch_interpreters()
    return any(i.key().name == "Functionalize" for i in interpreters)


def compiled_or_mapped() -> bool:
    """Whether a compiler or a transform is between tensors and their values."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def watched() -> bool:
    """Whether somebody looks at operators: a compiler, a transform or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
    )


def in_memory(x: Tensor) -> bool:
    """Whether a plain tensor's memory holds its values, as kernels read them.

    It does not where the sign is still to be turned (``conj().imag``), nor of many gradients at a
    time (``is_grads_batched``): PyTorch's dispatcher sees to both.
    """
    return not (x.is_neg() or torch._C._functorch.is_legacy_batchedtensor(x))


def subclass(x: Tensor) -> str | None:
    """Why operators cannot take a tensor because of its class; None if they can."""
    if type(x) in PLAIN:
        return None
    if torch.compiler.is_dynamo_compiling():  # which traces through subclasses, or refuses them
        return None
    kind = getattr(x, STANDS_FOR, type(x))
    if _known(kind):
        return None
    return f"a tensor is a {kind.__name__}, which only the reference follows"


@lru_cache(maxsize=256)
def _known(kind: type) -> bool:
    """Whether a subclass of Tensor holds its values as Tensor does, or is one of a tracer's own."""
    if kind is Tensor or kind.__module__.startswith("torch._subclasses."):
        return True
    own = kind.__torch_function__ is not torch._C._disabled_torch_function_impl  # type: ignore[attr-defined]
    dispatches = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__  # type: ignore[attr-defined]
    return not own and not dispatches


def forward_mode(tensors: Sequence[Tensor]) -> str | None:
    """Why operators would lose a tangent; None where there is none to lose."""
    if forward_ad._current_level < 0:
        return None
    # Where make_fx traces (torch.func.linearize), operators cannot look at tangents of constants.
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    ):
        return "it is differentiated in forward mode, which only the reference follows"
    return None


def derived(tensors: Sequence[Tensor]) -> bool:
    """Whether one of the tensors has a tangent, or a ``torch.func`` transform is in force."""
    return torch._C._are_functorch_transforms_active() or forward_mode(tensors) is not None


def transform() -> str | None:
    """Why operators cannot follow the transforms in force; None if they can."""
    # A trace holds for inputs that require gradients, too, where these do not.
    if torch._C._get_tracing_state() is not None:
        return "it is traced by torch.jit, which only the reference follows"
    if not torch._C._are_functorch_transforms_active():
        return None
    if torch.compiler.is_compiling():
        return "a torch.func transform is being compiled, which only the reference follows"
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    keys = {interpreter.key().name for interpreter in retrieve_all_functorch_interpreters()}
    # Under vmap the operators' own rules see what requires a gradient; functionalize hides it.
    others = keys - {"Vmap"}
    if others:
        names = " and ".join(sorted(others)).lower()
        return f"it is inside a torch.func transform ({names}), which only the reference follows"
    return None
