"""Configuration: the YAML files compose and are valid; a wrong value is named."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest

from pwm_fast import config as configuration
from pwm_fast.config import ConfigError, EnvConfig, TrainConfig, from_dict, from_saved, to_dict
from tests.models.builders import CONFIGS, compose, compose_raw

ALGS = sorted(p.stem for p in (CONFIGS / "alg").glob("*.yaml"))
ENVS = sorted(p.stem for p in (CONFIGS / "env").glob("*.yaml"))
ENV: dict[str, Any] = {"name": "cartpole"}


def nested(key: str, value: object) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for ``a.b``, beside the environment that is always needed."""
    result: dict[str, Any] = {"env": dict(ENV)}
    *path, last = key.split(".")
    inner = result
    for part in path:
        inner = inner.setdefault(part, {})
    inner[last] = value
    return result


# The files


def test_the_files_are_found() -> None:
    assert {"pwm", "pwm_flow", "pwm_5M", "pwm_5M_flow", "pwm_48M_flow"} <= set(ALGS)
    assert {"ant", "anymal", "cartpole", "hopper", "humanoid", "gym", "dmc"} <= set(ENVS)


@pytest.mark.parametrize("alg", ALGS)
def test_every_alg_composes(alg: str) -> None:
    """Valid, named as its file, its kind in the name, and unchanged by a round trip."""
    config = compose(f"alg={alg}")
    assert config.alg.name == alg
    assert (config.alg.world_model.kind == "flow") == alg.endswith("flow")
    assert config.alg.world_model.head == "linear"
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("env", ENVS)
def test_every_env_composes(env: str) -> None:
    """Valid, named as its file; what the schema does not know went to its options."""
    config = compose(f"env={env}")
    assert config.env.name == env
    known = {f.name for f in dataclasses.fields(configuration.EnvConfig)}
    raw = set(compose_raw(f"env={env}").env)
    assert set(config.env.options) == raw - known
    assert from_dict(to_dict(config)) == config


def test_defaults_and_overrides() -> None:
    """``env=ant alg=pwm_5M_flow seed=42``, single keys, null, and what interpolates them."""
    config = compose(
        "env=ant",
        "alg=pwm_5M_flow",
        "seed=42",
        "alg.world_model.units=[100,200]",
        "alg.actor.lr=0.001",
        "resume=null",
        "num_envs=7",
    )
    assert config.env.name == "ant" and config.env.num_envs == 128 and config.env_count == 7
    assert config.alg.world_model.units == [100, 200]
    assert config.alg.actor.lr == 0.001
    assert config.seed == 42 and config.resume is None
    assert config.run_dir == "runs/ant/pwm_5M_flow/seed_42"
    assert compose("env=ant").env_count == 128


@pytest.mark.parametrize("name", ["pwm", "pwm_flow"])
def test_published_single_task_values(name: str) -> None:
    """PWM's own: every value that its description and its code give (docs/published.md)."""
    alg = compose("env=ant", f"alg={name}").alg
    assert (alg.horizon, alg.imagined_steps, alg.steps_per_epoch) == (16, 16, 16)
    assert (alg.gamma, alg.final_lr, alg.replay_capacity) == (0.99, 1e-5, 1_000_000)
    assert (alg.normalize_obs, alg.obs_clip) == (False, 5.0)
    assert (alg.normalize_rewards, alg.centre_rewards, alg.reward_clip) == (True, True, 5.0)
    assert (alg.normalize_returns, alg.value_scale, alg.value_delay) == (True, 1.0, 1)
    networks = alg.world_model
    assert (networks.latent_dim, networks.num_bins, networks.task_dim) == (512, 1, 0)
    assert (networks.encoder_units, networks.reward_units) == ([256], [512, 512])
    assert networks.units == ([510, 510] if name == "pwm_flow" else [512, 512])
    model, actor, critic = alg.model_learning, alg.actor, alg.critic
    assert (model.dynamics_coef, model.reward_coef, model.mean_reward_loss) == (1.0, 1.0, True)
    assert (model.updates, model.batch_size, model.lr, model.grad_norm) == (8, 256, 3e-4, 20.0)
    assert (model.bootstrap_updates, model.encoder_lr_scale) == (None, 1.0)
    assert model.betas == [0.9, 0.999] and actor.betas == critic.betas == [0.7, 0.95]
    assert (actor.units, actor.lr, actor.grad_norm) == ([400, 200, 100], 5e-4, 1.0)
    assert (actor.init_logstd, actor.min_logstd, actor.detach) == (-1.0, -1.427, True)
    assert (actor.init, actor.input_gain, actor.batch_size, actor.updates) == ("torch", 1.0, 128, 1)
    assert (critic.units, critic.members, critic.lam) == ([400, 200], 3, 0.95)
    assert (critic.passes, critic.minibatches, critic.shuffle) == (8, 4, False)
    assert (critic.lr, critic.grad_norm, critic.input_gain) == (5e-4, 100.0, 1.0)


@pytest.mark.parametrize("name", sorted(set(ALGS) - {"pwm", "pwm_flow"}))
def test_the_other_configurations_keep_our_own_values(name: str) -> None:
    """What ``alg=pwm`` takes from the published code alone (docs/published.md)."""
    alg = compose(f"alg={name}").alg
    assert (alg.obs_clip, alg.centre_rewards, alg.reward_clip, alg.value_delay) == (
        10.0,
        False,
        None,
        0,
    )
    assert (alg.actor.init, alg.critic.shuffle) == ("orthogonal", True)
    assert not alg.model_learning.mean_reward_loss
    small = name.startswith(("pwm_tiny", "pwm_small"))
    assert alg.model_learning.betas == ([0.9, 0.99] if small else [0.7, 0.95])


def test_every_field_is_documented() -> None:
    """Each key has its line under Attributes of its class."""
    for cls in vars(configuration).values():
        if dataclasses.is_dataclass(cls) and isinstance(cls, type):
            text = inspect.cleandoc(cls.__doc__ or "")  # Python 3.13 has done so already
            for f in dataclasses.fields(cls):
                assert f"\n    {f.name}: " in text, f"{cls.__name__}.{f.name}"


# Round trip


def test_round_trip_keeps_every_value() -> None:
    """Each field of the schema, set to something else than its default."""
    start = from_dict({"env": ENV})
    changed = from_dict(
        {
            "env": {"name": "gym", "num_envs": 3, "id": "X-v1", "kwargs": {"a": [1, 2.5]}},
            "alg": {
                "name": "x",
                "world_model": {"kind": "mlp", "units": [3], "vmin": -1.0, "project": True},
                "model_learning": {"bootstrap_updates": 0, "betas": [0.1, 0.2]},
                "actor": {"detach": False, "lr": 1e-8},
                "critic": {"lam": 0.0, "members": 1},
                "gamma": 1.0,
            },
            "seed": 5,
            "threads": 2,
            "resume": None,
            "wandb": {"mode": "offline", "entity": "me"},
        }
    )
    assert changed != start
    assert changed.env.options == {"id": "X-v1", "kwargs": {"a": [1, 2.5]}}
    assert from_dict(to_dict(changed)) == changed
    assert type(to_dict(changed)["alg"]["world_model"]["units"]) is list
    assert isinstance(changed, TrainConfig)


def test_options_beside_and_inside() -> None:
    """The YAML files have them beside the environment's keys, a checkpoint under ``options``."""
    config = from_dict({"env": {"name": "cartpole", "start": "upright", "options": {"other": 1}}})
    assert config.env.options == {"variant": "default", "start": "upright", "other": 1}


@pytest.mark.parametrize("name", ["ant", "cartpole", "hopper"])
def test_a_saved_configuration_without_a_variant_is_dflexs(name: str) -> None:
    """Of a run from before there were variants; every newer one names it, whoever made it."""
    older: dict[str, Any] = {"env": {"name": name, "options": {"start": "upright"}}}
    assert configuration.lacks_variant(older)
    assert from_saved(older).env.options == {"variant": "dflex", "start": "upright"}
    assert older["env"]["options"] == {"start": "upright"}, "its argument is left alone"
    assert from_saved({"env": {"name": name}}).env.options == {"variant": "dflex"}
    for made in (from_dict(older), TrainConfig(env=EnvConfig(name))):
        assert made.env.options["variant"] == "default"
        assert from_saved(to_dict(made)) == made
    beside = {"env": {"name": name, "variant": "default"}}
    assert from_saved(beside).env.options == {"variant": "default"}


@pytest.mark.parametrize(
    "env",
    [
        {"name": "gym", "id": "Ant-v5"},
        {"name": "anymal"},
        {"name": ["ant"]},
        {"name": "ant", "options": 5},
        {},
        None,
        5,
    ],
)
def test_other_saved_environments_get_no_variant(env: Any) -> None:
    assert not configuration.lacks_variant({"env": env})
    assert configuration.with_variant({"env": env}) == {"env": env}


def test_from_dict_leaves_its_argument_alone() -> None:
    values = {"env": {"name": "cartpole", "start": "upright"}, "alg": {"gamma": 0.9}}
    from_dict(values)
    assert values == {"env": {"name": "cartpole", "start": "upright"}, "alg": {"gamma": 0.9}}


# Errors


@pytest.mark.parametrize(
    "key",
    [
        "epoch",
        "alg.horizons",
        "alg.world_model.unit",
        "alg.actor.learning_rate",
        "wandb.modes",
        "eval.episode",
    ],
)
def test_unknown_keys(key: str) -> None:
    """Named in full."""
    with pytest.raises(ConfigError, match=f"^{key}: "):
        from_dict(nested(key, 1))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", "many"),
        ("epochs", 1.5),
        ("seed", True),
        ("device", None),
        ("env", "cartpole"),
        ("env.num_envs", "a few"),
        ("env.options", 5),
        ("alg", 3),
        ("alg", [1]),
        ("alg.world_model", None),
        ("alg.world_model.latent_dim", "wide"),
        ("alg.world_model.units", 5),
        ("alg.actor.detach", "maybe"),
        ("alg.critic.shuffle", "maybe"),
        ("alg.model_learning.mean_reward_loss", 2.5),
        ("alg.obs_clip", "wide"),
        ("alg.value_delay", 0.5),
        ("alg.actor.lr", "fast"),
        ("alg.critic.betas", 0.9),
        ("alg.model_learning.batch_size", 2.5),
        ("eval", 3),
    ],
)
def test_wrong_types(key: str, value: object) -> None:
    values = {"env": value} if key == "env" else nested(key, value)
    with pytest.raises(ConfigError, match=rf"^{key}\b"):
        from_dict(values)


NAN, INF = math.nan, math.inf
OUT_OF_RANGE = {
    "epochs": [-1],
    "seed": [-1, -(2**40), 2**63],
    "device": ["gpu", "cuda:", "cuda:x", "CPU"],
    "precision": ["fp16", "Fast"],
    "graphs": ["on", "1"],
    "num_envs": [0, -1],
    "threads": [0, 1025, 100_000],
    "run_dir": [""],
    "env.num_envs": [0],
    "env.threads": [0, 1025],
    "env.max_episode_steps": [0],
    "eval.every": [-1],
    "eval.episodes": [0],
    "eval.final_episodes": [0],
    "checkpoint.every": [-1],
    "esnr.every": [-1],
    "esnr.samples": [1, 129],
    "wandb.mode": ["on"],
    "alg.horizon": [0],
    "alg.gamma": [0.0, 1.01, NAN],
    "alg.steps_per_epoch": [0],
    "alg.random_epochs": [0],
    "alg.replay_capacity": [0],
    "alg.value_scale": [0.0, INF, NAN],
    "alg.value_delay": [-1],
    "alg.obs_clip": [0.0, -5.0, NAN],
    "alg.reward_clip": [0.0, -5.0, NAN],
    "alg.final_lr": [-1e-9, INF, NAN],
    "alg.max_skipped_updates": [0],
    "alg.normalize_rewards": [True],
    "alg.world_model.kind": ["rnn"],
    "alg.world_model.encoder": ["linear", "Identity"],
    "alg.world_model.head": ["softmax"],
    "alg.world_model.integrator": ["rk4"],
    "alg.world_model.substeps": [0],
    "alg.world_model.latent_dim": [0, -8, 12],
    "alg.world_model.num_bins": [0],
    "alg.world_model.num_tasks": [0, 2],
    "alg.world_model.task_dim": [-1],
    "alg.world_model.vmin": [10.0, 11.0, -INF, NAN],
    "alg.world_model.vmax": [INF, NAN],
    "alg.world_model.units": [[0], [512, -1]],
    "alg.world_model.encoder_units": [[0]],
    "alg.world_model.reward_units": [[0]],
    "alg.model_learning.tau_sampling": ["normal"],
    "alg.model_learning.flow_start": ["random"],
    "alg.model_learning.flow_share": [-0.1, 1.1, 0.5, NAN, True, "some"],
    "alg.model_learning.batch_size": [0],
    "alg.model_learning.updates": [-1],
    "alg.model_learning.bootstrap_updates": [-1],
    "alg.model_learning.dynamics_coef": [-1.0, NAN, INF],
    "alg.model_learning.reward_coef": [-1.0],
    "alg.model_learning.start_noise": [-0.1, NAN, INF, "some", True],
    "alg.model_learning.start_grad": ["latent"],
    "alg.model_learning.integrator": ["rk4"],
    "alg.model_learning.substeps": [0],
    "alg.model_learning.consistency": ["none"],
    "alg.model_learning.consistency_share": [-0.1, 1.1],
    "alg.model_learning.rollout_steps": [0, 3, 32],
    "alg.model_learning.termination_coef": [-1.0],
    "alg.actor.units": [[0]],
    "alg.actor.batch_size": [0],
    "alg.actor.updates": [-1],
    "alg.actor.entropy_coef": [-0.1, NAN, INF],
    "alg.actor.init": ["zeros", "Torch"],
    "alg.actor.init_logstd": [NAN, INF],
    "alg.actor.min_logstd": [NAN],
    "alg.critic.units": [[-3]],
    "alg.critic.members": [0],
    "alg.critic.minibatches": [0],
    "alg.critic.passes": [-1],
    "alg.critic.lam": [-0.1, 1.1, NAN],
    **{
        f"alg.{part}.{name}": values
        for part in ("model_learning", "actor", "critic")
        for name, values in {
            "lr": [0.0, -1.0, NAN, INF],
            "grad_norm": [0.0, NAN],
            "betas": [[0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 0.9, 0.9]],
        }.items()
    },
}


HUGE = 10**21
TOO_LARGE: dict[str, list[object]] = {
    **{
        f"alg.{part}.{name}": [value]
        for name, value in {"units": [2**63], "input_gain": 1e39, "lr": 1e300}.items()
        for part in ("actor", "critic")
    },
    **{
        f"alg.world_model.{name}": [[2**20 + 1], [64, 2**63], [64, HUGE]]
        for name in ("units", "encoder_units", "reward_units")
    },
    **{
        f"alg.{name}": [2**31, HUGE]
        for name in (
            "horizon",
            "imagination_horizon",
            "steps_per_epoch",
            "random_epochs",
            "random_hold",
            "value_delay",
            "model_learning.updates",
            "model_learning.bootstrap_updates",
            "actor.updates",
            "critic.passes",
        )
    },
    **{
        name: [2**63, HUGE]
        for name in (
            "epochs",
            "num_envs",
            "env.num_envs",
            "eval.every",
            "eval.episodes",
            "eval.final_episodes",
            "esnr.every",
            "esnr.samples",
            "checkpoint.every",
            "alg.replay_capacity",
            "alg.max_skipped_updates",
            "alg.actor.batch_size",
            "alg.model_learning.batch_size",
        )
    },
    **{
        f"alg.{name}": [1e300, 4e38]
        for name in (
            "value_scale",
            "final_lr",
            "obs_clip",
            "reward_clip",
            "actor.init_logstd",
            "actor.min_logstd",
            "actor.grad_norm",
            "model_learning.start_noise",
            "model_learning.dynamics_coef",
            "model_learning.reward_coef",
            "model_learning.termination_coef",
            "model_learning.encoder_lr_scale",
            "world_model.vmax",
        )
    },
    "alg.world_model.vmin": [-1e300],
    "alg.actor.init_logstd": [-1e300, 89.0],
    "alg.actor.min_logstd": [-1e300, 1e10],
    "alg.world_model.latent_dim": [2**20 + 8, 8 * HUGE],
    "alg.world_model.task_dim": [2**20 + 1, 10**23],
    "alg.world_model.num_bins": [10**7, 2**63],
    "alg.world_model.substeps": [10**12],
    "alg.critic.members": [1025, 100_000],
    "alg.critic.minibatches": [10**8],
    "env.max_episode_steps": [2**31 - 1, 2**31, HUGE],
    "env.threads": [HUGE],
    "threads": [HUGE],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in TOO_LARGE.items() for value in values]
)
def test_too_large(key: str, value: object) -> None:
    """Named before it overflows, or runs for days without a word."""
    with pytest.raises(ConfigError, match=rf"^{key} must be .*, got ") as caught:
        from_dict(nested(key, value))
    assert str(caught.value).endswith(repr(value))


def test_every_number_has_a_bound() -> None:
    """Also those of keys to come: no whole number is without one, no float beyond float32."""
    open_ended = []
    for cls in vars(configuration).values():
        if dataclasses.is_dataclass(cls) and isinstance(cls, type) and cls is not TrainConfig:
            for f in dataclasses.fields(cls):
                value: object = {"int": HUGE, "float": 1e300}.get(str(f.type).split(" |")[0])
                own = {"name": "x"} if cls is configuration.EnvConfig else {}
                try:
                    cls(**own, **({} if value is None else {f.name: value}))
                except ConfigError:
                    continue
                open_ended += [] if value is None else [f"{cls.__name__}.{f.name}"]
    assert not open_ended


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_a_number_that_no_float_holds(value: int) -> None:
    with pytest.raises(ConfigError, match="too large"):
        from_dict(nested("alg.actor.lr", value))


@pytest.mark.parametrize("value", [[[64]], [{"a": 1}], [64, [64]]])
@pytest.mark.parametrize("part", ["actor", "critic", "world_model"])
def test_widths_that_are_none(part: str, value: list) -> None:
    key = f"alg.{part}.units"
    with pytest.raises(ConfigError, match=rf"^{key} must be a list of positive widths, got ") as e:
        from_dict(nested(key, value))
    assert str(e.value).endswith(repr(value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alg.critic.grad_norm", INF),
        ("alg.obs_clip", INF),
        ("alg.reward_clip", INF),
        ("alg.actor.min_logstd", -1e30),
        ("eval.every", 10**12),
        ("alg.world_model.units", [2**20]),
        ("alg.critic.members", 1024),
        ("env.max_episode_steps", 10**7),
    ],
)
def test_what_stays_possible(key: str, value: object) -> None:
    config: object = from_dict(nested(key, value))
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value


@pytest.mark.parametrize(
    "key",
    [
        "world_model.units",
        "world_model.encoder_units",
        "world_model.reward_units",
        "actor.units",
        "critic.units",
    ],
)
def test_networks_without_hidden_layers_are_not_trained(key: str) -> None:
    config = from_dict(nested(f"alg.{key}", []))
    with pytest.raises(ConfigError, match=rf"^alg\.{key} must be .* at least one .*, got \[\]$"):
        configuration.check_trainable(config)
    configuration.check_trainable(config, begins=False)
    configuration.check_trainable(from_dict(nested(f"alg.{key}", [8])))


def test_bounds_of_a_state_s_deviation_are_in_order() -> None:
    given = {"kind": "tdmpc2", "min_logstd": 1.0, "max_logstd": 0.5}
    with pytest.raises(ConfigError, match=r"alg.actor.min_logstd must be at most .*max_logstd=0.5"):
        from_dict({"env": {"name": "cartpole"}, "alg": {"actor": given}})
    from_dict({"env": {"name": "cartpole"}, "alg": {"actor": {**given, "kind": "pwm"}}})


def test_q_functions_are_not_trained() -> None:
    config = from_dict(nested("alg.critic.kind", "tdmpc2"))
    for begins in (True, False):
        with pytest.raises(ConfigError, match=r"^alg\.critic\.kind must be pwm to train.*'tdmpc2'"):
            configuration.check_trainable(config, begins=begins)


def test_an_encoder_that_is_none_needs_no_layers() -> None:
    given = nested("alg.world_model.encoder_units", [])
    given["alg"]["world_model"]["encoder"] = "identity"
    configuration.check_trainable(from_dict(given))


@pytest.mark.parametrize(("key", "value"), [("head", "simnorm"), ("project", True)])
def test_observations_lie_on_no_simplices(key: str, value: object) -> None:
    message = rf"^alg\.world_model\.{key} must be .* where encoder is identity, got {value!r}$"
    given = nested(f"alg.world_model.{key}", value)
    given["alg"]["world_model"]["encoder"] = "identity"
    with pytest.raises(ConfigError, match=message):
        from_dict(given)
    from_dict(nested(f"alg.world_model.{key}", value))


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values]
)
def test_out_of_range(key: str, value: object) -> None:
    """The message begins with the key and what it must be, and ends with the value."""
    with pytest.raises(ConfigError, match=rf"^{key} must be .*, got ") as caught:
        from_dict(nested(key, value))
    assert str(caught.value).endswith(repr(value))


def test_environment_is_required() -> None:
    for values in ({}, {"env": None}, {"env": {"num_envs": 3}}):
        with pytest.raises(ConfigError, match=r"^env\.name: "):
            from_dict(values)


def test_checks_that_span_two_sections() -> None:
    """More gradient samples than rollouts, unless ESNR is never measured."""
    values = nested("esnr.samples", 200)
    with pytest.raises(ConfigError, match=r"esnr.samples must be at most .*batch_size \(128\)"):
        from_dict(values)
    values["esnr"]["every"] = 0
    assert from_dict(values).esnr.samples == 200


def test_missing_value_of_a_yaml_file_is_named() -> None:
    cfg = compose_raw()
    cfg.alg.actor.lr = "???"
    with pytest.raises(ConfigError, match=r"^alg\.actor\.lr: "):
        configuration.from_hydra(cfg)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("alg.horizn=3", "horizn"),
        ("epoch=3", "epoch"),
        ("alg=pwm_6M", "pwm_6M"),
        ("env=mars", "mars"),
        ("alg.world_model.latent_dim=wide", "alg.world_model.latent_dim"),
        ("alg.gamma=2", "alg.gamma"),
    ],
)
def test_command_line_errors_name_the_key(override: str, named: str) -> None:
    """By Hydra where it composes, else by the checks."""
    from hydra.errors import HydraException

    with pytest.raises((HydraException, ConfigError)) as caught:
        compose(override)
    assert named in str(caught.value)
