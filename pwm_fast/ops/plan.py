"""MPPI: planning by sampling in a latent model, warm-started and led by a policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor

from pwm_fast.backends.dtypes import at_least_fp32, fp32_dtype, full_precision
from pwm_fast.backends.select import for_part
from pwm_fast.ops import _checks
from pwm_fast.ops.dynamics import Dynamics
from pwm_fast.ops.flow_policy import FlowPolicy
from pwm_fast.ops.imagine import (
    act,
    check_policy,
    checked_mask,
    decoded,
    in_dtype_of,
    read_heads,
    roll_out,
)
from pwm_fast.ops.mlp import members_of, mlp
from pwm_fast.ops.returns import discounted, discounted_return
from pwm_fast.ops.rollout import check_rows, latent_rollout
from pwm_fast.ops.types import ORDERS, Heads, Layer, Order, Policy

Reduction = Literal["two", "min", "mean"]

Ensemble = Sequence[Layer] | Sequence[Sequence[Layer]]

TENSORS = Layer._fields[:4]
REDUCTIONS: tuple[Reduction, ...] = ("two", "min", "mean")


@dataclass(frozen=True)
class MPPI:
    """Parameters of :func:`plan`; the defaults are TD-MPC2's published ones.

    ``temperature`` is per unit of value: it has to fit the size of the rewards. TD-MPC2 itself
    takes two more iterations where actions have 20 or more components.

    Attributes:
        horizon: H, steps that a plan looks ahead.
        iterations: times that trajectories are drawn, valued and averaged.
        samples: N, trajectories of an iteration, the policy's among them.
        elites: the best of them, which make the next mean and standard deviation.
        policy_trajectories: P, how many of the N are the policy's own, drawn once.
        min_std: least standard deviation of an action.
        max_std: largest one, which every plan starts with.
        temperature: elites have weights in proportion to ``exp(temperature value)``.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    horizon: int = 3
    iterations: int = 6
    samples: int = 512
    elites: int = 64
    policy_trajectories: int = 24
    min_std: float = 0.05
    max_std: float = 2.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("horizon", "iterations", "samples", "elites"):
            _checks.positive_int(name, getattr(self, name))
        trajectories = self.policy_trajectories
        if isinstance(trajectories, bool) or not isinstance(trajectories, int) or trajectories < 0:
            raise ValueError(
                f"policy_trajectories must be an integer of 0 or more, got {trajectories!r}"
            )
        for name in ("elites", "policy_trajectories"):
            if getattr(self, name) > self.samples:
                raise ValueError(
                    f"{name} must be at most samples={self.samples}, got {getattr(self, name)}"
                )
        for name in ("min_std", "max_std", "temperature"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of 0 or more, got {value!r}")
        if self.max_std < self.min_std:
            raise ValueError(f"max_std must be at least min_std={self.min_std}, got {self.max_std}")


class ValueEnsemble(NamedTuple):
    """E value functions of where a plan ends.

    Attributes:
        layers: of all members at once, weights ``[E, N, K]`` and vectors ``[E, N]``; or a sequence
            of E sequences of layers, all of the same widths and options.
        order: ``"act_norm"`` (PWM's critics) or ``"norm_act"`` (TD-MPC2's).
        on_action: the members are Q functions of ``[z, task, a]`` with an action that the policy
            draws; else they are values of ``z``.
        reduce: what counts: ``"two"`` is the mean of two members, drawn anew in each iteration
            (TD-MPC2), ``"min"`` the least of all, ``"mean"`` their mean.
        vmin: first bin centre of a member with two-hot logits; one output is the value itself.
        vmax: last bin centre.
        symlog: the bins live in symlog space and their expectation goes through symexp.
        scale: factor on the values, where rewards have another unit.
        task_input: the members also see the task's embedding. None: where they see an action, and
            there is an embedding.
    """

    layers: Ensemble
    order: Order = "act_norm"
    on_action: bool = False
    reduce: Reduction = "two"
    vmin: float = -10.0
    vmax: float = 10.0
    symlog: bool = True
    scale: float = 1.0
    task_input: bool | None = None

    @property
    def members(self) -> int:
        """E."""
        net = self.layers
        return net[0].weight.shape[0] if _is_stacked(net) else len(net)

    @property
    def draws_members(self) -> bool:
        """Two members are drawn; of one or two, all are taken."""
        return self.reduce == "two" and self.members > 2

    def inputs(self, z: Tensor, a: Tensor | None, task: Tensor | None) -> tuple[Tensor, ...]:
        """What the members take of latents, actions and task embeddings, in their order.

        Raises:
            ValueError: they take actions or embeddings, and there are none.
        """
        told = self.on_action and task is not None if self.task_input is None else self.task_input
        found = [z]
        for name, x, taken in (("task", task, told), ("a", a, self.on_action)):
            if taken and x is None:
                raise ValueError(f"{name} must be given to value functions that take it, got None")
            if taken and x is not None:
                found.append(x)
        return tuple(found)


class PlanNoise(NamedTuple):
    """The random numbers of a plan, floating but for ``members``.

    Attributes:
        samples: standard normal ``[iterations, H, B, N - P, A]``.
        choice: of a standard Gumbel distribution, ``[B, elites]``: which elite is taken.
        action: standard normal ``[B, A]``, on the action that is taken.
        policy: standard normal ``[H, B, P, A]``; None where P is 0.
        last_action: standard normal ``[iterations, B, N, A]``, on the policy's actions that Q
            functions see; None without Q functions.
        members: int64 ``[iterations, 2]``: which two members of the ensemble count; None where
            :attr:`ValueEnsemble.draws_members` is False.
    """

    samples: Tensor
    choice: Tensor
    action: Tensor
    policy: Tensor | None = None
    last_action: Tensor | None = None
    members: Tensor | None = None

    @staticmethod
    def draw(
        batch: int,
        width: int,
        options: MPPI | None = None,
        values: ValueEnsemble | None = None,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PlanNoise:
        """Draw what a call of :func:`plan` needs.

        Args:
            batch: B.
            width: A.
            options: of the plan.
            values: of the plan.
            generator: of torch's, on that device; None is the global one.
            dtype: of the numbers.
            device: of the numbers.
        """
        o = MPPI() if options is None else options
        shapes = _noise_shapes(batch, width, o, values)

        def normal(name: str) -> Tensor | None:
            shape = shapes[name]
            if shape is None:
                return None
            return torch.randn(shape, generator=generator, dtype=dtype, device=device)

        samples, policy = normal("samples"), normal("policy")
        last_action, action = normal("last_action"), normal("action")
        assert samples is not None and action is not None
        uniform = torch.rand(batch, o.elites, generator=generator, dtype=dtype, device=device)
        tiny = torch.finfo(dtype).tiny  # the uniform numbers may be 0
        choice = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
        members = None
        if values is not None and values.draws_members:
            keys = torch.rand(o.iterations, values.members, generator=generator, device=device)
            members = keys.argsort(-1)[:, :2]
        return PlanNoise(samples, choice, action, policy, last_action, members)


class Plan(NamedTuple):
    """A plan for each of B envs, time first.

    Attributes:
        action: ``[B, A]`` in [-1, 1], to be taken now; NaN where no trajectory had a finite value.
        mean: ``[H, B, A]``, float32 at least: what the next plan starts from (``previous``).
        std: ``[H, B, A]``, float32 at least.
        trajectories: actions ``[H, B, N, A]`` of the last iteration, the policy's first.
        value: their values ``[B, N]``, float32 at least.
    """

    action: Tensor
    mean: Tensor
    std: Tensor
    trajectories: Tensor
    value: Tensor


@torch.no_grad()
def plan(
    z0: Tensor,
    policy: Policy | FlowPolicy | None,
    dynamics: Dynamics,
    heads: Heads,
    *,
    values: ValueEnsemble | None = None,
    options: MPPI | None = None,
    gamma: float | Tensor = 0.99,
    previous: Tensor | None = None,
    first: Tensor | None = None,
    eval_mode: bool = False,
    noise: PlanNoise | None = None,
    generator: torch.Generator | None = None,
    task: Tensor | None = None,
    action_mask: Tensor | None = None,
    backend: str | None = None,
) -> Plan:
    """Choose actions by model predictive path integral control (MPPI) in a latent model.

    Every iteration draws N action sequences per env, ``a_t = clamp(mean_t + std_t noise, -1, 1)``,
    the first P of which are the policy's. It values each by ``sum_t gamma^t r_t + gamma^H V(z_H)``,
    where step t counts only as far as the steps before it did not terminate. Of the elites, with
    weights ``w = softmax(temperature value)``, it takes the weighted mean and standard deviation.
    The action is the first one of an elite drawn by ``w``, plus ``std`` noise unless ``eval_mode``.

    The trajectories of all envs are the rows of one rollout, one call of each head over all steps,
    and one call of the value functions. Nothing is differentiable, and nothing waits for a GPU.

    A trajectory whose value is NaN or infinite has no weight. Where that is so of all, the action
    is NaN and the mean stays what it was.

    With a mask the components that it leaves out are 0 in all trajectories, the policy's too, in
    the last action, in every mean and standard deviation, and so in the action that is taken.

    Args:
        z0: latents ``[B, D]``.
        policy: draws P of the trajectories, and the last action for Q functions; None if neither is
            wanted (``options.policy_trajectories=0``).
        dynamics: :class:`Flow`, :class:`Shortcut`, :class:`LatentMLP`, :class:`ResidualMLP` or
            others (:class:`Dynamics`).
        heads: reward and termination heads; ``heads.value`` must be None, see ``values``.
        values: value functions of where a trajectory ends; None values it by its rewards alone.
        options: None is TD-MPC2's parameters, ``MPPI()``.
        gamma: discount in [0, 1], or one for each env, a floating tensor ``[B]`` whose numbers are
            not looked at.
        previous: the mean ``[H, B, A]`` of the plan before, which this one starts from, one step
            on; None starts from 0.
        first: bool ``[B]``: envs whose episode begins, which start from 0; None is none of them.
        eval_mode: add no noise to the action. Which elite is taken is random all the same.
        noise: the random numbers (:meth:`PlanNoise.draw`); drawn if None.
        generator: they are drawn with, on the device of ``z0``; None is torch's global one.
        task: task embeddings ``[B, E]``, or None.
        action_mask: ``[B, A]``, bool or floating: 1 for the components of its action that an env
            has, 0 for those that are only there because other tasks have more. Or bool ``[A]``, the
            same for all envs. None: all of them.
        backend: see :mod:`pwm_fast.backends`; what has no such backend runs on the reference.

    Returns:
        :class:`Plan`.

    Raises:
        TypeError: a tensor has a wrong dtype, or ``options`` is no :class:`MPPI`.
        ValueError: shapes, devices or options do not fit.
        BackendError: the backend that was asked for cannot run this.

    Source: Williams et al. 2015 (arXiv 1509.01149); Hansen et al. 2022 (arXiv 2203.04955),
    algorithm 1; Hansen et al. 2024, TD-MPC2 (arXiv 2310.16828), section 3.2 and the table of
    hyperparameters.
    """
    o = MPPI() if options is None else options
    width = _check(z0, policy, dynamics, heads, values, o, gamma, previous, first, task)
    mask = checked_mask(action_mask, z0, width)
    dtype, batch = fp32_dtype(z0), z0.shape[0]
    if noise is None:
        noise = PlanNoise.draw(
            batch, width, o, values, generator=generator, dtype=dtype, device=z0.device
        )
    else:
        _check_noise(noise, _noise_shapes(batch, width, o, values), z0, generator)

    prior = None
    if noise.policy is not None:
        assert policy is not None
        count = o.policy_trajectories
        drawn = noise.policy.to(z0.dtype).flatten(1, 2)
        starts, tasks, masks = _repeated(z0, count), _each(task, count), _masks(mask, count)
        _, prior = roll_out(starts, policy, dynamics, drawn, True, tasks, masks, backend)
        prior = prior.view(o.horizon, batch, count, width)
    ensemble = values
    if values is not None and values.draws_members:  # stacked once, then indexed on the device
        ensemble = values._replace(layers=_stacked(values.layers))
    score = _Scores(
        _repeated(z0, o.samples),
        _each(task, o.samples),
        _masks(mask, o.samples),
        _discounts(gamma, dtype, o.samples),
        policy,
        dynamics,
        heads,
        ensemble,
        backend,
    )

    mean = _start(previous, first, o.horizon, batch, width, dtype, z0.device)
    std = torch.full_like(mean, o.max_std)
    for i in range(o.iterations):
        eps = noise.samples[i].to(dtype)
        drawn = (mean.unsqueeze(2) + std.unsqueeze(2) * eps).clamp(-1.0, 1.0).to(z0.dtype)
        if mask is not None:
            drawn = drawn * mask.unsqueeze(-2)
        actions = drawn if prior is None else torch.cat((prior, drawn), 2)
        last = None if noise.last_action is None else noise.last_action[i]
        members = None if noise.members is None else noise.members[i]
        value = score(actions, last, members).to(dtype)
        elites, weight, sound = _elites(actions.to(dtype), value, o)
        mean, std = _averaged(elites, weight, sound, mean, std, o)
        if mask is not None:
            mean, std = mean * mask, std * mask
    action = _taken(elites[0], weight, noise.choice.to(dtype))
    if not eval_mode:
        action = action + std[0] * noise.action.to(dtype)
    action = action.clamp(-1.0, 1.0).masked_fill(~sound.unsqueeze(-1), math.nan).to(z0.dtype)
    return Plan(action, mean, std, actions, value)


def trajectory_values(
    z0: Tensor,
    actions: Tensor,
    dynamics: Dynamics,
    heads: Heads,
    *,
    values: ValueEnsemble | None = None,
    policy: Policy | FlowPolicy | None = None,
    gamma: float | Tensor = 0.99,
    task: Tensor | None = None,
    action_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What :func:`plan` finds given action sequences worth, differentiably.

    ``sum_t gamma^t r_t + gamma^H V(z_H)``, where step t counts only as far as the steps before it
    did not terminate. Nothing is random: Q functions see the mean of the policy's action, and
    ``values.reduce="two"`` is the mean of all members.

    Args:
        z0: latents ``[B, D]``.
        actions: ``[H, B, N, A]``, time first: N sequences for each latent. They are not clamped.
        dynamics: as of :func:`plan`.
        heads: as of :func:`plan`.
        values: as of :func:`plan`.
        policy: gives the last action for Q functions; else None will do.
        gamma: as of :func:`plan`.
        task: task embeddings ``[B, E]``, or None.
        action_mask: as of :func:`plan`.
        backend: as of :func:`plan`.

    Returns:
        ``[B, N]``; differentiable in ``z0``, ``actions``, ``task`` and all parameters.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes, devices or options do not fit.
        BackendError: the backend that was asked for cannot run this.
    """
    none_drawn = MPPI(policy_trajectories=0)
    width = _check(z0, policy, dynamics, heads, values, none_drawn, gamma, None, None, task)
    _checks.floating("actions", actions)
    if actions.dim() != 4 or actions.shape[0] == 0 or actions.shape[1::2] != (z0.shape[0], width):
        raise ValueError(
            f"actions must be [H, {z0.shape[0]}, N, {width}] with an H of 1 or more, got "
            f"{tuple(actions.shape)}"
        )
    _checks.same_device("actions", actions, "z0", z0.device)
    count = actions.shape[2]
    eps = None
    if values is not None and values.on_action:
        eps = actions.new_zeros(z0.shape[0], count, width)
    mask = checked_mask(action_mask, z0, width)
    if mask is not None:
        actions = actions * mask.unsqueeze(-2)
    score = _Scores(
        _repeated(z0, count),
        _each(task, count),
        _masks(mask, count),
        _discounts(gamma, fp32_dtype(z0), count),
        policy,
        dynamics,
        heads,
        values,
        backend,
    )
    return score(actions, eps, None)


class _Scores(NamedTuple):
    """Values trajectories; the tensors have a row for each, the envs' one after another."""

    z0: Tensor
    task: Tensor | None
    mask: Tensor | None
    gamma: float | Tensor
    policy: Policy | FlowPolicy | None
    dynamics: Dynamics
    heads: Heads
    values: ValueEnsemble | None
    backend: str | None

    def __call__(self, actions: Tensor, eps: Tensor | None, members: Tensor | None) -> Tensor:
        """Values ``[B, N]`` of actions ``[H, B, N, A]``."""
        rows = actions.flatten(1, 2)
        z = latent_rollout(self.z0, rows, self.dynamics, task=self.task, backend=self.backend)
        reward, continues = read_heads(z[:-1], rows, self.heads, self.task, self.backend)
        if self.values is None:
            last = torch.zeros_like(reward[0])
        else:
            last = self._last(self.values, z[-1], eps, members)
        part = for_part("td_lambda", self.backend)
        if isinstance(self.gamma, Tensor):  # of the same dtype as what it discounts
            reward, last = at_least_fp32(reward), at_least_fp32(last)
            continues = None if continues is None else at_least_fp32(continues)
        total = discounted_return(reward, last, self.gamma, continues, backend=part)
        return total.view(actions.shape[1:3])

    def _last(
        self, values: ValueEnsemble, z: Tensor, eps: Tensor | None, members: Tensor | None
    ) -> Tensor:
        """Values of the latents ``[rows, D]`` that the trajectories end in."""
        a = None
        if values.on_action:
            assert self.policy is not None and eps is not None
            a = act(self.policy, z, eps.flatten(0, 1), self.task, self.mask, self._run).to(z.dtype)
        inputs = values.inputs(z, a, self.task)
        net, order = values.layers, values.order
        if _is_stacked(net):
            if members is not None:  # mlp would look at numbers that are not on a GPU
                net = [members_of(layer, members) for layer in net]
            y = self._run(inputs, net, order)
        else:
            stacks: Sequence[Sequence[Layer]] = net  # type: ignore[assignment]
            y = torch.stack([self._run(inputs, x, order) for x in stacks])
        found = in_dtype_of(z, y)
        value = decoded(found, values.vmin, values.vmax, values.symlog, self.backend)
        with full_precision(value):
            value = at_least_fp32(value)
            value = value.amin(0) if values.reduce == "min" else value.mean(0)
            return (values.scale * value).to(found.dtype)

    def _run(self, inputs: Sequence[Tensor], layers: Sequence[Layer], order: Order) -> Tensor:
        return mlp(inputs, layers, order=order, backend=self.backend)


def _is_stacked(net: Ensemble) -> TypeGuard[Sequence[Layer]]:
    """All members are in the same tensors."""
    return isinstance(net[0], Layer)


def _stacked(net: Ensemble) -> Sequence[Layer]:
    """The members' parameters in the same tensors, with a first axis for the members."""
    if _is_stacked(net):
        return net
    return [
        group[0]._replace(**{f: _stack([getattr(layer, f) for layer in group]) for f in TENSORS})
        for group in zip(*net, strict=True)
    ]


def _stack(xs: Sequence[Tensor | None]) -> Any:
    return None if xs[0] is None else torch.stack([x for x in xs if x is not None])


def _elites(actions: Tensor, value: Tensor, o: MPPI) -> tuple[Tensor, Tensor, Tensor]:
    """The best trajectories.

    Returns:
        Their actions ``[H, B, E, A]``, their weights ``[B, E]``, and where there are any, ``[B]``.
    """
    with full_precision(value):
        top, index = value.masked_fill(~value.isfinite(), -math.inf).topk(o.elites, 1)
        finite = top > -math.inf
        logits = (o.temperature * (top - top[:, :1])).masked_fill(~finite, -math.inf)
        sound = finite[:, 0]
        weight = torch.softmax(logits, 1).masked_fill(~sound.unsqueeze(1), 0.0)
    horizon, batch, _, width = actions.shape
    index = index.view(1, batch, o.elites, 1).expand(horizon, batch, o.elites, width)
    return actions.gather(2, index), weight, sound


def _averaged(
    elites: Tensor, weight: Tensor, sound: Tensor, mean: Tensor, std: Tensor, o: MPPI
) -> tuple[Tensor, Tensor]:
    """The elites' mean and standard deviation; what they were where there are no elites."""
    weight, sound = weight.unsqueeze(-1), sound.unsqueeze(-1)
    new_mean = discounted(weight, elites).sum(2)
    variance = discounted(weight, (elites - new_mean.unsqueeze(2)).square()).sum(2)
    new_std = variance.sqrt().clamp(o.min_std, o.max_std)
    return torch.where(sound, new_mean, mean), torch.where(sound, new_std, std)


def _taken(actions: Tensor, weight: Tensor, gumbel: Tensor) -> Tensor:
    """One of the elites' actions ``[B, E, A]``, by their weights: ``[B, A]``."""
    index = (weight.log() + gumbel).argmax(1)
    return actions.gather(1, index.view(-1, 1, 1).expand(-1, 1, actions.shape[-1])).squeeze(1)


def _start(
    previous: Tensor | None,
    first: Tensor | None,
    horizon: int,
    batch: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The mean ``[H, B, A]`` of the first iteration: the plan before, one step on."""
    if previous is None:
        return torch.zeros(horizon, batch, width, dtype=dtype, device=device)
    mean = torch.cat((previous[1:], torch.zeros_like(previous[:1]))).to(dtype)
    return mean if first is None else mean.masked_fill(first.view(1, -1, 1), 0.0)


def _repeated(x: Tensor, count: int) -> Tensor:
    """Rows ``[B count, .]`` of ``[B, .]``, those of an env one after another."""
    return x.unsqueeze(1).expand(-1, count, -1).flatten(0, 1)


def _each(x: Tensor | None, count: int) -> Tensor | None:
    """As :func:`_repeated`, of what may be missing."""
    return None if x is None else _repeated(x, count)


def _masks(mask: Tensor | None, count: int) -> Tensor | None:
    """A mask ``[B count, A]`` of as many rows; one for all rows is that already."""
    return mask if mask is None or mask.dim() == 1 else _repeated(mask, count)


def _discounts(gamma: float | Tensor, dtype: torch.dtype, count: int) -> float | Tensor:
    """One discount, or those ``[B count]`` of as many rows."""
    if not isinstance(gamma, Tensor):
        return gamma
    return gamma.to(dtype).repeat_interleave(count)


def _noise_shapes(
    batch: int, width: int, o: MPPI, values: ValueEnsemble | None
) -> dict[str, tuple[int, ...] | None]:
    """Shapes of :class:`PlanNoise`."""
    count, on_action = o.policy_trajectories, values is not None and values.on_action
    return {
        "samples": (o.iterations, o.horizon, batch, o.samples - count, width),
        "choice": (batch, o.elites),
        "action": (batch, width),
        "policy": (o.horizon, batch, count, width) if count else None,
        "last_action": (o.iterations, batch, o.samples, width) if on_action else None,
        "members": (o.iterations, 2) if values is not None and values.draws_members else None,
    }


def _check_noise(
    noise: PlanNoise,
    shapes: dict[str, tuple[int, ...] | None],
    z0: Tensor,
    generator: torch.Generator | None,
) -> None:
    if generator is not None:
        raise ValueError("generator must be None where noise is given: nothing is drawn")
    for name, shape in shapes.items():
        x = getattr(noise, name)
        if shape is None:
            if x is not None:
                raise ValueError(f"noise.{name} must be None for these options and values")
            continue
        if x is None:
            raise ValueError(f"noise.{name} must be {list(shape)}, got None")
        if name != "members":
            _checks.floating(f"noise.{name}", x)
        elif not isinstance(x, Tensor) or x.dtype != torch.int64:
            raise TypeError(f"noise.members must be an int64 tensor, got {_kind(x)}")
        if tuple(x.shape) != shape:
            raise ValueError(f"noise.{name} must be {list(shape)}, got {tuple(x.shape)}")
        _checks.same_device(f"noise.{name}", x, "z0", z0.device)


def _check(
    z0: Tensor,
    policy: Policy | FlowPolicy | None,
    dynamics: Dynamics,
    heads: Heads,
    values: ValueEnsemble | None,
    o: MPPI,
    gamma: float | Tensor,
    previous: Tensor | None,
    first: Tensor | None,
    task: Tensor | None,
) -> int:
    """Look at all arguments but the noise; return the action's width."""
    check_rows("z0", z0)
    if not isinstance(o, MPPI):
        raise TypeError(f"options must be an MPPI or None, got {type(o).__name__}")
    if isinstance(gamma, Tensor):
        _checks.floating("gamma", gamma)
        if tuple(gamma.shape) != (z0.shape[0],):
            raise ValueError(f"gamma must be a number or [{z0.shape[0]}], got {tuple(gamma.shape)}")
        _checks.same_device("gamma", gamma, "z0", z0.device)
    elif not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    if task is not None:
        _checks.same_rows("task", task, "z0", z0)
    inputs = z0.shape[-1] + (0 if task is None else task.shape[-1])
    if len(heads.reward) == 0:
        raise ValueError("heads.reward must hold at least one layer")
    # What the reward head takes beside latents and task: there may be no policy.
    width = max(heads.reward[0].weight.shape[-1] - inputs, 0)
    if policy is not None:
        if policy.std is not None:
            _checks.floating("policy.std", policy.std)
        width = policy.width
        check_policy(policy, z0, width, task, "policy.std")
    elif o.policy_trajectories:
        raise ValueError(
            f"options.policy_trajectories must be 0 without a policy, got {o.policy_trajectories}"
        )
    dynamics.check(z0, width, task)
    for name, net in (("reward", heads.reward), ("termination", heads.termination)):
        if net is not None:
            _checks.layers(f"heads.{name}", net, inputs + width, z0.device)
    if heads.value is not None:
        raise ValueError(
            "heads.value must be None: give values=ops.ValueEnsemble(layers, reduce='min')"
        )
    if values is not None:
        _check_values(values, z0, width, policy, task)
    if previous is not None:
        _checks.floating("previous", previous)
        wanted = (o.horizon, z0.shape[0], width)
        if tuple(previous.shape) != wanted:
            raise ValueError(f"previous must be {list(wanted)}, got {tuple(previous.shape)}")
        _checks.same_device("previous", previous, "z0", z0.device)
    if first is not None:
        if not isinstance(first, Tensor) or first.dtype != torch.bool:
            raise TypeError(f"first must be a bool tensor, got {_kind(first)}")
        if tuple(first.shape) != (z0.shape[0],):
            raise ValueError(f"first must be [{z0.shape[0]}], got {tuple(first.shape)}")
        _checks.same_device("first", first, "z0", z0.device)
    return width


def _check_values(
    values: ValueEnsemble,
    z0: Tensor,
    width: int,
    policy: Policy | FlowPolicy | None,
    task: Tensor | None,
) -> None:
    _checks.one_of("values.order", values.order, ORDERS)
    _checks.one_of("values.reduce", values.reduce, REDUCTIONS)
    if len(values.layers) == 0:
        raise ValueError("values.layers must hold at least one layer")
    if values.on_action and policy is None:
        raise ValueError("values.on_action needs a policy, which gives the last action; got None")
    if not 0.0 < values.scale < math.inf:
        raise ValueError(f"values.scale must be a positive number, got {values.scale!r}")
    given = sum(x.shape[-1] for x in values.inputs(z0, z0.new_empty(0, width), task))
    net = values.layers
    if _is_stacked(net):
        outputs = _checks.layers("values.layers", net, given, z0.device, ensemble=True)
        counts = [layer.weight.shape[0] for layer in net]
        if min(counts) != max(counts) or counts[0] == 0:
            raise ValueError(f"values.layers must all have the same E >= 1 members, got {counts}")
    else:
        stacks: Sequence[Sequence[Layer]] = net  # type: ignore[assignment]
        outputs = 0
        for i, layers in enumerate(stacks):
            outputs = _checks.layers(f"values.layers[{i}]", layers, given, z0.device)
            if [_form(layer) for layer in layers] != [_form(layer) for layer in stacks[0]]:
                raise ValueError(
                    f"values.layers[{i}] must have the widths and options of values.layers[0]"
                )
    if outputs != 1:
        _checks.value_range(outputs, values.vmin, values.vmax)


def _form(layer: Layer) -> tuple[object, ...]:
    return (*(None if x is None else tuple(x.shape) for x in layer[:4]), *layer[4:])


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
