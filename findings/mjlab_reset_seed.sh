#!/usr/bin/env bash
# mjlab: env.reset(seed=...) seeds the generators of the whole process, so an agent repeats its own noise.
#
# Expected: a seed given to an environment, as a seed for Gymnasium's reset, decides what this environment
# draws. An evaluation with a fixed seed has the same episodes each time and changes nothing else.
# Seen with mjlab 1.6.0 (torch 2.13.0, NumPy 2.2.6, Warp's CPU device): a reset with a seed calls
# random.seed, numpy.random.seed and torch.manual_seed, and so does making an environment whose cfg.seed
# is set. No environment has a generator of its own. So after each evaluation that resets an environment
# of its own with the same seed
#   - the agent draws the same exploration noise, replay indices and dropout masks as after the last one;
#   - the training environment, another object, draws the same starts.
# What is learned between two evaluations repeats the draws of the interval before, and no number shows
# it: returns and losses look like any others. A random seed for each evaluation does not repeat, but it
# makes the run depend on when it evaluates. A reset without a seed leaves the generators alone.
# The documentation of cfg.seed says "random seed for reproducibility", and that of reset nothing.
#
# What it means for pwm_fast: its adapter gives such an environment generators of its own during each call
# (pwm_fast/envs/torch_adapter.py; docs/torch_environments.md, "random numbers").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mjlab==1.6.0 mujoco==3.11.0 \
    mujoco-warp==3.11.0 warp-lang==1.19.0 torch==2.13.0 numpy==2.2.6
export WARP_CACHE_PATH="$folder/warp" CUDA_VISIBLE_DEVICES="" MUJOCO_GL=disable
cat > "$folder/seeds.py" <<'PYTHON'
import contextlib
import io
import random
from importlib.metadata import version

import mjlab.tasks  # registers them
import numpy as np
import torch
from mjlab.envs import ManagerBasedRlEnv
from mjlab.tasks.registry import load_env_cfg


def make(seed):
    cfg = load_env_cfg("Mjlab-Cartpole-Balance")
    cfg.scene.num_envs, cfg.seed = 4, seed
    with contextlib.redirect_stdout(io.StringIO()):  # its tables
        return ManagerBasedRlEnv(cfg, device="cpu")


def start(env, seed=None):
    with contextlib.redirect_stdout(io.StringIO()):
        observations, _ = env.reset(seed=seed)
    return observations["actor"].clone()


def draws(training):
    """What an agent and its training environment draw next."""
    return {
        "random": random.random(),
        "NumPy's": np.random.rand(),
        "torch's": torch.randn(3).tolist(),
        "start of the training environment": start(training)[:, 0].tolist(),
    }


print("mjlab", version("mjlab"), "torch", torch.__version__.split("+")[0])
training, evaluation = make(seed=1), make(seed=2)
for words, seed in (("with seed=7", 7), ("without a seed", None)):
    seen = []
    for _ in range(2):
        start(evaluation, seed)
        seen.append(draws(training))
        start(training)  # some of training, which draws again
        torch.randn(1000), np.random.rand(1000), [random.random() for _ in range(1000)]
    same = {kind: seen[0][kind] == seen[1][kind] for kind in seen[0]}
    print(f"twice after an evaluation {words}: {same}")
    assert set(same.values()) == {seed is not None}, "the behaviour has changed"
made = []
for _ in range(2):
    make(seed=7)
    made.append(draws(training))
print(f"twice after making an environment with cfg.seed=7: equal {made[0] == made[1]}")
assert made[0] == made[1], "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seeds.py"
echo "as described"
