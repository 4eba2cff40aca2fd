"""What latents hold of observations, where it is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pwm_fast.analysis.latents import effective_dimensions, latent_report
from pwm_fast.replay import Episode


def episodes(width: int = 6, count: int = 8, steps: int = 200) -> list[Episode]:
    g = torch.Generator().manual_seed(0)
    shape = (count, steps + 1, width)
    empty = torch.zeros(steps, 1), torch.zeros(steps), torch.zeros(steps, dtype=torch.bool)
    return [Episode(obs, *empty) for obs in torch.randn(*shape, generator=g)]


def test_nothing_is_lost_where_latents_are_observations() -> None:
    found = latent_report(lambda obs: obs, episodes())
    assert found["width"] == found["obs_width"] == 6
    assert found["obs_r2"] == pytest.approx([1.0] * 6, abs=1e-4)
    assert found["dimensions"] == pytest.approx(6.0, rel=0.02)
    assert found["obs_dimensions"] == pytest.approx(6.0, rel=0.02)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_scale_and_rotation_change_nothing(scale: float) -> None:
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    found = latent_report(lambda obs: 3.0 + scale * obs @ turn, episodes())
    assert found["obs_r2_min"] == pytest.approx(1.0, abs=1e-3)
    assert found["dimensions"] == pytest.approx(6.0, rel=0.02)


def test_an_entry_that_is_left_out() -> None:
    found = latent_report(lambda obs: obs[:, 1:], episodes())
    first, *others = found["obs_r2"]  # type: ignore[misc]
    assert abs(first) < 0.02 and min(others) > 0.999
    assert found["obs_r2_min"] == first


def shrunk(obs: Tensor, by: float) -> Tensor:
    return torch.cat([obs[:, :1], by * obs[:, 1:]], -1)


def test_an_entry_that_hardly_moves_the_latent() -> None:
    """An exact regression would still find it; a network that reads the latent does not."""
    found = latent_report(lambda obs: shrunk(obs, 1e-3), episodes())
    first, *others = found["obs_r2"]  # type: ignore[misc]
    assert first > 0.999 and max(others) < 0.1
    assert found["dimensions"] == pytest.approx(1.0, abs=1e-3)


def test_what_does_not_vary() -> None:
    still = [e._replace(obs=torch.cat([torch.ones(len(e.obs), 1), e.obs], 1)) for e in episodes()]
    found = latent_report(lambda obs: obs, still)
    first, *others = found["obs_r2"]  # type: ignore[misc]
    assert math.isnan(first) and min(others) > 0.999
    assert found["obs_r2_min"] == min(others)
    assert math.isnan(effective_dimensions(torch.full((1608, 5), 0.3)))
    nothing = latent_report(torch.zeros_like, episodes())
    assert max(nothing["obs_r2"]) < 0.02 and math.isnan(nothing["dimensions"])  # type: ignore[call-overload, arg-type]
