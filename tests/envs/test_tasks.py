"""Observations, rewards, terminations and start states against the formulas of the fact sheet."""

import math
import sys

import pytest
import torch

from pwm_fast.envs import TASKS, Task, tasks
from pwm_fast.envs.tasks import rotation
from pwm_fast.envs.tasks.ant import Ant
from pwm_fast.envs.tasks.anymal import Anymal
from pwm_fast.envs.tasks.cartpole import CartPole
from pwm_fast.envs.tasks.hopper import Hopper
from pwm_fast.envs.tasks.humanoid import Humanoid

F64 = torch.float64
CPU = torch.device("cpu")


def rows(*values):
    return torch.tensor(values, dtype=F64)


def ant_state(quat, linear=(0.0, 0.0, 0.0), angular=(0.0, 0.0, 0.0), joints=None, rates=None):
    qpos = rows((5.0, -3.0, 0.6, *quat, *(joints or [0.0] * 8)))
    return qpos, rows((*linear, *angular, *(rates or [0.0] * 8)))


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=F64), atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("name", "steps", "can_terminate", "has_goal"),
    [
        ("ant", 1000, True, False),
        ("anymal", 1000, True, False),
        ("cartpole", 240, False, True),
        ("hopper", 1000, True, False),
        ("humanoid", 1000, True, False),
    ],
)
def test_episodes(name, steps, can_terminate, has_goal):
    task = TASKS[name]()
    assert (task.max_episode_steps, task.can_terminate) == (steps, can_terminate)
    assert (task.goal(torch.zeros(1, task.obs_dim)) is not None) == has_goal


@pytest.mark.parametrize("start", ["hanging", "upright"])
def test_cartpole_observation(start):
    task = CartPole(start)
    obs = task.observation(rows((0.5, math.pi / 6)), rows((-1.0, 2.0)), rows((0.3,)))
    close(obs, [[0.5, -1.0, 0.5, 0.8660254, 2.0]])


@pytest.mark.parametrize(
    ("x", "xd", "th", "thd", "expected"),
    [
        (0.0, 0.0, 0.0, 0.0, 0.0),
        # -(0.2741557 + 0.4 + 0.0125 + 0.1)
        (0.5, -1.0, math.pi / 6, 2.0, -0.7866557),
        # 270 deg is -90 deg: -(pi / 2)^2
        (0.0, 0.0, 1.5 * math.pi, 0.0, -2.4674011),
        (0.0, 0.0, -2.5 * math.pi, 0.0, -2.4674011),
        (2.0, 0.0, -math.pi, 0.0, -9.8696044 - 0.2),
    ],
)
def test_cartpole_reward(x, xd, th, thd, expected):
    task = CartPole()
    obs = task.observation(rows((x, th)), rows((xd, thd)), rows((0.0,)))
    close(task.reward(obs, rows((1.0,))), [expected])


def test_cartpole_goal_and_termination():
    task = CartPole()
    angles = torch.tensor([0.0, 0.19, -0.19, 0.21, math.pi, 2 * math.pi], dtype=F64)
    qpos = torch.stack((torch.full_like(angles, 100.0), angles), -1)
    obs = task.observation(qpos, torch.zeros_like(qpos), torch.zeros(6, 1, dtype=F64))
    assert task.goal(obs).tolist() == [True, True, True, False, False, True]
    assert not task.terminated(obs).any()
    assert not task.can_terminate


def test_hopper_observation():
    obs = Hopper().observation(
        rows((7.0, 0.1, 0.2, 0.3, 0.4, 0.5)),
        rows((1.0, 2.0, 3.0, 4.0, 5.0, 6.0)),
        rows((0.0, 0.0, 0.0)),
    )
    close(obs, [[0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])


@pytest.mark.parametrize(
    ("z", "pitch", "xd", "action", "expected"),
    [
        # H = d = 0.3
        (0.0, 0.0, 0.0, (0.0, 0.0, 0.0), 1.3),
        # d = 0.2; 1 - (0.2 / 0.5235988)^2 = 0.8540975; 0.1 |a|^2 = 0.125
        (-0.1, 0.2, 1.5, (1.0, -0.5, 0.0), 1.5 + 0.2 + 0.8540975 - 0.125),
        # d = -0.1: H = -2
        (-0.4, 0.0, -1.0, (0.0, 0.0, 1.0), -1.0 - 2.0 + 1.0 - 0.1),
        # d is clipped at -1 and at 0.3; 30 deg of pitch cost 1
        (-2.0, 0.0, 0.0, (0.0, 0.0, 0.0), -199.0),
        (0.5, math.pi / 6, 0.0, (0.0, 0.0, 0.0), 0.3),
    ],
)
def test_hopper_reward(z, pitch, xd, action, expected):
    task = Hopper()
    obs = task.observation(
        rows((0.0, z, pitch, 0.0, 0.0, 0.0)), rows((xd, 0, 0, 0, 0, 0)), rows(action)
    )
    close(task.reward(obs, rows(action)), [expected])


def test_hopper_termination():
    obs = torch.zeros(3, 11)
    obs[:, 0] = torch.tensor([-0.44, -0.46, 0.0])
    assert Hopper().terminated(obs).tolist() == [False, True, False]


def test_ant_observation_upright():
    task = Ant()
    joints, rates = [0.1 * i for i in range(1, 9)], [float(i) for i in range(1, 9)]
    action = rows([-0.1 * i for i in range(1, 9)])
    qpos, qvel = ant_state((1, 0, 0, 0), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), joints, rates)
    (obs,) = task.observation(qpos, qvel, action)
    assert obs.shape == (37,)
    close(obs[0], 0.6)
    close(obs[1:5], [-math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5)])
    close(obs[5:8], [1.0, 3.0, -2.0])  # x, up, lateral
    close(obs[8:11], [4.0, 6.0, -5.0])
    close(obs[11:19], joints)
    close(obs[19:27], [0.1 * i for i in range(1, 9)])
    close(obs[27:29], [1.0, 1.0])
    close(obs[29:], action[0])


@pytest.mark.parametrize(
    ("axis", "degrees", "angular", "quat_xyzw", "angular_world", "up", "heading"),
    [
        # Yawed by 90 deg: the body's (1, 2, 3) is the world's (-2, 1, 3).
        ((0, 0, 1), 90.0, (1, 2, 3), (-0.5, 0.5, 0.5, 0.5), (-2.0, 3.0, -1.0), 1.0, 0.0),
        # Rolled by 60 deg: -90 + 60 deg about x; the body's y is (0, cos 60, sin 60).
        ((1, 0, 0), 60.0, (0, 1, 0), (-0.2588190, 0, 0, 0.9659258), (0, 0.8660254, -0.5), 0.5, 1.0),
        # Nose down by 30 deg: the body's x is (cos 30, 0, -sin 30).
        (
            (0, 1, 0),
            30.0,
            (1, 0, 0),
            (-0.6830127, 0.1830127, -0.1830127, 0.6830127),
            (0.8660254, -0.5, 0.0),
            0.8660254,
            0.8660254,
        ),
        # Upside down.
        ((1, 0, 0), 180.0, (0, 0, 1), (0.7071068, 0, 0, 0.7071068), (0, -1, 0), -1.0, 1.0),
    ],
)
def test_ant_observation_turned(axis, degrees, angular, quat_xyzw, angular_world, up, heading):
    half = math.radians(degrees) / 2
    quat = (math.cos(half), *(math.sin(half) * a for a in axis))
    qpos, qvel = ant_state(quat, (0.5, -0.25, 0.75), angular)
    (obs,) = Ant().observation(qpos, qvel, torch.zeros(1, 8, dtype=F64))
    close(obs[1:5], quat_xyzw)
    close(obs[5:8], [0.5, 0.75, 0.25])  # MuJoCo's linear velocity is the world's already
    close(obs[8:11], angular_world)
    close(obs[27:29], [up, heading])


@pytest.mark.parametrize(
    ("name", "root"), [("ant", "torso"), ("anymal", "trunk"), ("humanoid", "torso")]
)
def test_observations_against_mujoco(name, root):
    mujoco = pytest.importorskip("mujoco", reason="needs pip install 'pwm-fast[train]'")
    task = TASKS[name]()
    model, n = task.model(), task.action_dim
    data = mujoco.MjData(model)
    generator = torch.Generator().manual_seed(0)
    to_y_up = torch.tensor([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=F64)
    for _ in range(20):
        qpos = torch.randn(1, 7 + n, generator=generator, dtype=F64)
        qpos[:, 3:7] /= qpos[:, 3:7].norm()
        qvel = torch.randn(1, 6 + n, generator=generator, dtype=F64)
        action = torch.randn(1, n, generator=generator, dtype=F64)
        (obs,) = task.observation(qpos, qvel, action)
        assert obs.shape == (task.obs_dim,)
        data.qpos[:], data.qvel[:] = qpos[0].numpy(), qvel[0].numpy()
        mujoco.mj_forward(model, data)
        torso = model.body(root).id
        twist = torch.zeros(6, dtype=F64).numpy()  # angular, linear, in the world's axes
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_XBODY, torso, twist, 0)
        rotation_matrix = torch.tensor(data.xmat[torso]).view(3, 3)
        close(obs[0], data.xpos[torso][2])
        close(obs[5:8], to_y_up @ torch.tensor(twist[3:]))
        close(obs[8:11], to_y_up @ torch.tensor(twist[:3]))
        close(obs[11 : 11 + n], qpos[0, 7:])
        close(obs[11 + n : 11 + 2 * n], 0.1 * qvel[0, 6:])
        upright = [rotation_matrix[2, 2].item(), rotation_matrix[0, 0].item()]
        close(obs[11 + 2 * n : 13 + 2 * n], upright)
        close(obs[13 + 2 * n :], action[0])
        x, y, z, w = obs[1:5].tolist()
        matrix = torch.zeros(9, dtype=F64).numpy()
        mujoco.mju_quat2Mat(matrix, torch.tensor([w, x, y, z], dtype=F64).numpy())
        close(torch.tensor(matrix).view(3, 3), to_y_up @ rotation_matrix)


def test_ant_reward_and_termination():
    task = Ant()
    half = math.radians(30.0)  # half of 60 deg
    qpos, qvel = ant_state((math.cos(half), 0.0, 0.0, math.sin(half)), (1.5, 9.0, 9.0))
    obs = task.observation(qpos, qvel, torch.zeros(1, 8, dtype=F64))
    # v_x + 0.1 up + cos 60 + (0.6 - 0.27), whatever the action
    close(task.reward(obs, torch.ones(1, 8, dtype=F64)), [1.5 + 0.1 + 0.5 + 0.33])
    heights = torch.zeros(3, 37)
    heights[:, 0] = torch.tensor([0.26, 0.28, 0.75])
    assert task.terminated(heights).tolist() == [True, False, False]


def free_root_obs(task, height, v_x, degrees):
    """Of a robot that is turned about the vertical axis and has other velocities besides."""
    half, n = math.radians(degrees) / 2, task.action_dim
    quat = (math.cos(half), 0.0, 0.0, math.sin(half))
    qpos = rows((5.0, -3.0, height, *quat, *[0.3] * n))
    qvel = rows((v_x, 9.0, 9.0, *[2.0] * (3 + n)))
    return task.observation(qpos, qvel, torch.full((1, n), 0.7, dtype=F64))


def test_anymal_reward_and_termination():
    task = Anymal()
    obs = free_root_obs(task, 0.6, 1.5, 60.0)
    action = rows([1.0, -0.5, *[0.0] * 10])
    # v_x + 0.1 up + cos 60 + (0.6 - 0.25) - 0.005 |a|^2
    close(task.reward(obs, action), [1.5 + 0.1 + 0.5 + 0.35 - 0.00625])
    close(task.reward(obs, torch.zeros_like(action)), [1.5 + 0.1 + 0.5 + 0.35])
    heights = torch.zeros(3, 49)
    heights[:, 0] = torch.tensor([0.24, 0.26, 0.55])
    assert task.terminated(heights).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("height", "expected"),
    [
        (1.35, 1.0),  # d is clipped at 0.1
        (0.94, 1.0),
        (0.89, 0.5),
        (0.84, 0.0),
        (0.74, -2.0),  # -200 * 0.1^2
        (-5.0, -200.0),  # and at -1
    ],
)
def test_humanoid_reward(height, expected):
    task = Humanoid()
    obs = free_root_obs(task, height, -0.5, 60.0)
    action = rows([1.0, -0.5, 0.5, *[0.0] * 18])
    close(task.reward(obs, action), [-0.5 + 0.1 + 0.5 + expected - 0.003])


def test_humanoid_termination():
    heights = torch.zeros(3, 76)
    heights[:, 0] = torch.tensor([0.73, 0.75, 1.35])
    assert Humanoid().terminated(heights).tolist() == [True, False, False]


def test_rotations():
    q = rotation.from_axis_angle(rows((0, 0, 5.0), (1.0, 0, 0)), rows((math.pi / 2,), (math.pi,)))
    v = rows((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))
    close(rotation.rotate(q, v), [[-2.0, 1.0, 3.0], [1.0, -2.0, -3.0]])
    close(rotation.rotate_back(q, rotation.rotate(q, v)), v)


def draw(task, n=4000, seed=0, dtype=F64):
    return task.sample_reset(n, torch.Generator().manual_seed(seed), dtype, CPU)


def uniform_within(x, centre, bound):
    """Every column is U(centre - bound, centre + bound), to within 5 standard errors."""
    offset = (x - torch.as_tensor(centre, dtype=x.dtype)) / bound
    assert offset.abs().max() <= 1.0 + 1e-6
    assert offset.abs().amax(0).min() > 0.99
    assert offset.mean(0).abs().max() < 5 * 3**-0.5 * x.shape[0] ** -0.5
    assert (offset.square().mean(0) - 1 / 3).abs().max() < 5 * 0.3 * x.shape[0] ** -0.5


@pytest.mark.parametrize(("start", "angle"), [("hanging", -math.pi), ("upright", 0.0)])
def test_cartpole_reset(start, angle):
    qpos, qvel = draw(CartPole(start))
    uniform_within(qpos, [0.0, angle], math.pi / 2)
    uniform_within(qvel, 0.0, 0.25)


def test_hopper_reset():
    qpos, qvel = draw(Hopper())
    uniform_within(qpos, 0.0, 0.05)
    uniform_within(qvel, 0.0, 0.05)


@pytest.mark.parametrize(
    ("name", "height", "start"),
    [
        ("ant", 0.75, [0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0]),
        # LF, RF, LH, RH
        ("anymal", 0.55, [0.03, 0.4, -0.8, -0.03, 0.4, -0.8, 0.03, -0.4, 0.8, -0.03, -0.4, 0.8]),
        ("humanoid", 1.35, [0.0] * 21),
    ],
)
def test_resets_of_robots_with_a_free_root(name, height, start):
    qpos, qvel = draw(TASKS[name]())
    position, quat, joints = qpos[:, :3], qpos[:, 3:7], qpos[:, 7:]
    uniform_within(position, [0.0, 0.0, height], 0.1)
    uniform_within(joints, start, 0.2)
    uniform_within(qvel[:, 6:], 0.0, 0.25)
    close(quat.norm(dim=-1), torch.ones(4000))
    angle = 2 * torch.atan2(quat[:, 1:].norm(dim=-1), quat[:, 0])
    assert angle.max() <= math.radians(7.5) + 1e-9
    assert angle.max() > math.radians(7.4)
    assert quat[:, 1:].mean(0).abs().max() < 0.003
    # dflex draws the twist at the world's origin: v = v_root - w x p, with w in the world's axes.
    angular = rotation.rotate(quat, qvel[:, 3:6])
    uniform_within(angular, 0.0, 0.25)
    uniform_within(qvel[:, :3] - torch.linalg.cross(angular, position), 0.0, 0.25)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_resets_follow_the_seed(name):
    task = TASKS[name]()
    first, again, other = draw(task, 5, 1), draw(task, 5, 1), draw(task, 5, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    qpos, qvel = draw(task, 3, dtype=torch.float32)
    assert qpos.dtype == qvel.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_functions_never_look_at_the_numbers(name):
    """As a CUDA graph needs it: under fake tensors any host synchronisation raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    task = TASKS[name]()
    qpos, qvel = draw(task, 4, dtype=torch.float32)
    action = torch.zeros(4, task.action_dim)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (qpos, qvel, action)]
        obs = task.observation(*fake)
        assert obs.shape == (4, task.obs_dim)
        assert obs.dtype == torch.float32
        assert task.reward(obs, fake[2]).shape == (4,)
        assert task.terminated(obs).dtype == torch.bool
        task.goal(obs)
        start = task.sample_reset(4, torch.Generator(), torch.float32, CPU)
        assert [x.shape for x in start] == [qpos.shape, qvel.shape]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_gradients_reach_state_and_action(name):
    task = TASKS[name]()
    qpos, qvel = (x.requires_grad_() for x in draw(task, 4))
    action = torch.full((4, task.action_dim), 0.5, dtype=F64)
    task.reward(task.observation(qpos, qvel, action), action).sum().backward()
    assert torch.isfinite(qpos.grad).all()
    assert qvel.grad.abs().sum() > 0


def test_a_robot_is_found_by_its_module(tmp_path, monkeypatch):
    """A module in ``envs/tasks`` is enough; base classes and imported ones are no robots."""
    text = "from pwm_fast.envs.tasks.hopper import Hopper\nclass Crawler(Hopper): name = '{}'\n"
    (tmp_path / "crawler.py").write_text(text.format("crawler"))
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    assert sorted(tasks.built_in()) == sorted([*TASKS, "crawler"])
    (tmp_path / "slider.py").write_text(text.format("ant").replace("Crawler", "Slider"))
    with pytest.raises(TypeError, match="Ant and Slider are both 'ant'"):
        tasks.built_in()
    for name in ("crawler", "slider"):
        monkeypatch.delitem(sys.modules, f"pwm_fast.envs.tasks.{name}")


def test_what_a_robot_lacks_is_named():
    with pytest.raises(TypeError, match="the task Bare lacks asset, obs_dim"):
        type("Bare", (Task,), {"name": "bare", "action_dim": 1})
    lost = type("Lost", (TASKS["hopper"],), {"name": "lost", "asset": "lost.xml"})
    with pytest.raises(FileNotFoundError, match=r"env 'lost' needs .*envs/assets/lost\.xml"):
        lost().mjcf()
