"""Why the published velocity head cannot learn: a floor under its loss (docs/simnorm_head.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pwm_fast.agent.losses import WeightedLoss, weighted_loss
from pwm_fast.agent.optim import GuardedAdam
from pwm_fast.config import ModelLearningConfig, WorldModelConfig
from pwm_fast.models import FlowWorldModel, make_world_model
from tests.models.builders import randomize_

HORIZON, GAMMA = 16, 0.99


def floor(horizon: int = HORIZON, gamma: float = GAMMA) -> float:
    """``sum_t gamma^t ((t + 1) / 8)^2 / H``."""
    return sum(gamma**t * ((t + 1) / 8) ** 2 for t in range(horizon)) / horizon


def make(head: str, **changes: object) -> FlowWorldModel:
    config = WorldModelConfig(
        latent_dim=32, units=[48, 48], encoder_units=[32], reward_units=[16], head=head
    )
    for key, value in changes.items():
        setattr(config, key, value)
    model = make_world_model(3, 1, config)
    assert isinstance(model, FlowWorldModel)
    return model


def pendulum(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Windows of a damped pendulum under random torques: ``cos, sin, velocity``; deterministic."""
    angle = (torch.rand(batch, generator=generator) * 2 - 1) * torch.pi
    velocity = torch.randn(batch, generator=generator)
    action = torch.rand(HORIZON, batch, 1, generator=generator) * 2 - 1
    obs = [torch.stack((angle.cos(), angle.sin(), velocity), -1)]
    for t in range(HORIZON):
        velocity = velocity + 0.1 * (2.0 * action[t, :, 0] - 3.0 * angle.sin() - 0.1 * velocity)
        angle = angle + 0.1 * velocity
        obs.append(torch.stack((angle.cos(), angle.sin(), velocity), -1))
    return torch.stack(obs), action, -angle.cos().expand(HORIZON, batch)


def loss_of(
    model: FlowWorldModel, obs: Tensor, action: Tensor, reward: Tensor, **changes: object
) -> WeightedLoss:
    config = ModelLearningConfig()
    for key, value in changes.items():
        setattr(config, key, value)
    return weighted_loss(model, obs, action, reward, torch.zeros_like(reward), config, gamma=GAMMA)


def test_the_floor_is_1_30394() -> None:
    """gamma 0.99, H 16: the figure at which the published world model is reported to stand."""
    assert floor() == pytest.approx(1.30394, abs=5e-6)


@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("target_grad", [True, False])
@pytest.mark.parametrize(("integrator", "substeps"), [("heun", 2), ("heun", 1), ("euler", 4)])
def test_no_parameters_go_below_the_floor(
    scale: float, target_grad: bool, integrator: str, substeps: int
) -> None:
    """Whatever the weights, data, integrator and gradient: the loss is never below it."""
    for _ in range(5):
        model = make("simnorm", integrator=integrator, substeps=substeps).double()
        randomize_(model, scale)
        obs = scale * torch.randn(HORIZON + 1, 6, 3, dtype=torch.float64)
        action = torch.randn(HORIZON, 6, 1, dtype=torch.float64)
        reward = torch.randn(HORIZON, 6, dtype=torch.float64)
        loss = loss_of(model, obs, action, reward, target_grad=target_grad)
        assert loss.dynamics >= floor() - 1e-12


@pytest.mark.parametrize("scale", [0.02, 1.0, 5.0])
def test_floor_with_encoded_starts(scale: float) -> None:
    """Nothing adds up, but the means still differ by 1/8: ``(1/64) sum_t gamma^t / H``."""
    least = sum(GAMMA**t for t in range(HORIZON)) / 64 / HORIZON
    assert least == pytest.approx(0.01451, abs=5e-6)
    model = make("simnorm").double()
    randomize_(model, scale)
    obs = torch.randn(HORIZON + 1, 6, 3, dtype=torch.float64)
    action, reward = obs[1:, :, :1], obs[1:, :, 0]
    loss = loss_of(model, obs, action, reward, flow_start="teacher")
    assert least - 1e-12 <= loss.dynamics < floor()


def test_the_floor_is_reached() -> None:
    """Constant latents and velocities (all weights 0) give exactly the floor: it is the least."""
    model = make("simnorm").double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    obs = torch.randn(HORIZON + 1, 6, 3, dtype=torch.float64)
    action = torch.randn(HORIZON, 6, 1, dtype=torch.float64)
    loss = loss_of(model, obs, action, torch.zeros(HORIZON, 6, dtype=torch.float64))
    assert loss.dynamics.item() == pytest.approx(floor(), abs=1e-12)


def test_each_step_adds_1_to_every_group() -> None:
    """What the floor comes from: after t steps a group of the rolled-out latent sums to 1 + t."""
    model = make("simnorm").double()
    randomize_(model)
    z = model.encode(torch.randn(4, 3, dtype=torch.float64))
    for t in range(HORIZON):
        sums = z.unflatten(-1, (-1, 8)).sum(-1)
        torch.testing.assert_close(sums, torch.full_like(sums, 1.0 + t), rtol=1e-12, atol=0)
        z = model.next(z, torch.randn(4, 1, dtype=torch.float64))


def train(head: str, updates: int = 80) -> list[WeightedLoss]:
    """Losses of each update on the pendulum."""
    torch.manual_seed(0)
    model = make(head)
    optimizer = GuardedAdam(model.parameters(), 1e-3, (0.7, 0.95), 20.0)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(updates):
        losses.append(loss_of(model, *pendulum(32, generator)))
        optimizer.step(losses[-1].total)
    assert int(optimizer.skipped) == 0
    return losses


def test_training_does_not_help_the_simnorm_head() -> None:
    """Same data, same updates: it stays above the floor, the linear head goes far below."""
    simnorm, linear = train("simnorm"), train("linear")
    # Rounding of float32 sums over 16 steps, relative.
    assert min(loss.dynamics.item() for loss in simnorm) >= floor() * (1 - 1e-5)
    assert simnorm[-1].dynamics < simnorm[0].dynamics, "it has not trained at all"
    last = [loss.dynamics.item() for loss in linear[-20:]]
    assert max(last) < 0.02
    assert sum(last) / 20 < 0.05 * linear[0].dynamics
    # It is no collapse of the encoder that makes the loss small.
    assert linear[-1].latent_std > 0.5 * linear[0].latent_std
