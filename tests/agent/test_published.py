"""``alg=pwm`` is PWM as published: losses, gradients and first updates, by formulas written anew.

And each of its departures from our defaults matters: with any of them put back something differs.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pwm_fast.agent import PWM
from pwm_fast.backends import select
from pwm_fast.backends.native import why_missing
from pwm_fast.config import AlgConfig, ConfigError, from_dict, to_dict
from pwm_fast.models import GaussianActor
from pwm_fast.replay import Windows
from pwm_fast.run.rundir import refuse_other_config
from tests.agent import published
from tests.agent.recorder import make_captured
from tests.models.builders import compose, randomize_

OBS, ACTION = 5, 2
SMALL = (
    "alg.world_model.latent_dim=16",
    "alg.world_model.units=[14,12]",
    "alg.world_model.encoder_units=[11]",
    "alg.world_model.reward_units=[10,9]",
    "alg.model_learning.batch_size=6",
    "alg.actor.units=[12,10,9]",
    "alg.actor.batch_size=8",
    "alg.critic.units=[11,9]",
    "esnr.every=0",
)
# What PWM's code does otherwise than our defaults: the key, our value, and where it first shows in
# a comparison. Observations are not normalised in the published configuration.
DEPARTURES: dict[str, tuple[str, str]] = {
    "alg.model_learning.betas": ("[0.7,0.95]", "world model after 2 updates"),
    "alg.model_learning.mean_reward_loss": ("false", "world-model loss"),
    "alg.value_delay": ("0", "actor loss"),
    "alg.centre_rewards": ("false", "world-model loss"),
    "alg.reward_clip": ("null", "world-model loss"),
    "alg.obs_clip": ("10.0", "world-model loss"),
    "alg.critic.lam": ("0.0", "critic losses"),
    "alg.critic.shuffle": ("true", "critic losses"),
}
F64 = torch.float64
PAGE = (Path(__file__).parents[2] / "docs" / "published.md").read_text("utf-8")


def preset(*overrides: str, alg: str = "pwm") -> AlgConfig:
    return compose(f"alg={alg}", *SMALL, *overrides).alg


def make(config: AlgConfig, dtype: torch.dtype, random: bool = True, **kwargs: Any) -> PWM:
    """An agent with statistics, and (``random``) no weight at 0, as a fresh reward head's are."""
    torch.manual_seed(0)
    agent = PWM(OBS, ACTION, config, **kwargs)
    for module in (agent.world_model, agent.actor, agent.critic):
        if random:
            randomize_(module)
        module.to(dtype)
    with torch.no_grad():
        agent.actor.logstd.fill_(-1.0)
    # Far from 0 and 1, and narrow: of what is normalised below a part is clipped.
    agent.observe(torch.randn(60, OBS) * 0.2 + 0.5, torch.randn(60) * 0.7 - 2.0)
    return agent


class Data:
    """Windows for two world-model updates, starts and noise for one of the policy."""

    def __init__(self, config: AlgConfig) -> None:
        g = torch.Generator().manual_seed(3)
        horizon, batch = config.horizon, config.model_learning.batch_size
        self.windows = [
            Windows(
                torch.randn(horizon + 1, batch, OBS, generator=g),
                torch.rand(horizon, batch, ACTION, generator=g) * 2 - 1,
                4.0 * torch.randn(horizon, batch, generator=g),
                torch.zeros(horizon, batch),
            )
            for _ in range(2)
        ]
        self.obs = torch.randn(config.actor.batch_size, OBS, generator=g)
        self.noise = torch.randn(horizon, config.actor.batch_size, ACTION, generator=g)


Results = dict[str, dict[str, Tensor]]  # stages in order, each with its tensors


def ours(agent: PWM, data: Data, dtype: torch.dtype) -> Results:
    for optimizer in agent.optimizers.values():
        optimizer.keep_gradients = True
    agent._noise = lambda *shape: data.noise.to(dtype)  # type: ignore[method-assign]
    agent.set_progress(0.0)
    results: Results = {}
    modules = agent._modules()

    def state(key: str, gradient: bool = False) -> dict[str, Tensor]:
        named = modules[key].named_parameters()
        return {k: (p.grad if gradient else p.detach()).clone() for k, p in named}  # type: ignore[union-attr]

    for i, windows in enumerate(data.windows, 1):
        metrics = agent.update_world_model(Windows(*(x.to(dtype) for x in windows[:4])))
        if i == 1:
            names = ("wm_loss", "dynamics_loss", "reward_loss")
            results["world-model loss"] = {k: metrics[k] for k in names}
            results["world-model gradient"] = state("world_model", gradient=True)
        results[f"world model after {i} updates"] = state("world_model")
    metrics = agent.update_policy(data.obs.to(dtype))
    results["actor loss"] = {"loss": metrics["actor_loss"]}
    results["actor gradient"] = state("actor", gradient=True)
    results["actor"] = state("actor")
    results["critic losses"] = {"mean": metrics["value_loss"]}
    results["critics"] = state("critic")
    return results


def theirs(
    agent: PWM, data: Data, dtype: torch.dtype, *, observations: bool = False, online: bool = True
) -> Results:
    """From the parameters that ``agent`` has before its first update."""
    results: Results = {}
    modules = (agent.world_model, agent.actor, agent.critic)
    model, actor, critic = (published.leaves(dict(m.named_parameters()), dtype) for m in modules)
    rewards = published.Statistics(agent.reward_rms.mean, agent.reward_rms.var)

    def seen(obs: Tensor) -> Tensor:
        statistics = published.Statistics(agent.obs_rms.mean, agent.obs_rms.var)
        return statistics.normalize(obs.to(dtype)) if observations else obs.to(dtype)

    def clipped(grads: dict[str, Tensor], limit: float) -> dict[str, Tensor]:
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        return {k: g * min(1.0, limit / (norm + 1e-6)) for k, g in grads.items()}

    adam = published.Adam(3e-4, (0.9, 0.999), 20.0)
    for i, w in enumerate(data.windows, 1):
        model = published.leaves(model, dtype)
        losses = published.world_model_loss(
            model, seen(w.obs), w.action.to(dtype), w.reward.to(dtype), rewards
        )
        grads = published.gradients(losses[0], model)
        if i == 1:
            names = ("wm_loss", "dynamics_loss", "reward_loss")
            results["world-model loss"] = dict(zip(names, losses, strict=True))
            results["world-model gradient"] = clipped(grads, 20.0)
        model = adam.step(model, grads)
        results[f"world model after {i} updates"] = model

    z, reward, returns = published.imagine(
        model, actor, critic, seen(data.obs), data.noise.to(dtype)
    )
    loss = published.actor_loss(returns)
    grads = published.gradients(loss, actor)
    results["actor loss"] = {"loss": loss}
    results["actor gradient"] = clipped(grads, 1.0)
    results["actor"] = published.Adam(5e-4, (0.7, 0.95), 1.0).step(actor, grads)
    targets = published.critic_targets(critic, z, reward, online)
    adam = published.Adam(5e-4, (0.7, 0.95), 100.0)
    critic, losses = published.train_critics(critic, adam, z[:-1], targets)
    results["critic losses"] = {"mean": torch.stack(losses).mean()}
    results["critics"] = critic
    return results


def differing(a: Results, b: Results, tolerance: float = 1e-12) -> list[str]:
    """Stages with a tensor that differs by more, relative to its largest entry and 1e-3."""
    assert a.keys() == b.keys()
    found = []
    for stage in a:
        assert a[stage].keys() == b[stage].keys()
        far = [
            key
            for key, x in a[stage].items()
            if (x - b[stage][key]).abs().max() > tolerance * max(1e-3, b[stage][key].abs().max())
        ]
        found += [stage] if far else []
    return found


def compare(*overrides: str, alg: str = "pwm", random: bool = True, **how: Any) -> list[str]:
    """Stages at which ``alg`` departs from the published formulas, in float64."""
    config = preset(*overrides, alg=alg)
    agent, data = make(config, F64, random), Data(config)
    return differing(b=theirs(agent, data, F64, **how), a=ours(agent, data, F64))


# Equal to rounding


@pytest.mark.parametrize("horizon", [1, 2, 5, 16])
@pytest.mark.parametrize("random", [True, False])
def test_equals_the_published_formulas(horizon: int, random: bool) -> None:
    """Losses, clipped gradients, two world-model updates, the first of the actor and critics."""
    assert compare(f"alg.horizon={horizon}", random=random) == []


@pytest.mark.parametrize(
    "sizes",
    [
        "alg.model_learning.batch_size=1",
        "alg.actor.batch_size=1",
        "alg.actor.batch_size=7",
        "alg.actor.units=[9]",
        "alg.world_model.latent_dim=24",
    ],
)
def test_other_sizes(sizes: str) -> None:
    assert compare("alg.horizon=3", sizes) == []


def test_normalised_observations() -> None:
    """Not in the published configuration, but in its code: clipped to 5."""
    assert compare("alg.normalize_obs=true", "alg.horizon=4", observations=True) == []


def test_offline_targets_are_those_of_lambda_0() -> None:
    """Without an environment the published code ends the episode at every step."""
    assert compare("alg.critic.lam=0", "alg.horizon=4", online=False) == []
    assert compare("alg.horizon=4", online=False) == ["critic losses", "critics"]


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_float32(backend: str) -> None:
    """Of every backend: at most twice the error of the formulas in float32."""
    if backend == "native" and why_missing() is not None:
        pytest.skip(f"no native kernels: {why_missing()}")
    config = preset("alg.horizon=5")
    data = Data(config)
    truth = theirs(make(config, F64), data, F64)
    plain = theirs(make(config, torch.float32), data, torch.float32)
    with select.backend(backend):
        found = ours(make(config, torch.float32), data, torch.float32)
    for stage, tensors in truth.items():
        # Adam divides by a gradient's size: where that is all rounding, so is a step's direction.
        steps = stage in ("actor", "critics") or stage.startswith("world model after")
        floor = 1e-4 if steps else 1e-6
        error, allowed = (distance(x[stage], tensors) for x in (found, plain))
        assert error <= 2.0 * allowed + floor, f"{stage}: {error:.3e}, {allowed:.3e}"


def distance(tensors: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest error, relative to each tensor's largest entry."""
    errors = [(tensors[k].double() - x).abs().max() / x.abs().max() for k, x in truth.items()]
    return torch.stack(errors).max().item()


def test_recorded_updates_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs, emulated: three calls are recorded and replayed after two plain ones."""
    # Where there are CUDA graphs, critics go through autograd.
    monkeypatch.setattr("pwm_fast.ops.extend.regression", lambda layers, x: None)
    monkeypatch.setattr("pwm_fast.agent.pwm.weighted_gradients", lambda *_, **__: None)
    config = preset("alg.horizon=3")

    def learn(agent: PWM) -> list[Tensor]:
        found = []
        for i in range(5):
            torch.manual_seed(i)
            data = Data(config)
            found += agent.update_world_model(data.windows[i % 2]).values()
            found += agent.update_policy(data.obs).values()
        return found

    captured = make_captured(lambda **kw: make(config, torch.float32, **kw))
    plain = make(config, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(learn(captured), learn(plain), strict=True))
    assert all(u.replayed == 3 for u in captured._updates.values())


# Each departure matters


@pytest.mark.parametrize("key", DEPARTURES)
def test_each_key_put_back_makes_a_difference(key: str) -> None:
    """The first stage at which it shows, and nothing before it."""
    value, first = DEPARTURES[key]
    how: dict[str, Any] = {}
    overrides = ["alg.horizon=4", f"{key}={value}"]
    if key == "alg.obs_clip":
        overrides.append("alg.normalize_obs=true")
        how["observations"] = True
    found = compare(*overrides, **how)
    assert found[0] == first
    assert len(found) > 1


def test_our_defaults_are_not_the_published_ones() -> None:
    """All at once: the comparison fails where it should."""
    for key in (*DEPARTURES, "alg.actor.init"):
        a, b = (at(config, key) for config in (preset(), AlgConfig()))
        assert a != b or key == "alg.critic.lam", key
    overrides = [f"{key}={value}" for key, (value, _) in DEPARTURES.items()]
    found = compare("alg.horizon=4", *overrides)
    assert found[0] == "world-model loss" and found[-1] == "critics"


def at(config: AlgConfig, key: str) -> Any:
    value: Any = config
    for name in key.split(".")[1:]:
        value = getattr(value, name)
    return value


def test_reward_coef_of_a_sixteenth_is_the_mean_over_16_steps() -> None:
    """The same total without the key; only the reported part differs."""
    overrides = ("alg.model_learning.mean_reward_loss=false", "alg.horizon=16")
    found = compare(*overrides, "alg.model_learning.reward_coef=0.0625")
    assert found == ["world-model loss"]
    assert "world-model gradient" in compare(*overrides)


# Initial weights


def test_the_actor_starts_as_torch_does() -> None:
    """To the bit; ours are orthogonal, with biases of 0 and first weights 1.7 times as large."""
    units = [400, 200, 100]
    torch.manual_seed(0)
    actor = GaussianActor(512, 8, units, init="torch")
    torch.manual_seed(0)
    expected = [nn.Linear(k, n) for k, n in itertools.pairwise([512, *units, 8])]
    linears = [m for m in actor.mu_net if isinstance(m, nn.Linear)]
    for m, e in zip(linears, expected, strict=True):
        assert torch.equal(m.weight, e.weight) and torch.equal(m.bias, e.bias)
        assert m.bias.abs().max() > 0
    own = [m for m in GaussianActor(512, 8, units).mu_net if isinstance(m, nn.Linear)]
    for m in own:
        assert torch.allclose(m.weight @ m.weight.T, torch.eye(len(m.weight)), atol=1e-5)
        assert m.bias.eq(0).all()
    assert (own[0].weight.std() / linears[0].weight.std()).item() == pytest.approx(3**0.5, rel=0.01)


def test_the_preset_s_actor_is_that_one() -> None:
    """Through the configuration; the critics stay orthogonal, of gain sqrt(2)."""
    for init in ("torch", "orthogonal"):
        torch.manual_seed(0)
        agent = PWM(OBS, ACTION, preset(f"alg.actor.init={init}"))
        bias, weight = agent.actor.mu_net[0].bias, agent.actor.mu_net[0].weight
        assert bool(bias.any()) == (init == "torch")
        assert (weight.abs().max() <= 16**-0.5) == (init == "torch")
        assert torch.allclose(agent.critic.params[0].norm(dim=-1), torch.tensor(2.0**0.5))
    assert preset().actor.init == "torch"


def test_input_gain_of_torch_s_weights() -> None:
    nets = []
    for gain in (1.0, 4.0):
        torch.manual_seed(0)
        nets.append(GaussianActor(16, 2, [12, 10], input_gain=gain, init="torch").mu_net)
    assert torch.equal(nets[1][0].weight, 4.0 * nets[0][0].weight)
    for name in ("0.bias", "3.weight", "3.bias", "6.weight"):
        assert torch.equal(nets[0].get_parameter(name), nets[1].get_parameter(name))


def test_unknown_init() -> None:
    with pytest.raises(ValueError, match="init must be one of orthogonal, torch, got 'zeros'"):
        GaussianActor(16, 2, init="zeros")


# Configurations


def test_the_flow_preset_differs_in_its_dynamics_alone() -> None:
    base, flow = (to_dict(compose(f"alg={name}"))["alg"] for name in ("pwm", "pwm_flow"))
    different = {k for k in base if base[k] != flow[k]}
    assert different == {"name", "world_model", "model_learning"}
    different = {k for k, v in base["world_model"].items() if flow["world_model"][k] != v}
    assert different == {"kind", "units", "integrator", "substeps"}
    different = {k for k, v in base["model_learning"].items() if flow["model_learning"][k] != v}
    assert different == {"flow_share"}


# A run of ``alg=pwm`` from before it was the published one: its saved configuration has no key that
# is new since, and other betas.
BEFORE: dict[str, Any] = {
    "alg.obs_clip": 10.0,
    "alg.centre_rewards": False,
    "alg.reward_clip": None,
    "alg.value_delay": 0,
    "alg.model_learning.mean_reward_loss": False,
    "alg.actor.init": "orthogonal",
    "alg.critic.shuffle": True,
}
BETAS_BEFORE = ("alg.model_learning.betas", [0.7, 0.95])


def saved_before() -> dict[str, Any]:
    saved = to_dict(compose("alg=pwm"))
    for key in BEFORE:
        *path, last = key.split(".")
        inner = saved
        for name in path:
            inner = inner[name]
        del inner[last]
    saved["alg"]["model_learning"]["betas"] = BETAS_BEFORE[1]
    return saved


def test_a_run_of_before_keeps_its_own_values() -> None:
    """What it has no key for is what was computed then."""
    alg = from_dict(saved_before()).alg
    for key, value in (*BEFORE.items(), BETAS_BEFORE):
        assert at(alg, key) == value, key


def test_the_same_command_does_not_go_on_with_a_run_of_before() -> None:
    """It names every key; given as they were, the run goes on."""
    keys = {**BEFORE, BETAS_BEFORE[0]: BETAS_BEFORE[1]}
    with pytest.raises(ConfigError, match="another configuration") as caught:
        refuse_other_config(saved_before(), compose("alg=pwm"), Path("latest.pt"))
    assert re.findall(r"([\w.]+) was ", str(caught.value)) == sorted(keys)
    as_it_was = dict(re.findall(r"(alg\.[\w.]+)=([^\s']+)", PAGE.split("run_dir=OLD")[1]))
    assert set(as_it_was) == set(keys)
    command = [f"{key}={value}" for key, value in as_it_was.items()]
    refuse_other_config(saved_before(), compose("alg=pwm", *command), Path("latest.pt"))


@pytest.mark.parametrize("key", (*DEPARTURES, "alg.actor.init"))
def test_the_page_has_a_row_for_each(key: str) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert sum(f"`{key.removeprefix('alg.')}`" in row.split("|")[2] for row in rows) == 1


@pytest.mark.parametrize("alg", ["pwm_5M", "pwm_48M_flow", "pwm_tiny_flow"])
def test_runs_of_other_configurations_go_on(alg: str) -> None:
    saved = to_dict(compose(f"alg={alg}"))
    for key in ("obs_clip", "centre_rewards", "reward_clip", "value_delay"):
        del saved["alg"][key]
    refuse_other_config(saved, compose(f"alg={alg}"), Path("latest.pt"))
