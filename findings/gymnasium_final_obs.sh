#!/usr/bin/env bash
# Gymnasium's vector environments hand out the observation of the reset as an episode's last one, where an
# environment fills and returns one array.
#
# Expected: with AutoresetMode.SAME_STEP, info["final_obs"] is the observation that the episode's last
# step returned, or the vector environment refuses the environment.
# Seen with gymnasium 1.3.0 and 1.4.0: SyncVectorEnv, and the processes of AsyncVectorEnv, with and
# without shared memory, keep a reference to the array that step returned and reset the environment
# before they hand it out. So final_obs is the observation of the reset, where the same environment with
# copies gives the last one. SyncVectorEnv hands out the environment's array itself: the next step
# changes a final_obs that was kept. copy=True, the default, copies the batched observations alone.
#
# Is such an environment valid? In 1.3.0 yes: check_env accepts it, and nothing warns. In 1.4.0 no: the
# documentation of Env.step asks for new objects in each call, check_env refuses it, and the checker
# that gymnasium.make puts around an environment warns in its first two steps. The vector environments
# themselves still take it and say nothing, so that one that is made without gymnasium.make, or with
# disable_env_checker=True, gives the wrong final_obs in silence as before.
#
# What it means for pwm_fast: its Gymnasium adapter copies each observation within the env's step, also
# in the processes of an AsyncVectorEnv (pwm_fast/envs/_guard.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# A file, because AsyncVectorEnv's processes import it where they are not forked.
cat > "$folder/final_obs.py" <<'PYTHON'
import warnings

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv


class Counter(gymnasium.Env):
    """Its observation is the number of steps since the reset; an episode has three."""

    observation_space = gymnasium.spaces.Box(0.0, 3.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, copies):
        self.copies = copies
        self.count = np.zeros(1, np.float32)

    def observation(self):
        return self.count.copy() if self.copies else self.count

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count[:] = 0
        return self.observation(), {}

    def step(self, action):
        self.count += 1
        return self.observation(), 0.0, bool(self.count[0] == 3), False, {}


def copied():
    return Counter(copies=True)


def one_array():
    return Counter(copies=False)


def made():
    """one_array with the checker of gymnasium.make around it."""
    return gymnasium.make(EnvSpec("OneArray-v0", Counter, kwargs={"copies": False}))


def accepted(env):
    try:
        check_env(env, skip_render_check=True)
    except AssertionError as error:
        assert "share an object" in str(error), error
        return False
    return True


def final_obs(kind, make, **options):
    """final_obs when it is handed out, and the same object after the next step."""
    envs = kind([make, make], autoreset_mode=AutoresetMode.SAME_STEP, **options)
    envs.reset(seed=0)
    actions = np.zeros((2, 1), np.float32)
    for _ in range(3):
        _, _, terminated, _, info = envs.step(actions)
    assert terminated.all()
    last = info["final_obs"]
    at_once = [float(x[0]) for x in last]
    envs.step(actions)
    later = [float(x[0]) for x in last]
    envs.close()
    return at_once, later


def main():
    print("gymnasium", gymnasium.__version__)
    kinds = [
        (SyncVectorEnv, {"copy": True}),
        (AsyncVectorEnv, {"copy": True, "shared_memory": True}),
        (AsyncVectorEnv, {"copy": True, "shared_memory": False}),
    ]
    seen = {}
    for make in (copied, one_array):
        valid = accepted(make())
        print(f"{make.__name__}: check_env accepts it {valid}; the last observation is 3")
        results = []
        for kind, options in kinds:
            at_once, later = final_obs(kind, make, **options)
            words = ", ".join(f"{k}={v}" for k, v in options.items())
            print(f"  {kind.__name__}({words}): final_obs {at_once}, after the next step {later}")
            results.append((at_once, later))
        seen[make] = (valid, results)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        through_make = final_obs(SyncVectorEnv, made)
    told = any("share an object" in str(x.message) for x in caught)
    print(f"one_array through gymnasium.make: warned {told}, final_obs {through_make[0]}")

    last, reset, following = [3.0, 3.0], [0.0, 0.0], [1.0, 1.0]
    kept_array = [(reset, following), (reset, reset), (reset, reset)]
    old = gymnasium.__version__ == "1.3.0"
    assert seen[copied] == (True, [(last, last)] * 3), "the behaviour has changed"
    assert seen[one_array] == (old, kept_array), "the behaviour has changed"
    assert told == (not old) and through_make == kept_array[0], "the behaviour has changed"


if __name__ == "__main__":
    main()
PYTHON
for version in 1.3.0 1.4.0; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "gymnasium==$version" numpy==2.2.6
    # Any other warning about the environment would be an error.
    "$folder/venv/bin/python" -W error::UserWarning "$folder/final_obs.py"
done
echo "as described"
