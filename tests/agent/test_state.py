"""An agent that is saved and loaded goes on to the bit; one of another shape is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_fast.agent import PWM
from tests.agent.agents import (
    AGENTS,
    changed,
    make_agent,
    make_obs,
    make_task,
    make_windows,
    snapshot,
)


def learn(agent: PWM, seed: int, *, poison: bool = False) -> list[Tensor]:
    """One epoch of everything that changes an agent."""
    torch.manual_seed(seed)
    agent.set_progress(0.1 * seed)
    agent.observe(make_obs(8, seed), torch.randn(8), make_task(8))
    windows = make_windows(seed=seed)
    if poison:
        windows.reward[0, 0] = float("nan")
    metrics = agent.update_world_model(windows)
    metrics |= agent.update_policy(make_obs(6, seed), make_task(6))
    metrics |= agent.skipped_updates()
    return [agent.act(make_obs(4, seed), task=make_task(4)), *metrics.values()]


def statistics(agent: PWM) -> dict[str, Tensor]:
    modules = {"obs": agent.obs_rms, "rew": agent.reward_rms, "ret": agent.return_rms}
    return {f"{k}.{n}": b.clone() for k, m in modules.items() for n, b in m.named_buffers()}


@pytest.mark.parametrize("name", AGENTS)
def test_round_trip_through_a_file_continues_to_the_bit(name: str, tmp_path: Path) -> None:
    """Parameters, statistics, moments, step counts, rates and skip counts."""
    agent = make_agent(0, **AGENTS[name])
    for seed in range(2):
        learn(agent, seed, poison=seed == 1)
    torch.save(agent.state_dict(), tmp_path / "agent.pt")
    saved = torch.load(tmp_path / "agent.pt", weights_only=True)
    fresh = make_agent(1, **AGENTS[name])
    learn(fresh, 7)  # what it learnt before is gone
    fresh.load_state_dict(saved)
    for seed in (3, 4):
        for a, b in zip(learn(agent, seed), learn(fresh, seed), strict=True):
            assert torch.equal(a, b)
        assert changed(snapshot(agent), snapshot(fresh)) == []
        assert changed(statistics(agent), statistics(fresh)) == []


def test_two_agents_of_one_state_share_nothing() -> None:
    """Loading the state of a living agent copies it: their ways part."""
    agent, other = make_agent(0), make_agent(1)
    learn(agent, 0)
    other.load_state_dict(agent.state_dict())
    before = snapshot(other)
    learn(agent, 1)
    assert changed(before, snapshot(other)) == []
    assert len(changed(before, snapshot(agent))) == len(before)


def test_published_keys() -> None:
    """The keys of a published PWM file."""
    state = make_agent().state_dict()
    networks = {"world_model", "actor", "critic"}
    optimizers = {"world_model_opt", "actor_opt", "critic_opt"}
    assert set(state) == networks | optimizers | {"obs_rms", "rew_rms", "ret_rms"}
    assert "_encoder.0.ln.weight" in state["world_model"]
    assert "mu_net.0.weight" in state["actor"]
    assert "params.0" in state["critic"]


def test_without_optimisers() -> None:
    """For evaluation: networks and statistics alone are enough, Adam stays as it was."""
    agent, other = make_agent(0), make_agent(1)
    learn(agent, 0)
    state = {k: v for k, v in agent.state_dict().items() if not k.endswith("_opt")}
    other.load_state_dict(state, optimizers=False)
    same = {k: v for k, v in snapshot(agent).items() if not k.endswith(("step", "avg", "sq"))}
    assert changed(same, snapshot(other)) == []
    torch.manual_seed(0)
    expected = agent.act(make_obs())
    torch.manual_seed(0)
    assert torch.equal(other.act(make_obs()), expected)


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "wider latent": (
        {"latent_dim": 24},
        r"world_model\._encoder\.1\.weight is \[24, 12\] instead of \[16, 12\]",
    ),
    "other dynamics": (
        {"kind": "mlp"},
        r"world_model\._velocity\.0\.weight is missing",
    ),
    "simnorm head": ({"head": "simnorm"}, r"world_model\._velocity\.1\.ln\.weight is unknown"),
    "termination": (
        {"can_terminate": True},
        r"world_model\._termination\.0\.weight is unknown",
    ),
    "actor": ({"actor_units": [12, 9]}, r"actor\.mu_net\.3\.weight is \[9, 12\] instead of \[10"),
    "critics": ({"members": 2}, r"critic\.params\.0 is \[2, 11, 16\] instead of \[3, 11, 16\]"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_architecture_is_refused_by_parameter(name: str) -> None:
    """The message names a parameter and both shapes; nothing was loaded."""
    changes, message = MISMATCHES[name]
    agent = make_agent(0)
    before = snapshot(agent)
    state = make_agent(1, **changes).state_dict()
    with pytest.raises(ValueError, match=f"another architecture: .*{message}"):
        agent.load_state_dict(state)
    assert changed(before, snapshot(agent)) == []


def test_long_lists_of_differences_are_cut() -> None:
    with pytest.raises(ValueError, match=r"; and \d+ more$") as caught:
        make_agent(0).load_state_dict(make_agent(1, kind="mlp").state_dict())
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("key", ["actor", "obs_rms", "critic_opt"])
def test_a_missing_part_is_named_and_nothing_loaded(key: str) -> None:
    agent, state = make_agent(0), make_agent(1).state_dict()
    del state[key]
    before = snapshot(agent)
    with pytest.raises(ValueError, match=f"{key} is missing"):
        agent.load_state_dict(state)
    assert changed(before, snapshot(agent)) == []
