"""Gradients through a robot's control steps, against central differences of plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mujoco.batch", reason="needs pip install 'pwm-fast[train]'")

import mujoco

from bench.attainable import coordinates
from bench.differentiable import STEP, Physics, State
from pwm_fast.envs import TASKS, MujocoEnv
from pwm_fast.envs.tasks.base import Task

ENVS = 2


def played(task: Task, steps: int) -> MujocoEnv:
    """Two envs after so many steps of one random action."""
    env = MujocoEnv(task, ENVS)
    action = torch.rand(ENVS, task.action_dim, generator=torch.Generator().manual_seed(0)) - 0.5
    for _ in range(steps):
        env.step(action)
    return env


def actions(task: Task, steps: int) -> Tensor:
    """``[H, N, A]`` in float64, of numbers that float32 holds."""
    drawn = torch.rand(steps, ENVS, task.action_dim, generator=torch.Generator().manual_seed(7))
    return (1.6 * drawn - 0.8).double()


def paid(task: Task, env: MujocoEnv, chosen: Tensor) -> tuple[Tensor, list[int]]:
    """What actions earn, ``[N]`` in float64, by plain steps; contacts in each physics step."""
    model = task.model()
    qpos, qvel = coordinates(env, model)
    total, contacts = torch.zeros(ENVS, dtype=torch.float64), []
    for n in range(ENVS):
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = qpos[n], qvel[n]
        last = torch.zeros(1, task.action_dim, dtype=torch.float64)
        for action in (*chosen[:, n], None):
            state = [torch.tensor(x, dtype=torch.float64)[None] for x in (data.qpos, data.qvel)]
            obs = task.observation(*state, last)
            last = torch.zeros_like(last) if action is None else action[None]
            total[n] += task.reward(obs, last)[0]
            if action is not None:
                data.ctrl[:] = action
                for _ in range(task.substeps):
                    mujoco.mj_step(model, data)
                    contacts.append(data.ncon)
    return total, contacts


def through(task: Task, env: MujocoEnv, chosen: Tensor, step: float) -> Tensor:
    """The same by steps with gradients; the envs are stepped."""
    physics = Physics(env, step=step)
    state = physics.state()._replace(action=torch.zeros(ENVS, task.action_dim).double())
    total = torch.zeros(ENVS, dtype=torch.float64)
    for action in chosen:
        total = total + task.reward(task.observation(*state), action)
        state = physics.step(state, action)
        env.step(action.detach().float())
    return total + task.reward(task.observation(*state), torch.zeros_like(action))


# Robot, steps before, steps that are differentiated, whether it touches the ground, largest error
# with steps of 1e-7. Those that are shipped leave rounding errors of 1e-6 a control step.
@pytest.mark.parametrize(
    ("name", "before", "steps", "down", "bound"),
    [
        ("cartpole", 30, 16, False, 1e-6),
        ("hopper", 0, 8, False, 1e-5),
        ("hopper", 30, 3, True, 1e-4),
        ("ant", 0, 2, False, 1e-5),
    ],
)
def test_a_return_s_gradient(name: str, before: int, steps: int, down: bool, bound: float) -> None:
    task = TASKS[name]()
    env = played(task, before)
    if not down and name != "cartpole":
        state = env.get_state()
        state["physics"][:, 2 if name == "hopper" else 3] += 1.0  # metres
        env.set_state(state)
    chosen = actions(task, steps)
    before_all, contacts = paid(task, env, chosen)
    expected = torch.zeros_like(chosen)
    eps = 1e-5
    for t in range(steps):
        for a in range(task.action_dim):
            moved = torch.zeros_like(chosen)
            moved[t, :, a] = eps
            high, more = paid(task, env, chosen + moved)
            low, fewer = paid(task, env, chosen - moved)
            assert more == fewer == contacts
            expected[t, :, a] = (high - low) / (2.0 * eps)
    assert any(contacts) == down
    assert expected[:, 0].abs().max() > 1e-3
    start = env.get_state()
    for step, largest in ((1e-7, bound), (STEP, 1e-4)):
        env.set_state(start)
        given = chosen.clone().requires_grad_()
        total = through(task, env, given, step)
        torch.testing.assert_close(total, before_all, rtol=1e-12, atol=1e-12)
        (found,) = torch.autograd.grad(total.sum(), given)
        assert float((found - expected).abs().max() / expected.abs().max()) < largest


def test_gradients_of_the_state_are_along_its_motions() -> None:
    """An ant's: what MuJoCo's own integration of a small motion changes of a loss."""
    task = TASKS["ant"]()
    env = played(task, 25)
    model = task.model()
    qpos, qvel = coordinates(env, model)
    action = actions(task, 1)[0]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(model.nq + model.nv, generator=generator, dtype=torch.float64)
    motion = torch.randn(model.nv, generator=generator, dtype=torch.float64)

    def loss(n: int, moved: float) -> Any:
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:], data.ctrl[:] = qpos[n], qvel[n], action[n]
        mujoco.mj_integratePos(model, data.qpos, motion.numpy(), moved)
        for _ in range(task.substeps):
            mujoco.mj_step(model, data)
        return weight.numpy() @ [*data.qpos, *data.qvel]

    physics = Physics(env)
    state = State(*(x.requires_grad_() for x in physics.state()))
    after = physics.step(state, action)
    value = (torch.cat((after.qpos, after.qvel), -1) * weight).sum()
    (gradient,) = torch.autograd.grad(value, state.qpos)
    for n in range(ENVS):
        data = mujoco.MjData(model)
        data.qpos[:] = qpos[n]
        mujoco.mj_integratePos(model, data.qpos, motion.numpy(), 1e-6)
        along = gradient[n] @ (torch.tensor(data.qpos) - qpos[n]) / 1e-6
        expected = (loss(n, 1e-6) - loss(n, -1e-6)) / 2e-6
        assert float(along) == pytest.approx(expected, rel=1e-3)  # feet are down
        assert abs(float(gradient[n, 3:7] @ qpos[n, 3:7])) < 1e-9 * float(gradient[n].abs().max())


def test_values_are_the_environment_s() -> None:
    """To the bit, and for as many steps as one likes."""
    task = TASKS["hopper"]()
    env = MujocoEnv(task, ENVS, seed=3)
    physics = Physics(env)
    state = physics.state()
    for action in actions(task, 30).float():
        state = physics.step(state, action)
        env.step(action)
        for ours, theirs in zip(state, physics.state(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Running the tape backwards")
def test_mujoco_warp_s_own_gradients_are_zero() -> None:
    """Why there are differences. Where this fails, it has some: use them."""
    mujoco_warp = pytest.importorskip("mujoco_warp", reason="needs pip install 'pwm-fast[gpu]'")
    import warp

    task = TASKS["cartpole"]()
    model = task.model()
    model.opt.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)  # which it does not know
    with warp.ScopedDevice("cpu"):
        device_model = mujoco_warp.put_model(model)
        data = mujoco_warp.make_data(model, nworld=1, nconmax=1, njmax=1)
        data.ctrl.requires_grad = data.qvel.requires_grad = True
        tape = warp.Tape()
        with tape:
            mujoco_warp.step(device_model, data)
        tape.backward(grads={data.qvel: warp.ones_like(data.qvel)})
        found = data.ctrl.grad.numpy().copy()
    env = MujocoEnv(task, 1)
    changed = Physics(env).differences(torch.zeros(1, 1))[2][0, -1]
    assert found.tolist() == [[0.0]]
    assert float(changed[2]) == pytest.approx(0.315, rel=0.05)
