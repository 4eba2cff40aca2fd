"""The MJCF models: masses, order, torques, contacts and motion, against numbers worked by hand."""

import math

import numpy as np
import pytest

from pwm_fast.envs import TASKS

mujoco = pytest.importorskip("mujoco", reason="needs pip install 'pwm-fast[train]'")

GRAVITY = 9.81


def load(name):
    model = mujoco.MjModel.from_xml_string(TASKS[name]().mjcf())
    return model, mujoco.MjData(model)


def joint_names(model):
    return [model.joint(i).name for i in range(model.njnt)]


@pytest.mark.parametrize(
    ("name", "mass", "nq", "nv"), [("cartpole", 52.5, 2, 2), ("hopper", 15.8, 6, 6)]
)
def test_planar_sizes(name, mass, nq, nv):
    model, _ = load(name)
    assert model.body_mass.sum() == pytest.approx(mass, rel=0.01)
    assert (model.nq, model.nv, model.nu) == (nq, nv, TASKS[name].action_dim)


def test_ant_sizes_and_order():
    model, _ = load("ant")
    assert model.body_mass.sum() == pytest.approx(182.2, rel=0.01)
    assert (model.nq, model.nv, model.nu) == (15, 14, 8)
    legs = [f"{part}_{leg}" for leg in range(1, 5) for part in ("hip", "ankle")]
    assert joint_names(model) == ["root", *legs]
    assert [model.actuator(i).name for i in range(8)] == legs


def test_planar_orders():
    assert joint_names(load("cartpole")[0]) == ["slider", "hinge"]
    joints = ["rootx", "rootz", "rooty", "thigh", "leg", "foot"]
    model, _ = load("hopper")
    assert joint_names(model) == joints
    assert [model.actuator(i).name for i in range(3)] == joints[3:]


@pytest.mark.parametrize(
    ("name", "damping", "armature", "friction"),
    [
        ("cartpole", [1, 1], [0.1, 0.1], None),
        ("hopper", [10, 10, 10, 12, 12, 12], [1] * 6, 0.9),
        ("ant", [0] * 6 + [11] * 8, [0] * 6 + [0.05] * 8, 0.75),
    ],
)
def test_joint_and_contact_numbers(name, damping, armature, friction):
    model, _ = load(name)
    assert model.dof_damping.tolist() == damping
    assert model.dof_armature.tolist() == armature
    assert not model.jnt_stiffness.any()
    assert model.opt.timestep * TASKS[name].substeps == pytest.approx(TASKS[name].control_dt)
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    if friction is not None:
        assert (model.geom_friction[:, 0] == friction).all()


def test_limits():
    hopper, _ = load("hopper")
    degrees = np.degrees(hopper.jnt_range[3:])
    np.testing.assert_allclose(degrees, [[-150, 0], [-150, 0], [-45, 45]])
    ant, _ = load("ant")
    ankles = {1: [30, 100], 2: [-100, -30], 3: [-100, -30], 4: [30, 100]}
    for leg, ankle in ankles.items():
        np.testing.assert_allclose(np.degrees(ant.joint(f"hip_{leg}").range), [-40, 40])
        np.testing.assert_allclose(np.degrees(ant.joint(f"ankle_{leg}").range), ankle)


@pytest.mark.parametrize(
    ("name", "first", "strength"),
    [("cartpole", 0, 1000.0), ("hopper", 3, 200.0), ("ant", 6, 200.0)],
)
def test_actuators_produce_their_torque(name, first, strength):
    model, data = load(name)
    for i in range(model.nu):
        for control, expected in ((1.0, strength), (-0.5, -0.5 * strength), (7.0, strength)):
            data.ctrl[:] = 0.0
            data.ctrl[i] = control
            mujoco.mj_forward(model, data)
            torque = np.zeros(model.nv)
            torque[first + i] = expected
            np.testing.assert_allclose(data.qfrc_actuator, torque)


@pytest.mark.parametrize("name", ["hopper", "ant"])
def test_touches_only_the_floor(name):
    model, data = load(name)
    rng = np.random.default_rng(0)
    floor = model.geom("floor").id
    met_floor = 0
    for _ in range(200):
        data.qpos[:] = rng.uniform(-3, 3, model.nq)
        height = {"hopper": 1, "ant": 2}[name]
        data.qpos[height] = 5.0  # folded into itself, in the air
        mujoco.mj_forward(model, data)
        assert data.ncon == 0
        data.qpos[height] = {"hopper": -1.0, "ant": 0.3}[name]
        mujoco.mj_forward(model, data)
        assert all(floor in pair for pair in data.contact.geom)
        met_floor += data.ncon
    assert met_floor > 200


def test_pendulum_period():
    """A small swing of the pole under the cart, damping off: the closed form of two bodies."""
    model, data = load("cartpole")
    model.dof_damping[:] = 0.0
    data.qpos[:] = 0.0, math.pi - 0.05
    crossings, previous = [], -0.05
    while len(crossings) < 9:
        mujoco.mj_step(model, data)
        angle = data.qpos[1] - math.pi
        if previous * angle < 0:
            crossings.append(data.time - model.opt.timestep * angle / (angle - previous))
        previous = angle
    cart, pole, centre, armature = 50.0 + 0.1, 2.5, 0.5, 0.1
    inertia = pole * (1.0**2 + 0.05**2) / 12 + pole * centre**2 + armature
    determinant = (cart + pole) * inertia - (pole * centre) ** 2
    omega = math.sqrt(pole * GRAVITY * centre * (cart + pole) / determinant)
    period = (crossings[-1] - crossings[0]) / 4
    assert period == pytest.approx(2 * math.pi / omega, rel=2e-3)


def test_cart_acceleration():
    """The motor at full force, pole upright: two equations of motion, solved by hand."""
    model, data = load("cartpole")
    data.ctrl[0] = 1.0
    mujoco.mj_forward(model, data)
    inertia = 2.5 * (1.0**2 + 0.05**2) / 12 + 2.5 * 0.25 + 0.1
    mass = np.array([[52.6, 1.25], [1.25, inertia]])
    np.testing.assert_allclose(data.qacc, np.linalg.solve(mass, [1000.0, 0.0]), rtol=1e-6)


def test_ant_falls_freely():
    model, data = load("ant")
    data.qpos[:] = [0, 0, 5, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1]
    mujoco.mj_forward(model, data)
    expected = np.zeros(14)
    expected[2] = -GRAVITY
    np.testing.assert_allclose(data.qacc, expected, atol=1e-9)


def test_hopper_root_has_drag_and_added_mass():
    model, data = load("hopper")
    data.qpos[1] = 5.0
    data.qvel[:2] = 2.0, -3.0
    mujoco.mj_forward(model, data)
    for root in (0, 1):
        unit, momentum = np.eye(6)[root], np.zeros(6)
        mujoco.mj_mulM(model, data, momentum, unit)
        assert momentum[root] == pytest.approx(15.82 + 1.0, rel=1e-3)
    np.testing.assert_allclose(data.qfrc_passive[:2], [-20.0, 30.0])


def test_ant_stands_without_torque():
    """It settles on its limits above the terminal height, and the floor carries its weight."""
    model, data = load("ant")
    data.qpos[:] = [0, 0, 0.75, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1]
    mujoco.mj_step(model, data, nstep=240 * 10)
    assert 0.3 < data.qpos[2] < 0.75
    assert np.abs(data.qvel).max() < 0.05
    depth, normal, wrench = 0.0, 0.0, np.zeros(6)
    for i in range(data.ncon):
        mujoco.mj_contactForce(model, data, i, wrench)
        normal += wrench[0]
        depth = max(depth, -data.contact.dist[i])
    assert normal == pytest.approx(182.18 * GRAVITY, rel=0.01)
    assert depth < 0.005
