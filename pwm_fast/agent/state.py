"""What a saved agent must look like before anything takes it up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pwm_fast.agent.optim import GuardedAdam

#: Published PWM files' names of the optimisers' states.
OPTIMIZER_KEYS = {"wm": "world_model_opt", "actor": "actor_opt", "critic": "critic_opt"}


def check(
    state: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, GuardedAdam],
) -> None:
    """Raise ValueError where a saved state does not fit these modules and optimisers.

    That is where parameters are missing, unknown, of other shapes or not finite, or an optimiser's
    state is not of these parameters.
    """
    problems = []
    for key, module in modules.items():
        problems += _mismatches(key, module.state_dict(), state.get(key))
    keys = [OPTIMIZER_KEYS[name] for name in optimizers]
    problems += [f"{key} is missing" for key in keys if key not in state]
    _refuse("the saved agent is of another architecture", problems)
    for key in modules:
        problems += not_finite(key, state[key])
    for key, optimizer in zip(keys, optimizers.values(), strict=True):
        problems += optimizer.mismatches(key, state[key])
    _refuse("the saved agent cannot be used", problems)


def fits(module: nn.Module, saved: Any) -> bool:
    """Whether a saved state is of such a module."""
    return saved is not None and not _mismatches("", module.state_dict(), saved)


def _refuse(what: str, problems: list[str]) -> None:
    """Raise ValueError with the first few problems, if there are any."""
    if problems:
        shown = "; ".join(problems[:4])
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{what}: {shown}{more}")


def _mismatches(name: str, own: dict[str, Tensor], saved: dict[str, Tensor] | None) -> list[str]:
    if saved is None:
        return [f"{name} is missing"]
    if not isinstance(saved, Mapping):
        return [f"{name} is a {type(saved).__name__} instead of tensors by their names"]
    problems = [f"{name}.{k} is missing" for k in own if k not in saved]
    problems += [f"{name}.{k} is unknown" for k in saved if k not in own]
    for k in own:
        theirs = saved.get(k, own[k])
        if not isinstance(theirs, Tensor):
            problems.append(f"{name}.{k} is a {type(theirs).__name__} instead of a tensor")
        elif theirs.shape != own[k].shape:
            problems.append(f"{name}.{k} is {list(theirs.shape)} instead of {list(own[k].shape)}")
        elif theirs.is_floating_point() != own[k].is_floating_point():
            problems.append(f"{name}.{k} is {theirs.dtype} instead of {own[k].dtype}")
    return problems


def not_finite(name: str, saved: Mapping[str, Tensor]) -> list[str]:
    """Which tensors have values that are not finite, and how many."""
    return [
        f"{name}.{k} has {int((~t.isfinite()).sum())} NaN or infinite values of {t.numel()}"
        for k, t in saved.items()
        if not bool(t.isfinite().all())
    ]
