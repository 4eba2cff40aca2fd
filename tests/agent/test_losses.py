"""World-model losses against loops and sums written out from the definition, in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.agent.losses import WeightedLoss, pieces, weighted_loss
from pwm_fast.config import ConfigError, ModelLearningConfig, compose
from pwm_fast.models import LatentModel
from pwm_fast.ops import flow as flow_module
from tests.models.builders import ACTION, OBS, SlowModel, normal, same, small_model

HORIZON, BATCH, GAMMA = 4, 5, 0.9


@dataclasses.dataclass
class Data:
    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    tau: Tensor
    noise: Tensor | None = None  # on the starts of the flow's paths

    def windows(self) -> tuple[Tensor, ...]:
        return self.obs, self.action, self.reward, self.terminated


def data(horizon: int = HORIZON, batch: int = BATCH) -> Data:
    return Data(
        normal(horizon + 1, batch, OBS),
        normal(horizon, batch, ACTION),
        30.0 * normal(horizon, batch),
        (torch.rand(horizon, batch, dtype=torch.float64) < 0.3).double(),
        torch.rand(horizon, batch, dtype=torch.float64),
    )


def slow_cross_entropy(logits: Tensor, reward: float, vmin: float, vmax: float) -> Tensor:
    """``-sum_i p_i log softmax(logits)_i``, p the two-hot weights of symlog(reward)."""
    bins = len(logits)
    y = math.copysign(math.log(1.0 + abs(reward)), reward)
    y = min(max(y, vmin), vmax)
    centres = [vmin + i * (vmax - vmin) / (bins - 1) for i in range(bins)]
    upper = next(i for i in range(1, bins) if y <= centres[i])
    weight = (y - centres[upper - 1]) / (centres[upper] - centres[upper - 1])
    log_total = torch.log(sum(torch.exp(x) for x in logits))  # type: ignore[arg-type]
    return (1 - weight) * (log_total - logits[upper - 1]) + weight * (log_total - logits[upper])


def slow_loss(
    model: LatentModel, d: Data, config: ModelLearningConfig, task: int | None = None
) -> dict[str, Tensor]:
    """The losses step by step and row by row."""
    slow = SlowModel(model, task)
    horizon, batch = d.action.shape[:2]
    dynamics = reward = termination = torch.zeros((), dtype=torch.float64)
    noise = None if d.noise is None else config.start_noise * d.noise
    # Windows beyond these learn at tau = 0.
    drawn = math.ceil(config.flow_share * batch)
    learns_from_starts = model.config.kind == "flow"
    slow.config = dataclasses.replace(
        model.config,
        substeps=config.substeps or model.config.substeps,
        integrator=config.integrator or model.config.integrator,
    )
    z = slow.encode(d.obs[0])
    for t in range(horizon):
        target = slow.encode(d.obs[t + 1]).detach()
        teacher = config.flow_start == "teacher" and model.config.kind == "flow"
        start = slow.encode(d.obs[t]) if teacher else z
        if learns_from_starts and not teacher and t and config.start_grad != "rollout":
            start = z.detach()
            if config.start_grad == "encoder":
                own = slow.encode(d.obs[t])
                start = start + own - own.detach()
        if not learns_from_starts:
            difference = slow.next(start, d.action[t]) - target
        else:
            tau = torch.where(torch.arange(batch) < drawn, d.tau[t], 0.0)
            origin = start if noise is None else start + noise[t]
            point = (1 - tau)[:, None] * origin + tau[:, None] * target
            goal = target - origin
            if not config.target_grad:
                goal = goal.detach()
            difference = slow.velocity(point, d.action[t], tau) - goal
        logits = slow.reward(start, d.action[t])
        for b in range(batch):
            weight = GAMMA**t / batch
            squares = sum(x * x for x in difference[b])
            dynamics = dynamics + weight * squares / difference.shape[1]
            r = d.reward[t, b].item()
            if model.config.num_bins == 1:
                error = (logits[b, 0] - r) ** 2
            else:
                error = slow_cross_entropy(logits[b], r, model.config.vmin, model.config.vmax)
            reward = reward + weight * error
            if model._termination is not None:
                p = 1 / (1 + torch.exp(-slow.termination(start, d.action[t])[b]))
                flag = d.terminated[t, b]
                entropy = -(flag * torch.log(p) + (1 - flag) * torch.log(1 - p))
                termination = termination + weight * entropy
        z = slow.next(z, d.action[t])
    total = (
        config.dynamics_coef * dynamics
        + config.reward_coef * reward
        + config.termination_coef * termination
    )
    parts = {"total": total, "dynamics": dynamics, "reward": reward, "termination": termination}
    return {name: value / horizon for name, value in parts.items()}


def fast_loss(
    model: LatentModel, d: Data, config: ModelLearningConfig, task: Tensor | None = None
) -> WeightedLoss:
    return weighted_loss(model, *d.windows(), config, gamma=GAMMA, task=task, tau=d.tau)


def gradients(loss: Tensor, model: LatentModel) -> dict[str, Tensor]:
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(params.items(), grads, strict=True)
    }


FLOWS = [
    {"kind": "flow", "flow_start": start, "target_grad": grad, "head": head}
    for start, grad, head in itertools.product(
        ("rollout", "teacher"), (True, False), ("linear", "simnorm")
    )
]
CASES: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp"},
    **{"-".join(str(v) for v in case.values()): case for case in FLOWS},
    "euler": {"kind": "flow", "integrator": "euler", "substeps": 3},
    "another integrator": {"kind": "flow", "learning": {"integrator": "euler"}},
    "another K": {"kind": "flow", "learning": {"substeps": 1}},
    **{
        f"flow_share {share}, target_grad {grad}": {
            "kind": "flow",
            "integrator": "euler",
            "substeps": 1,
            "target_grad": grad,
            "learning": {"flow_share": share},
        }
        for share, grad in ((0.3, True), (0.3, False), (0.0, True), (0.0, False))
    },
    "flow_share, learned with another integrator": {
        "kind": "flow",
        "can_terminate": True,
        "task": 1,
        "learning": {"flow_share": 0.5, "integrator": "euler", "substeps": 1},
    },
    "encoder": {"kind": "flow", "start_grad": "encoder"},
    "none": {"kind": "flow", "start_grad": "none"},
    "mlp, none": {"kind": "mlp", "start_grad": "none"},
    "residual": {"kind": "residual"},
    "residual, terminating": {"kind": "residual", "can_terminate": True},
    "residual, task": {"kind": "residual", "task": 1},
    "encoder, task": {"kind": "flow", "start_grad": "encoder", "task": 2},
    "scalar reward": {"kind": "mlp", "num_bins": 1},
    "flow, scalar reward": {"kind": "flow", "num_bins": 1},
    "terminating": {"kind": "mlp", "can_terminate": True},
    "flow, terminating": {"kind": "flow", "can_terminate": True},
    "task": {"kind": "mlp", "task": 1, "can_terminate": True},
    "flow, task": {"kind": "flow", "task": 2, "can_terminate": True},
    "rewards beyond the bins": {"kind": "mlp", "vmin": -1.0, "vmax": 2.0},
}


def build(case: dict[str, Any]) -> tuple[LatentModel, ModelLearningConfig, int | None]:
    case = dict(case)
    task = case.pop("task", None)
    own = ("flow_start", "start_grad", "target_grad")
    learning = {k: case.pop(k) for k in own if k in case} | case.pop("learning", {})
    if task is not None:
        case |= {"task_dim": 3, "num_tasks": 3}
    model = small_model(case.pop("can_terminate", False), **case)
    coefficients = {"dynamics_coef": 1.7, "reward_coef": 0.3, "termination_coef": 0.6}
    return model, ModelLearningConfig(**coefficients, **learning), task


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_the_definition(name: str) -> None:
    """Each part, the total, and the gradient of every parameter."""
    model, config, task = build(CASES[name])
    d = data()
    numbers = None if task is None else torch.full((BATCH,), task)
    ours, slow = fast_loss(model, d, config, numbers), slow_loss(model, d, config, task)
    for part in ("dynamics", "reward", "termination", "total"):
        same(getattr(ours, part), slow[part], msg=part)
        assert getattr(ours, part).shape == ()
    assert ours.dynamics > 0.01
    fast_grads, slow_grads = gradients(ours.total, model), gradients(slow["total"], model)
    for key, expected in slow_grads.items():
        same(fast_grads[key], expected, msg=key, atol=1e-9)
        if key.endswith("0.weight"):
            assert expected.abs().max() > 1e-4, key


EULER: dict[str, Any] = {"integrator": "euler", "substeps": 1}


@pytest.mark.parametrize(
    ("model", "learning", "share"),
    [
        (EULER, {}, 0.25),
        ({}, EULER, 0.25),
        (EULER, {"flow_share": 0.5}, 0.5),
        (EULER, {"start_noise": 0.1, "flow_share": 0.5}, 0.5),
        (EULER, {"start_noise": 0.1}, 1.0),
        (EULER, {"start_noise": "auto"}, 1.0),
        (EULER, {"tau_sampling": "midpoint"}, 1.0),
        (EULER, {"flow_start": "teacher"}, 1.0),
        (EULER, {"start_grad": "none"}, 1.0),
        (EULER, {"substeps": 2}, 1.0),
        (EULER, {"integrator": "heun"}, 1.0),
        (EULER | {"project": True}, {}, 1.0),
        ({}, {}, 1.0),
    ],
)
def test_the_share_of_drawn_flow_times(
    model: dict[str, Any], learning: dict[str, Any], share: float
) -> None:
    """``auto`` is a quarter where the others cost nothing, and all elsewhere."""
    config = ModelLearningConfig(**{"flow_share": "auto"} | learning)
    dynamics = small_model(kind="flow", **model).learned_dynamics(config)
    assert isinstance(dynamics, ops.Flow)
    assert dynamics.share == share


@pytest.mark.parametrize(
    "change",
    [
        {"flow_start": "teacher"},
        {"start_grad": "encoder"},
        {"integrator": "heun"},
        {"substeps": 2},
    ],
)
def test_a_share_that_would_cost_more_is_refused(change: dict[str, Any]) -> None:
    overrides = [f"alg.model_learning.{k}={v}" for k, v in change.items()]
    share = "alg.model_learning.flow_share"
    assert compose("alg=pwm_tiny_flow", f"{share}=0.5").alg.model_learning.flow_share == 0.5
    compose("alg=pwm_tiny_flow", *overrides)
    with pytest.raises(ConfigError, match=f"{share} must be 1 or auto but for"):
        compose("alg=pwm_tiny_flow", f"{share}=0.5", *overrides)


@pytest.mark.parametrize("start", ["rollout", "teacher"])
def test_start_noise_moves_the_paths_start_alone(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards and rollout see the clean latent; the path leads from the noisy one to the target."""
    model = small_model(kind="flow")
    d, config = data(), ModelLearningConfig(flow_start=start, start_noise=0.1)
    d.noise = normal(HORIZON, BATCH, 16)
    asked = []

    def randn_like(x: Tensor) -> Tensor:
        asked.append(x.shape)
        assert d.noise is not None
        return d.noise

    monkeypatch.setattr(torch, "randn_like", randn_like)
    ours, slow = fast_loss(model, d, config), slow_loss(model, d, config)
    assert asked == [(HORIZON, BATCH, 16)]
    same(ours.dynamics, slow["dynamics"])
    same(ours.reward, slow["reward"])
    fast_grads, slow_grads = gradients(ours.total, model), gradients(slow["total"], model)
    for key, expected in slow_grads.items():
        same(fast_grads[key], expected, msg=key, atol=1e-9)


@pytest.mark.parametrize("start", ["rollout", "teacher"])
def test_measured_noise_has_the_models_own_spread(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto``: noise of the deviations that were measured, by step and entry; none before."""
    model = small_model(kind="flow")
    d = data()
    config = ModelLearningConfig(flow_start=start, start_noise="auto")
    draw, spread = normal(HORIZON, BATCH, 16), torch.rand(HORIZON, 1, 16, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda x: draw)
    found = weighted_loss(model, *d.windows(), config, gamma=GAMMA, tau=d.tau, spread=spread)
    known = dataclasses.replace(config, start_noise=1.0)
    d.noise = draw * spread
    slow = slow_loss(model, d, known)
    same(found.dynamics, slow["dynamics"])
    clean = weighted_loss(model, *d.windows(), config, gamma=GAMMA, tau=d.tau)
    d.noise = None
    same(
        clean.dynamics,
        slow_loss(model, d, dataclasses.replace(config, start_noise=0.0))["dynamics"],
    )


def test_pieces_are_windows_of_their_own() -> None:
    obs = torch.arange(7.0).view(7, 1, 1) + 100.0 * torch.arange(2.0).view(1, 2, 1)
    action, reward = obs[:-1] + 0.25, obs[:-1, :, 0] + 0.5
    o, a, r = pieces(3, obs, action, reward)
    assert o.shape == (4, 4, 1) and a.shape == (3, 4, 1) and r.shape == (3, 4)
    assert o[:, :, 0].T.tolist() == [
        [0.0, 1.0, 2.0, 3.0],
        [3.0, 4.0, 5.0, 6.0],
        [100.0, 101.0, 102.0, 103.0],
        [103.0, 104.0, 105.0, 106.0],
    ]
    assert torch.equal(a, o[:-1] + 0.25) and torch.equal(r, o[:-1, :, 0] + 0.5)
    assert all(x is y for x, y in zip(pieces(None, obs, action), (obs, action), strict=True))
    with pytest.raises(ValueError, match="windows of 6 steps cannot be cut into pieces of 4"):
        pieces(4, obs, action)


def test_parts_are_for_logging_and_carry_no_gradient() -> None:
    model, config, _ = build(CASES["flow, terminating"])
    loss = fast_loss(model, data(), config)
    assert loss.total.requires_grad
    *parts, metrics = loss[1:]
    assert not any(x.requires_grad for x in (*parts, *metrics.values()))


def test_termination_is_zero_without_its_head() -> None:
    model, config, _ = build(CASES["mlp"])
    loss = fast_loss(model, data(), config)
    assert loss.termination.item() == 0.0


def test_latent_std_is_the_targets_spread() -> None:
    """Over time and batch, mean over the entries; 0 for a collapsed encoder."""
    model, config, _ = build(CASES["mlp"])
    d = data()
    z = SlowModel(model).encode(d.obs[1:].reshape(-1, OBS)).detach()
    expected = ((z - z.mean(0)) ** 2).mean(0).sqrt().mean()
    same(fast_loss(model, d, config).latent_std, expected)
    with torch.no_grad():
        model._encoder[-1].ln.weight.zero_()  # type: ignore[union-attr]
    assert fast_loss(model, d, config).latent_std < 1e-12


# Which gradients exist


@pytest.mark.parametrize("name", CASES)
def test_targets_pass_no_gradient(name: str) -> None:
    """An observation used as a target alone gets none: all but the first in a rollout."""
    model, config, task = build(CASES[name])
    d = data()
    d.obs.requires_grad_()
    numbers = None if task is None else torch.full((BATCH,), task)
    (grad,) = torch.autograd.grad(fast_loss(model, d, config, numbers).total, d.obs)
    alone = config.flow_start == "rollout" and config.start_grad != "encoder"
    sources = 1 if alone or model.config.kind != "flow" else HORIZON
    assert (grad[:sources].abs().amax(dim=(1, 2)) > 1e-8).all()
    assert grad[sources:].eq(0).all()


@pytest.mark.parametrize("flow_start", ["rollout", "teacher"])
@pytest.mark.parametrize("target_grad", [True, False])
def test_target_grad_is_the_gradient_through_the_velocity_target(
    flow_start: str, target_grad: bool
) -> None:
    """With v = 0 whatever its input, v* is the only way from the loss to the encoder."""
    model = small_model(kind="flow")
    with torch.no_grad():
        model._velocity[-1].weight.zero_()  # type: ignore[operator, union-attr]
        model._velocity[-1].bias.zero_()  # type: ignore[operator, union-attr]
    config = ModelLearningConfig(flow_start=flow_start, target_grad=target_grad, reward_coef=0.0)
    d = data()
    loss = fast_loss(model, d, config)
    encoder = {k: g for k, g in gradients(loss.total, model).items() if k.startswith("_encoder")}
    if not target_grad:
        assert all(g.eq(0).all() for g in encoder.values())
        return
    z0 = SlowModel(model).encode(d.obs[0])
    total = torch.zeros((), dtype=torch.float64)
    for t in range(HORIZON):  # with v = 0 a rollout stays where it starts
        start = SlowModel(model).encode(d.obs[t]) if flow_start == "teacher" else z0
        target = SlowModel(model).encode(d.obs[t + 1]).detach()
        total = total + 20.0 * GAMMA**t / HORIZON * (target - start).square().mean()
    same(loss.total, total)
    for key, expected in gradients(total, model).items():
        if key in encoder:
            same(encoder[key], expected, msg=key)


# Flow times


def recorded_tau(model: LatentModel, config: ModelLearningConfig, d: Data) -> Tensor:
    """The flow times at which one loss evaluates the velocity for its target."""
    seen: list[Tensor] = []

    def velocity(z: Tensor, a: Tensor, tau: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tau)
        return ops.velocity_field(z, a, tau, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_module, "velocity_field", velocity)
        weighted_loss(model, *d.windows(), config, gamma=GAMMA)
    assert len(seen) == 1
    return seen[0]


def test_uniform_tau() -> None:
    """One draw for every sample and step, spread evenly over [0, 1), new at every call."""
    model, d = small_model(kind="flow"), data(horizon=8, batch=250)
    tau = recorded_tau(model, ModelLearningConfig(), d)
    assert tau.shape == (8, 250) and tau.dtype == d.obs.dtype
    assert tau.min() >= 0 and tau.max() <= 1
    assert len(tau.unique()) > 1990
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
    positions = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert (tau.flatten().sort().values - positions).abs().max() < 1.95 / 2000**0.5
    assert not torch.equal(recorded_tau(small_model(kind="flow"), ModelLearningConfig(), d), tau)


def test_midpoint_tau() -> None:
    model = small_model(kind="flow")
    tau = recorded_tau(model, ModelLearningConfig(tau_sampling="midpoint"), data())
    assert torch.equal(tau, torch.full((HORIZON, BATCH), 0.5, dtype=torch.float64))


def test_given_tau_is_used() -> None:
    """The loss at tau = 0 is that at z[t], at tau = 1 that at the target."""
    model, config = small_model(kind="flow"), ModelLearningConfig(flow_start="teacher")
    d = data()
    for value in (0.0, 1.0):
        d.tau.fill_(value)
        total = torch.zeros((), dtype=torch.float64)
        slow = SlowModel(model)
        for t in range(HORIZON):
            start, target = slow.encode(d.obs[t]), slow.encode(d.obs[t + 1])
            v = slow.velocity(target if value else start, d.action[t], value)
            total = total + GAMMA**t / HORIZON * (v - (target - start)).square().mean()
        same(fast_loss(model, d, config).dynamics, total)
