"""Whether derivatives may be taken that no tensor tells of."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


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
