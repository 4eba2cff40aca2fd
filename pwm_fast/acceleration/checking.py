"""Whether a stack computes what its structure says: it is run against the operations.

On a copy with random parameters, so that a weight of zeros hides nothing; in float64, values and
all gradients, in training and evaluation mode, on inputs of several scales and ranks; and in the
module's own dtype on its own device, values. A stack on the meta device, as functional ensembles
keep one to put their members' parameters into, is compared on the CPU.

Dropout is compared at a rate at which it shows, with the same random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from pwm_fast.acceleration.matching import Mismatch, copied, said
from pwm_fast.acceleration.plan import Plan, at
from pwm_fast.acceleration.stack import assemble
from pwm_fast.backends import select

_RATE = 0.5
_SHAPES: tuple[tuple[tuple[int, ...], float], ...] = (((5,), 1.0), ((2, 3), 30.0), ((1,), 0.01))


def check(stack: nn.Sequential, plan: Plan) -> None:
    """Run both and compare.

    Raises:
        Mismatch: they differ, or the stack cannot be run.
    """
    device = _device(stack)
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as contexts:
        contexts.enter_context(torch.random.fork_rng(devices=devices))
        contexts.enter_context(torch.inference_mode(False))
        contexts.enter_context(torch.enable_grad())
        contexts.enter_context(torch.autocast(device.type, enabled=False))
        if device.type != "cpu":
            contexts.enter_context(torch.autocast("cpu", enabled=False))
        generator = torch.Generator().manual_seed(0)
        twin = _copy(stack).to("cpu", torch.float64)
        _randomize(twin, generator)
        for step in plan.steps:
            if step.dropout is not None:
                at(twin, step.dropout).p = _RATE  # type: ignore[assignment]
        first_weight = at(twin, plan.steps[0].linear).weight
        assert isinstance(first_weight, Tensor)
        width = first_weight.shape[1]
        for training in (True, False):
            for rows, scale in _SHAPES:
                x = _normal((*rows, width), torch.float64, generator) * scale
                _compare_exactly(twin.train(training), plan, x)
        x = _normal((33, width), torch.float64, generator)
        _compare_in_own_dtype(stack, twin, plan, x)


def _copy(stack: nn.Sequential) -> nn.Sequential:
    twin = copied(stack)
    if next(twin.parameters()).is_meta:
        twin.to_empty(device="cpu")
    return twin.requires_grad_(True)


def _device(stack: nn.Module) -> torch.device:
    """Where the stack is compared."""
    device = next(stack.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


@torch.no_grad()
def _randomize(twin: nn.Module, generator: torch.Generator) -> None:
    """Parameters of order 1 by which no two computations agree by chance."""
    for x in twin.parameters():
        noise = _normal(x.shape, x.dtype, generator)
        x.copy_(noise / x.shape[1] ** 0.5 if x.dim() == 2 else 0.5 + 0.3 * noise)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=generator, device="cpu")


def _attributes(module: nn.Module) -> dict[str, object]:
    """Attributes of all modules but what nn.Module keeps."""
    internal = nn.Module().__dict__
    return {
        f"{name}.{key}" if name else key: value
        for name, part in module.named_modules()
        for key, value in part.__dict__.items()
        if key not in internal
    }


@contextmanager
def _own_errors(dtype: torch.dtype, x: Tensor) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a stranger's module raises
        shape = list(x.shape)
        raise Mismatch(f"its own forward fails on {dtype} {shape}: {said(error)}") from None


def _run(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and gradients of one weighted sum towards the input and all parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"the output is {type(y).__name__}")
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    wanted = [x, *module.parameters()]
    grads = torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True)
    return y.detach(), list(grads)


def _compare_exactly(twin: nn.Sequential, plan: Plan, x: Tensor) -> None:
    mode = "training" if twin.training else "evaluation"
    before = _attributes(twin)
    drops = any(step.dropout is not None for step in plan.steps)

    def seed() -> None:
        if drops:  # else what draws random numbers is to be found out
            torch.default_generator.manual_seed(0)

    with _own_errors(x.dtype, x):
        seed()
        y, grads = _run(twin, x)
        seed()
        again = twin(x.clone()).detach()
    if y.shape != again.shape or not torch.equal(y, again):
        raise Mismatch(f"it gives different results for the same input in {mode} mode")
    after = _attributes(twin)
    kept = [key for key, value in after.items() if before.get(key) is not value]
    if kept:
        raise Mismatch(f"its forward keeps something: {', '.join(kept)}")
    try:
        seed()
        with select.backend("reference"):
            ours, our_grads = _run(assemble(twin, plan), x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Mismatch(f"the operations refuse it: {said(error)}") from None
    names = ["the input", *(name for name, _ in twin.named_parameters())]
    _compare(f"its output in {mode} mode", y, ours)
    for name, expected, got in zip(names, grads, our_grads, strict=True):
        what = f"its gradient towards {name} in {mode} mode"
        if expected is None or got is None:
            if expected is not got:
                raise Mismatch(f"{what} is {'missing' if expected is None else 'there'}")
            continue
        _compare(what, expected, got)


def _compare(what: str, theirs: Tensor, ours: Tensor) -> None:
    if theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        raise Mismatch(
            f"{what} is {theirs.dtype} {list(theirs.shape)}, the operations' {ours.dtype} "
            f"{list(ours.shape)}"
        )
    scale = max(theirs.abs().max().item(), 1e-3)
    error = (theirs - ours).abs().max().item()
    if not error <= 1e-9 * scale:
        raise Mismatch(
            f"{what} differs from the operations' by {error / scale:.1e} of its size in float64: "
            "its forward is not what its parts say"
        )


@torch.no_grad()
def _compare_in_own_dtype(stack: nn.Sequential, twin: nn.Sequential, plan: Plan, x: Tensor) -> None:
    """Not worse than the module itself, on the backend that will run."""
    dtype, device = next(stack.parameters()).dtype, _device(stack)
    if dtype == torch.float64:
        return
    low = copy.deepcopy(twin).to(device, dtype)
    truth = copy.deepcopy(low).to("cpu", torch.float64)(x.to(dtype).double())
    with _own_errors(dtype, x):
        theirs = low(x.to(device, dtype))
    ours = assemble(low, plan)(x.to(device, dtype))
    errors = [(y.cpu().double() - truth).abs().max().item() for y in (theirs, ours)]
    rounding = 16.0 * torch.finfo(dtype).eps * truth.abs().max().item()
    if not errors[1] <= 4.0 * errors[0] + rounding:
        raise Mismatch(
            f"the operations err by {errors[1]:.1e} in {dtype}, itself by {errors[0]:.1e}"
        )
