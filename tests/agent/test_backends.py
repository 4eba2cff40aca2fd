"""Training on a faster backend is training on the reference, but for rounding."""

from __future__ import annotations

import functools

import pytest
import torch

from pwm_fast.agent import PWM
from pwm_fast.backends import select
from pwm_fast.backends.native import why_missing
from pwm_fast.replay import Windows
from tests.models.builders import compose

UPDATES = 50


@functools.cache  # the reference's are those of two backends
def curves(backend: str, alg: str) -> dict[str, torch.Tensor]:
    """Losses of ``UPDATES`` updates of the model and the policy on learnable data."""
    torch.manual_seed(0)
    config = compose(f"alg={alg}", "alg.world_model.latent_dim=32", "alg.horizon=4").alg
    agent = PWM(5, 2, config, can_terminate=True)
    mix = torch.randn(7, 5) * 0.3
    rows: dict[str, list[torch.Tensor]] = {}
    with select.backend(backend):
        for _ in range(UPDATES):
            action = torch.rand(4, 16, 2) * 2 - 1
            obs = [torch.randn(16, 5)]
            for a in action:
                obs.append(torch.tanh(torch.cat((obs[-1], a), -1) @ mix))
            states = torch.stack(obs)
            windows = Windows(states, action, states[:-1].sum(-1), (states[1:, :, 0] > 0.9).float())
            metrics = {
                **agent.update_world_model(windows),
                **agent.update_policy(states[0]),
            }
            for key, value in metrics.items():
                rows.setdefault(key, []).append(value)
    return {key: torch.stack(values) for key, values in rows.items()}


@pytest.mark.parametrize("alg", ["pwm_tiny_flow", "pwm_tiny"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_same_loss_curves(backend: str, alg: str) -> None:
    """Fifty updates of everything: rounding grows, but nothing else does."""
    if backend == "native" and why_missing() is not None:
        pytest.skip(f"no native kernels: {why_missing()}")
    ours, reference = curves(backend, alg), curves("reference", alg)
    assert ours.keys() == reference.keys()
    for key in ("wm_loss", "dynamics_loss", "reward_loss", "termination_loss"):
        torch.testing.assert_close(ours[key], reference[key], rtol=2e-3, atol=1e-5, msg=key)
        assert reference[key][-5:].mean() < reference[key][:5].mean()  # something was learnt
    for key in ("actor_loss", "value_loss"):
        torch.testing.assert_close(ours[key][:10], reference[key][:10], rtol=1e-2, atol=1e-3)
