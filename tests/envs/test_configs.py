"""The Hydra configurations hold exactly what ``make`` takes."""

from pathlib import Path

import pytest

from pwm_fast.config import OFFLINE
from pwm_fast.envs import ADAPTERS, TASKS, make

omegaconf = pytest.importorskip("omegaconf", reason="needs pip install 'pwm-fast[train]'")

FOLDER = Path(__file__).parents[2] / "configs" / "env"


def load(name):
    return omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(FOLDER / f"{name}.yaml"))


def test_every_environment_has_a_configuration():
    """But that of pretraining, in which nobody acts."""
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*TASKS, *ADAPTERS} - {OFFLINE}


@pytest.mark.parametrize(
    ("name", "num_envs", "options"),
    [
        ("ant", 128, {"engine", "variant"}),
        ("anymal", 64, {"engine", "variant"}),
        ("cartpole", 64, {"engine", "start", "variant"}),
        ("hopper", 64, {"engine", "variant"}),
        ("humanoid", 64, {"engine", "variant"}),
        ("gym", 16, {"id", "kwargs"}),
        ("dmc", 8, {"domain", "task", "action_repeat"}),
        ("dmc_tasks", 12, {"tasks", "numbers", "obs_dim", "action_dim", "action_repeat"}),
        (
            "torch",
            1024,
            {"factory", "kwargs", "obs_group", "action_bound", "final_obs"},
        ),
    ],
)
def test_keys(name, num_envs, options):
    config = load(name)
    assert config["name"] == name
    assert config["num_envs"] == num_envs
    assert config["max_episode_steps"] is None
    assert config["threads"] == 1
    assert config.get("engine", "auto") == "auto"
    assert config.get("variant", "default") == "default"
    assert set(config) == {"name", "num_envs", "max_episode_steps", "threads"} | options


@pytest.mark.parametrize("name", sorted(TASKS))
def test_make_takes_them(name):
    pytest.importorskip("mujoco.batch", reason="needs pip install 'pwm-fast[train]'")
    config = load(name)
    env = make(**config, seed=1)
    assert env.num_envs == config["num_envs"]
