"""What an action changes later: a world model's derivatives against the simulator's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_fast.agent.view import ModelView


class Course(NamedTuple):
    """What follows from M starts and the actions of T steps.

    Attributes:
        reward: ``[T, M]``, of the state before a step and of its action.
        latent: ``[T, M, D]``, of the state before a step.
        alive: bool ``[T, M]``: no episode ended before the step.
    """

    reward: Tensor
    latent: Tensor
    alive: Tensor


Runs = Callable[[Tensor], Course]  # of actions [T, M, A]; M is a multiple of the P starts


@torch.no_grad()
def imagined(view: ModelView, obs: Tensor) -> Runs:
    """A world model as :data:`Runs`, from observations ``[P, O]`` of the starts."""

    def runs(action: Tensor) -> Course:
        copies = action.shape[1] // obs.shape[0]
        z = view.encode(obs).repeat(copies, 1)
        rewards, latents = [], []
        for a in action.to(obs.device).unbind(0):
            rewards.append(view.reward(z, a))
            latents.append(z)
            z = view.step(z, a)
        alive = torch.ones(action.shape[:2], dtype=torch.bool, device=obs.device)
        return Course(torch.stack(rewards), torch.stack(latents), alive)

    return runs


@torch.no_grad()
def action_sensitivity(
    real: Runs, model: Runs, action: Tensor, valid: Tensor, after: Sequence[int], step: float
) -> dict[str, list[float]]:
    """Derivatives of rewards and latents n steps later by the first action, of both.

    ``d r(s_n, a_n) / d a_0`` and ``d e(s_n) / d a_0``, where e is the model's encoder, are central
    differences: of two courses whose first action is ``a_0 + step u`` and ``a_0 - step u``, u a
    unit vector, and whose other actions are the same. The simulator and the model are differenced
    alike, at the same points and with the same step, so that what is curved or broken within it
    (contacts) is averaged in the same way. Actions within ``step`` of their bounds 1 and -1 are
    moved inside by it: beyond the bounds a simulator clips them.

    Args:
        real: the simulator.
        model: the world model, from the same starts.
        action: ``[T, P, A]`` of P starts.
        valid: bool ``[T, P]``: the action was really taken.
        after: numbers n of steps.
        step: of the central differences, in units of actions.

    Returns:
        Lists over the n that are below T, named in ``after``; Y is ``reward`` (of all A actions) or
        ``latent`` (of all A actions and D latents):

        - ``points``: starts whose episode goes on for n steps under each changed action;
        - ``Y_cosine``: mean over points of the cosine of both derivatives (a model's of 0 counts as
          0), and its quantiles ``Y_cosine_p20``, ``_p80``;
        - ``Y_ratio``: median over points of the model's norm over the simulator's;
        - ``Y_norm_real``, ``Y_norm_model``: root mean squares of the norms (units of Y per action).

        Points at which the simulator's derivative is below what float32 rounds to are left out of
        cosines and ratios; NaN where none is left.
    """
    horizon, starts, width = action.shape
    first = action[0].clamp(-1.0 + step, 1.0 - step)
    signs = torch.cat([torch.eye(width), -torch.eye(width)]).to(first)  # [2A, A]
    changed = action[:, None].expand(-1, 2 * width, -1, -1).clone()
    changed[0] = first + step * signs[:, None]
    flat = changed.flatten(1, 2)
    courses = [runs(flat) for runs in (real, model)]
    derivatives = []
    for course in courses:
        parts = []
        for values in (course.reward.unsqueeze(-1), course.latent):
            up, down = values.double().cpu().unflatten(1, (2, width, starts)).unbind(1)
            parts.append(((up - down) / (2.0 * step)).permute(0, 2, 1, 3).flatten(2))  # [T, P, n]
        derivatives.append(parts)
    alive = courses[0].alive.cpu().unflatten(1, (2 * width, starts)).all(1) & valid.cpu()
    eps = torch.finfo(torch.float32).eps
    sizes = courses[0].reward.abs().amax().item(), courses[0].latent.abs().amax().item()
    result: dict[str, list[float]] = {"after": [], "points": []}
    for n in after:
        if n >= horizon:
            continue
        result["after"].append(n)
        result["points"].append(float(alive[n].sum()))
        for i, name in enumerate(("reward", "latent")):
            truth, found = (part[i][n, alive[n]] for part in derivatives)
            floor = 4.0 * eps * max(1.0, sizes[i]) / step
            for key, value in _agreement(truth, found, floor).items():
                result.setdefault(f"{name}_{key}", []).append(value)
    return result


def _agreement(truth: Tensor, found: Tensor, floor: float) -> dict[str, float]:
    """How alike derivatives ``[P, n]`` are."""
    norms = [torch.linalg.vector_norm(part, dim=-1) for part in (truth, found)]
    there = norms[0] > floor
    dot = (truth * found).sum(-1)[there]
    lengths = norms[0][there] * norms[1][there]
    cosine = torch.where(lengths > 0, dot / lengths, 0.0)
    low, high = _quantiles(cosine, 0.2, 0.8)
    return {
        "cosine": cosine.mean().item(),
        "cosine_p20": low,
        "cosine_p80": high,
        "ratio": _quantiles(norms[1][there] / norms[0][there], 0.5)[0],
        "norm_real": norms[0].square().mean().sqrt().item(),
        "norm_model": norms[1].square().mean().sqrt().item(),
    }


def _quantiles(values: Tensor, *levels: float) -> list[float]:
    if not len(values):
        return [float("nan")] * len(levels)
    found: list[float] = torch.quantile(values, values.new_tensor(levels)).tolist()
    return found
