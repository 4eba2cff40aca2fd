"""Parameter counts of the published sizes, composed from the YAML files that a run uses."""

from __future__ import annotations

import pytest
import torch

from pwm_fast.models import LatentModel, WorldModel, make_world_model
from tests.models.builders import compose

OBS, ACTION = 37, 8
SIZES = ("5M", "19M", "48M", "317M")
PAIRS = [("pwm", "pwm_flow"), *((f"pwm_{s}", f"pwm_{s}_flow") for s in SIZES)]


def model_of(alg: str) -> LatentModel:
    """On the meta device: 317M takes no memory."""
    config = compose("env=ant", f"alg={alg}").alg.world_model
    with torch.device("meta"):
        return make_world_model(OBS, ACTION, config)


@pytest.mark.parametrize(("alg", "count"), [("pwm_5M", 1_521_253), ("pwm_48M", 18_668_389)])
def test_published_counts(alg: str, count: int) -> None:
    """Observation 37, action 8, single task."""
    model = model_of(alg)
    assert isinstance(model, WorldModel)
    assert model.num_parameters()["total"] == count
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("baseline", "flow"), PAIRS)
def test_flow_has_the_baseline_s_size(baseline: str, flow: str) -> None:
    """Within 2 %, with the very same encoder and reward head."""
    base, ours = model_of(baseline), model_of(flow)
    counts, flow_counts = base.num_parameters(), ours.num_parameters()
    assert abs(flow_counts["total"] - counts["total"]) <= 0.02 * counts["total"]
    assert "velocity" in flow_counts and "dynamics" in counts
    shapes = [
        {n: tuple(p.shape) for n, p in m.named_parameters() if n.startswith(("_enc", "_rew"))}
        for m in (base, ours)
    ]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) > 8


@pytest.mark.parametrize(
    ("size", "latent", "units", "encoder", "flow_units"),
    [
        ("5M", 512, [512, 512], [256], [510, 510]),
        ("19M", 512, [1024, 1024], [1024, 1024], [1024, 1024]),
        ("48M", 768, [1792, 1792], [1792, 1792, 1792], [1788, 1788]),
        ("317M", 1376, [4096, 4096], [4096] * 4, [4096, 4096]),
    ],
)
def test_published_widths(
    size: str, latent: int, units: list[int], encoder: list[int], flow_units: list[int]
) -> None:
    for kind, widths in (("mlp", units), ("flow", flow_units)):
        alg = f"pwm_{size}" if kind == "mlp" else f"pwm_{size}_flow"
        config = compose("env=ant", f"alg={alg}").alg.world_model
        assert config.kind == kind
        assert config.latent_dim == latent
        assert config.units == widths
        assert config.encoder_units == encoder
        assert config.reward_units == units
        assert config.num_bins == 101
        assert config.head == "linear"


@pytest.mark.parametrize("kind", ["mlp", "flow"])
def test_meta_count_is_the_real_count(kind: str) -> None:
    """The count on the meta device is that of real parameters."""
    config = compose("env=ant", "alg=pwm_tiny_flow").alg.world_model
    config.kind = kind
    with torch.device("meta"):
        meta = make_world_model(OBS, ACTION, config)
    assert make_world_model(OBS, ACTION, config).num_parameters() == meta.num_parameters()
