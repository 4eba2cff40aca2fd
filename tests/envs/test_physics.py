"""The MJCF models: masses, order, torques, contacts and motion, against numbers worked by hand."""

import math

import numpy as np
import pytest

from pwm_fast.envs import TASKS, make
from pwm_fast.envs.tasks.base import Variant

mujoco = pytest.importorskip("mujoco", reason="needs pip install 'pwm-fast[train]'")

GRAVITY = 9.81
LEGS = [f"{leg}_{part}" for leg in ("LF", "RF", "LH", "RH") for part in ("HAA", "HFE", "KFE")]
SIDES = ("right", "left")
HUMANOID = ["abdomen_z", "abdomen_y", "abdomen_x"]
HUMANOID += [
    f"{side}_{part}"
    for side in SIDES
    for part in ("hip_x", "hip_z", "hip_y", "knee", "ankle_y", "ankle_x")
]
HUMANOID += [f"{s}_{part}" for s in SIDES for part in ("shoulder_1", "shoulder_2", "elbow")]
# dflex's strengths times 0.35, in the order of the joints.
STRENGTHS = [70.0] * 3 + [70.0, 70.0, 210.0, 140.0, 35.0, 35.0] * 2 + [35.0, 35.0, 70.0] * 2


def load(name, variant="dflex"):
    model = TASKS[name](variant=variant).model()
    return model, mujoco.MjData(model)


def numbers(model):
    """All arrays of a model by name."""
    found = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    return {name: x for name, x in found.items() if isinstance(x, np.ndarray)}


def same(a, b):
    a, b = numbers(a), numbers(b)
    assert len(a) > 100
    assert a.keys() == b.keys()
    return all(np.array_equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("name", sorted(TASKS))
def test_dflex_is_what_the_file_says(name):
    file = mujoco.MjModel.from_xml_string(TASKS[name]().mjcf())
    assert same(load(name, "dflex")[0], file)
    assert same(load(name, "default")[0], file) == (name != "ant")


def test_the_ant_that_can_run_has_a_fifth_of_the_mass():
    light, heavy = (load("ant", variant)[0] for variant in ("default", "dflex"))
    assert light.body_mass.sum() == pytest.approx(36.4, rel=0.01)
    np.testing.assert_allclose(light.body_mass, 0.2 * heavy.body_mass)
    np.testing.assert_allclose(light.body_inertia, 0.2 * heavy.body_inertia)
    for name in ("dof_damping", "dof_armature", "actuator_gear", "geom_size", "geom_friction"):
        np.testing.assert_array_equal(numbers(light)[name], numbers(heavy)[name])


@pytest.mark.parametrize("name", ["anymal", "hopper"])
def test_what_a_variant_changes(name):
    """Density, and mass where it is given; gear; the damping and armature of hinges and slides."""
    changed = Variant(mass=0.5, torque=3.0, damping=-2.0, armature=4.0)
    task = type("Changed", (TASKS[name],), {"variants": {"default": changed}})
    model, file = task().model(), load(name)[0]
    np.testing.assert_allclose(model.body_mass, 0.5 * file.body_mass)
    np.testing.assert_allclose(model.actuator_gear, 3.0 * file.actuator_gear)
    np.testing.assert_allclose(model.dof_armature, 4.0 * file.dof_armature)
    joints = [dof for dof in range(file.nv) if file.jnt_type[file.dof_jntid[dof]] != 0]
    expected = file.dof_damping.copy()
    expected[joints] -= 2.0
    np.testing.assert_allclose(model.dof_damping, expected)
    for other in ("jnt_stiffness", "geom_size", "geom_friction", "jnt_range"):
        np.testing.assert_array_equal(numbers(model)[other], numbers(file)[other])


@pytest.mark.parametrize("variant", ["fast", "", None, 5, ["dflex"]])
def test_an_unknown_variant_is_named_with_the_choices(variant):
    said = r"env\.variant of ant must be one of default, dflex, got "
    with pytest.raises(ValueError, match=said):
        make("ant", 2, variant=variant)
    with pytest.raises(ValueError, match=r"env\.variant of cartpole must be one of default, dflex"):
        make("cartpole", 2, start="upright", variant=variant)


def test_both_engines_step_the_variant():
    masses = {}
    for engine in ("mujoco", "mujoco_warp"):
        if engine == "mujoco_warp":
            pytest.importorskip("mujoco_warp", reason="needs pip install 'pwm-fast[gpu]'")
        for variant in ("default", "dflex"):
            env = make("ant", 2, engine=engine, variant=variant)
            masses[engine, variant] = float(env._compiled.body_mass.sum())
            if engine == "mujoco_warp":
                own = float(env._model.body_mass.numpy().sum())
                assert own == pytest.approx(masses[engine, variant], rel=1e-5)
    assert masses["mujoco_warp", "default"] == masses["mujoco", "default"] < 40
    assert masses["mujoco_warp", "dflex"] == masses["mujoco", "dflex"] > 180


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


@pytest.mark.parametrize(
    ("name", "mass", "joints"), [("anymal", 37.25 + 8 * 0.05, LEGS), ("humanoid", 40.84, HUMANOID)]
)
def test_sizes_and_orders_of_robots_with_a_free_root(name, mass, joints):
    model, _ = load(name)
    assert model.body_mass.sum() == pytest.approx(mass, rel=1e-3)
    n = len(joints)
    assert (model.nq, model.nv, model.nu) == (7 + n, 6 + n, n)
    assert joint_names(model) == ["root", *joints]
    assert [model.actuator(i).name for i in range(n)] == joints


def test_planar_orders():
    assert joint_names(load("cartpole")[0]) == ["slider", "hinge"]
    joints = ["rootx", "rootz", "rooty", "thigh", "leg", "foot"]
    model, _ = load("hopper")
    assert joint_names(model) == joints
    assert [model.actuator(i).name for i in range(3)] == joints[3:]


@pytest.mark.parametrize(
    ("name", "damping", "armature", "stiffness", "friction"),
    [
        ("cartpole", [1, 1], [0.1, 0.1], [0, 0], None),
        ("hopper", [10, 10, 10, 12, 12, 12], [1] * 6, [0] * 6, 0.9),
        ("ant", [0] * 6 + [11] * 8, [0] * 6 + [0.05] * 8, [0] * 9, 0.75),
        ("anymal", [0] * 6 + [12] * 12, [0] * 6 + [0.006] * 12, [0] + [85] * 12, 0.75),
        (
            "humanoid",
            # dflex's own of each joint and 10 of its limits
            [0] * 6 + [15] * 3 + [15, 15, 15, 10.1, 11, 11] * 2 + [15, 15, 11] * 2,
            [0] * 6
            + [0.02, 0.01, 0.01]
            + [0.01, 0.01, 0.01, 0.007, 0.006, 0.006] * 2
            + [0.01, 0.01, 0.006] * 2,
            [0] + [20, 20, 10] + [10, 10, 20, 5, 2, 2] * 2 + [10, 10, 2] * 2,
            0.75,
        ),
    ],
)
def test_joint_and_contact_numbers(name, damping, armature, stiffness, friction):
    model, _ = load(name)
    assert model.dof_damping.tolist() == damping
    assert model.dof_armature.tolist() == armature
    assert model.jnt_stiffness.tolist() == stiffness
    assert not model.qpos_spring[7:].any()
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
    [
        ("cartpole", 0, [1000.0]),
        ("hopper", 3, [200.0] * 3),
        ("ant", 6, [200.0] * 8),
        ("anymal", 6, [200.0] * 12),
        ("humanoid", 6, STRENGTHS),
    ],
)
def test_actuators_produce_their_torque(name, first, strength):
    model, data = load(name)
    for i, most in enumerate(strength):
        for control, expected in ((1.0, most), (-0.5, -0.5 * most), (7.0, most)):
            data.ctrl[:] = 0.0
            data.ctrl[i] = control
            mujoco.mj_forward(model, data)
            torque = np.zeros(model.nv)
            torque[first + i] = expected
            np.testing.assert_allclose(data.qfrc_actuator, torque)


@pytest.mark.parametrize("name", ["hopper", "ant", "anymal", "humanoid"])
def test_touches_only_the_floor(name):
    model, data = load(name)
    rng = np.random.default_rng(0)
    floor = model.geom("floor").id
    met_floor = 0
    for _ in range(200):
        data.qpos[:] = rng.uniform(-3, 3, model.nq)
        height = 1 if name == "hopper" else 2
        data.qpos[height] = 5.0  # folded into itself, in the air
        mujoco.mj_forward(model, data)
        assert data.ncon == 0
        data.qpos[height] = -1.0 if name == "hopper" else 0.3
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


@pytest.mark.parametrize(
    ("name", "variant", "mass"),
    [("ant", "dflex", 182.18), ("ant", "default", 36.44), ("anymal", "dflex", 37.65)],
)
def test_stands_without_torque(name, variant, mass):
    """On its limits or springs, above the terminal height, and the floor carries its weight."""
    model, data = load(name, variant)
    task = TASKS[name]
    data.qpos[:] = [0, 0, task.start_height, 1, 0, 0, 0, *task.start_joints]
    mujoco.mj_step(model, data, nstep=240 * 10)
    assert task.termination_height + 0.03 < data.qpos[2] < 0.75
    assert np.abs(data.qvel).max() < 0.05
    depth, normal, wrench = 0.0, 0.0, np.zeros(6)
    for i in range(data.ncon):
        mujoco.mj_contactForce(model, data, i, wrench)
        normal += wrench[0]
        depth = max(depth, -data.contact.dist[i])
    assert normal == pytest.approx(mass * GRAVITY, rel=0.01)
    assert depth < 0.005


def test_anymal_s_legs():
    """Feet where the offsets add up to, and how far from the floor."""
    model, data = load("anymal")
    data.qpos[:] = [0, 0, 1, 1, 0, 0, 0, *[0.0] * 12]
    mujoco.mj_forward(model, data)
    for leg, (x, y) in {"LF": (1, 1), "RF": (1, -1), "LH": (-1, 1), "RH": (-1, -1)}.items():
        foot = x * (0.2999 + 0.0599 + 0.08795), y * (0.104 + 0.08381 + 0.1003 + 0.01305)
        expected = *foot, 1 - 0.285 - 0.31547
        np.testing.assert_allclose(data.geom(f"{leg}_foot").xpos, expected, atol=1e-9)
        np.testing.assert_allclose(
            data.geom(f"{leg}_knee").xpos, (x * 0.3598, y * (0.28811 - 0.05), 0.715), atol=1e-9
        )
    task = TASKS["anymal"]
    data.qpos[:] = [0, 0, task.start_height, 1, 0, 0, 0, *task.start_joints]
    mujoco.mj_forward(model, data)
    assert data.ncon == 0
    gaps = [data.geom(f"{leg}_foot").xpos[2] - 0.03 for leg in ("LF", "RF", "LH", "RH")]
    np.testing.assert_allclose(gaps, 0.007, atol=1e-3)


def test_humanoid_s_sides_are_mirror_images():
    model, data = load("humanoid")
    rng = np.random.default_rng(0)
    leg, arm = rng.uniform(-1, 1, 6), rng.uniform(-1, 1, 3)
    data.qpos[:] = [0, 0, 1.35, 1, 0, 0, 0, 0, 0.3, 0, *leg, *leg, *arm, *arm]
    mujoco.mj_forward(model, data)
    pairs = 0
    for i in range(model.ngeom):
        name = model.geom(i).name
        if name.startswith("right_"):
            other = data.geom(name.replace("right_", "left_")).xpos
            np.testing.assert_allclose(data.geom_xpos[i] * [1, -1, 1], other, atol=1e-9)
            pairs += 1
    assert pairs == 7


def test_the_humanoid_stands_straight_over_the_floor():
    model, data = load("humanoid")
    data.qpos[2] = TASKS["humanoid"].start_height
    mujoco.mj_forward(model, data)
    assert data.ncon == 0
    # The soles under hip, thigh, shin and foot; the top of the head.
    sole = 1.35 - 0.195 - 0.13 - 0.14 - 0.383 - 0.33 - 0.08 - 0.027
    lowest = min(
        data.geom(f"{side}_foot_{part}").xpos[2] for side in SIDES for part in ("in", "out")
    )
    assert lowest - 0.027 == pytest.approx(sole, abs=1e-9)
    assert 0.05 < sole < 0.08
    assert data.geom("head").xpos[2] + 0.09 - sole == pytest.approx(1.565, abs=0.001)
