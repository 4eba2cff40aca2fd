"""A robot is three files and its tests: nothing else names it (CONTRIBUTING.md, "How to add")."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pwm_fast

pytest.importorskip("hydra", reason="needs pip install 'pwm-fast[train]'")
pytest.importorskip("mujoco.batch", reason="needs pip install 'pwm-fast[train]'")

FILES = {
    "envs/tasks/pendulum.py": '''
"""A pendulum on a motor: hold it upright."""

import math

import torch

from pwm_fast.envs.tasks.base import Task, uniform


class Pendulum(Task):
    name = "pendulum"
    asset = "pendulum.xml"
    obs_dim = 3
    action_dim = 1
    max_episode_steps = 200

    def observation(self, qpos, qvel, last_action):
        return torch.cat((qpos.sin(), qpos.cos(), qvel), dim=-1)

    def reward(self, obs, action):
        return obs[:, 1] - 0.1 * obs[:, 2].square() - 0.1 * action.square().sum(-1)

    def sample_reset(self, n, generator, dtype, device):
        return tuple(uniform((n, 1), bound, generator, dtype, device) for bound in (math.pi, 0.1))
''',
    "envs/assets/pendulum.xml": """
<mujoco>
  <option timestep="0.004166666666666667"/>
  <worldbody>
    <body>
      <joint name="hinge" axis="0 1 0" damping="0.1"/>
      <geom type="capsule" size="0.05" fromto="0 0 0 0 0 1"/>
    </body>
  </worldbody>
  <actuator><motor joint="hinge" gear="20" ctrllimited="true" ctrlrange="-1 1"/></actuator>
</mujoco>
""",
    "configs/env/pendulum.yaml": """
name: pendulum
num_envs: 4
max_episode_steps: null
threads: 1
engine: auto
""",
}
SMALL = [
    *(
        "alg=pwm_tiny",
        "env.max_episode_steps=12",
        "epochs=2",
        "device=cpu",
        "threads=1",
        "alg.horizon=4",
    ),
    *("alg.horizon=4", "alg.steps_per_epoch=16", "alg.random_epochs=1"),
    *("alg.replay_capacity=400", "alg.model_learning.bootstrap_updates=2"),
    *("alg.model_learning.updates=1", "alg.model_learning.batch_size=8"),
    *("alg.actor.batch_size=8", "alg.actor.updates=1"),
    *("eval.episodes=2", "eval.final_episodes=2", "esnr.every=0"),
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package as it is, file by file, with the robot's files beside them."""
    source, copy = Path(pwm_fast.__file__).parent, tmp_path / "pwm_fast"
    real = ("", "envs", "envs/tasks", "envs/assets", "configs", "configs/env")
    for folder in real:
        (copy / folder).mkdir()
        for entry in (source / folder).iterdir():
            if str(entry.relative_to(source)) not in real:
                (copy / folder / entry.name).symlink_to(entry)
    return copy


def test_a_robot_of_three_files_trains(package: Path, tmp_path: Path) -> None:
    for name, text in FILES.items():
        (package / name).write_text(text)
    outcome = subprocess.run(
        [sys.executable, "-m", "pwm_fast.train", "env=pendulum", "run_dir=run", *SMALL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["epoch"] == 2 and "eval_reward" in rows[-1], rows[-1]
