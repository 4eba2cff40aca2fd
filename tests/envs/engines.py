"""What the tests of envs share."""

from importlib.util import find_spec

import pytest
import torch

HAVE_WARP = find_spec("mujoco_warp") is not None
needs_warp = pytest.mark.skipif(not HAVE_WARP, reason="needs pip install 'pwm-fast[gpu]'")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# mujoco-warp on its CPU device, for what it computes: 20 ms and more a step, so few of them.
ENGINES = ["mujoco", pytest.param("mujoco_warp", marks=needs_warp)]


def random_actions(env, steps, seed=0):
    shape = (steps, env.num_envs, *env.single_action_space.shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def flat(step):
    """All tensors that came out of one step."""
    *tensors, info = step
    return [*tensors, info["final_obs"], *info["episode"].values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def continues_to_the_bit(env, restored, actions, half, tmp_path):
    """A saved state, through a file, goes on as its env did; the steps behind ``half``."""
    for action in actions[:half]:
        env.step(action)
    torch.save(env.get_state(), tmp_path / "state.pt")
    expected = [env.step(action) for action in actions[half:]]
    for action in actions[:3]:
        restored.step(action)
    restored.set_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for action, step in zip(actions[half:], expected, strict=True):
        assert same(restored.step(action), step)
    return expected


def others_are_untouched(step, expected):
    """Of three envs, the first and the last are as they would have been."""
    for a, b in zip(flat(step), flat(expected), strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


def place(env, row, **coordinates):
    """Write entries of one env's state, ``qpos_2=0.1``."""
    for key, value in coordinates.items():
        field, index = key.split("_")
        getattr(env, f"_{field}")[row, int(index)] = value
