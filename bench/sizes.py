"""The agents that are measured: published sizes, on observations and actions of the Ant."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from bench import plain
from pwm_fast import config
from pwm_fast.agent import PWM
from pwm_fast.replay import Windows

OBS, ACTION, HORIZON = 37, 8, 16


def alg_config(
    model: str, substeps: int = 2, integrator: str = "heun", flow_share: float = 1.0
) -> config.AlgConfig:
    """The configuration ``pwm_<model>``, with K steps of an integrator and flow times of 0.5.

    Shipped flows have one Euler step and draw the times of a quarter of the windows. Fixed flow
    times cost the same as drawn ones and let any two providers be compared.
    """
    alg = plain.load("alg", f"pwm_{model}")
    alg.setdefault("model_learning", {}).update(tau_sampling="midpoint", flow_share=flow_share)
    alg["world_model"].update(substeps=substeps, integrator=integrator)
    return plain.build(config.AlgConfig, alg)


def make_agent(
    alg: config.AlgConfig,
    device: torch.device,
    seed: int = 0,
    *,
    graphs: bool = False,
    precision: str = "auto",
) -> PWM:
    """An agent with random parameters: the zero weights of fresh heads would hide errors."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*midpoint.*")
        agent = PWM(OBS, ACTION, alg, device=device, graphs=graphs, precision=precision)
    with torch.no_grad():
        for module in agent.world_model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(0.1 * torch.randn_like(module.weight))
                module.bias.add_(0.1 * torch.randn_like(module.bias))
            elif isinstance(module, nn.Linear):
                module.bias.add_(0.02 * torch.randn_like(module.bias))
                if not module.weight.any():
                    # Logits of a trained head differ by more than 1. If they were nearly equal,
                    # the expectation over the bins would cancel to nothing but rounding errors.
                    nn.init.normal_(module.weight, std=2.0 / module.in_features**0.5)
    return agent


def make_windows(batch: int, device: torch.device, seed: int = 0) -> Windows:
    """Random windows of replay."""
    g = torch.Generator().manual_seed(seed)
    parts = (
        torch.randn(HORIZON + 1, batch, OBS, generator=g),
        torch.rand(HORIZON, batch, ACTION, generator=g) * 2 - 1,
        3.0 * torch.randn(HORIZON, batch, generator=g),
        torch.zeros(HORIZON, batch),
    )
    return Windows(*(p.to(device) for p in parts))
