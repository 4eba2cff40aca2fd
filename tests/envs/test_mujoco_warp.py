"""mujoco-warp against native MuJoCo, what its step may not do, and its CUDA graph."""

import contextlib
import gc
import math
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pwm_fast.envs import TASKS, MujocoEnv, MujocoWarpEnv, make
from pwm_fast.envs._buffers import contacts_and_rows
from pwm_fast.envs._device import Packed, Watch
from pwm_fast.envs.tasks.ant import Ant
from pwm_fast.envs.tasks.cartpole import CartPole
from tests.envs.engines import flat, needs_gpu, needs_warp, place, random_actions, same

mujoco = pytest.importorskip("mujoco", reason="needs pip install 'pwm-fast[train]'")

NAMES = sorted(TASKS)


class Elliptic:
    """With round friction cones.

    Pyramids have edges, and under a capsule that is steeper than 60 degrees mujoco-warp turns them
    otherwise than MuJoCo: contacts of a robot as shipped differ in the friction's direction.
    """

    def mjcf(self):
        return super().mjcf().replace("integrator=", 'cone="elliptic" integrator=')


class EllipticAnt(Elliptic, Ant):
    pass


class EllipticAnymal(Elliptic, TASKS["anymal"]):
    pass


class EllipticHumanoid(Elliptic, TASKS["humanoid"]):
    pass


class FreeCart(CartPole):
    """Without a limit, so without contacts and constraints: its buffers have no row to hold."""

    def mjcf(self):
        return super().mjcf().replace('limited="true" range="-4 4"', "")


def pair(task, num_envs, seed=0):
    return MujocoWarpEnv(task(), num_envs, device="cpu", seed=seed), MujocoEnv(task(), num_envs)


def put(warp, native):
    """Native envs' state, rounded to float32, into both."""
    for field in ("_qpos", "_qvel", "_ctrl", "_warmstart"):
        getattr(warp, field).copy_(getattr(native, field))
        getattr(native, field).copy_(getattr(warp, field))
    native._obs = native._observe()
    warp._obs.copy_(native._obs)


@needs_warp
@pytest.mark.parametrize(
    # Tolerances: five times what 2 x 80 steps of 8 envs came to.
    ("task", "atol"),
    [
        (CartPole, 4e-6),
        (FreeCart, 4e-6),
        (TASKS["hopper"], 1e-4),
        (EllipticAnt, 2e-4),
        (EllipticAnymal, 2e-4),
        (EllipticHumanoid, 4e-4),
    ],
)
def test_each_control_step_is_that_of_native_physics(task, atol):
    """From equal states, along an episode with landings and limits."""
    warp, native = pair(task, 6)
    contacts, errors = 0, []
    for action in random_actions(native, 45):
        put(warp, native)
        ours, theirs = warp.step(action), native.step(action)
        contacts = max(contacts, int(warp._data.nacon.numpy()[0]))
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-6)
        assert torch.equal(ours[2], theirs[2])
        final = ours[4]["final_obs"], theirs[4]["final_obs"]
        errors.append((final[0] - final[1]).abs().amax(-1))
        if "goal" in ours[4]:
            assert torch.equal(ours[4]["goal"], theirs[4]["goal"])
    # Not in all envs and steps: a contact may begin one substep later, by rounding.
    assert (torch.stack(errors) < atol).float().mean() > 0.99
    assert (contacts > 0) == (task.name != "cartpole")


@needs_warp
@pytest.mark.parametrize("name", NAMES)
def test_episodes_run_alike_at_first(name):
    """As shipped, from the same resets, with nothing put right in between."""
    warp, native = pair(TASKS[name], 4, seed=1)
    native._qpos.copy_(warp._qpos)
    native._qvel.copy_(warp._qvel)
    native._obs = native._observe()
    torch.testing.assert_close(native._obs, warp._obs, rtol=0, atol=1e-6)
    for action in random_actions(native, 5):
        ours, theirs = warp.step(action), native.step(action)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-4)


@needs_warp
def test_the_ant_comes_to_stand_as_high():
    """As shipped, on its pyramids: it falls, lands and is carried."""
    warp, native = pair(TASKS["ant"], 2)
    put(native=native, warp=warp)
    for action in torch.zeros(60, 2, 8):
        warp.step(action)
        native.step(action)
    torch.testing.assert_close(warp._qpos[:, 2], native._qpos[:, 2].float(), rtol=0, atol=0.01)


class Recorder(TorchDispatchMode):
    """Names of the operations inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "index", "index_put", "item"}
WAITS |= {"index_put_", "_to_cpu", "pin_memory", "lift_fresh", "_unique2"}


@needs_warp
@pytest.mark.parametrize("name", NAMES)
def test_no_operation_of_the_step_waits_for_the_device(name):
    """As its capture needs it. Operations that read numbers, or copy from the host, show here."""
    env = make(name, 2, engine="mujoco_warp", max_episode_steps=2)
    for action in random_actions(env, 3):
        env._action.copy_(action)
        with Recorder() as recorder:
            env._control_step()
        used = {n.removeprefix("aten::") for n in recorder.names}
        assert {"copy_", "where", "masked_fill_", "clamp"} <= used, "recorded what it does"
        assert not used & WAITS


@needs_warp
def test_buffers_stay_where_they_are():
    env = make("hopper", 2, engine="mujoco_warp", max_episode_steps=2)
    fields = ("_qpos", "_qvel", "_ctrl", "_warmstart", "_time", "_action", "_obs", "_steps")

    def places():
        own = [getattr(env, name).data_ptr() for name in fields]
        assert own[:5] == [a.ptr for a in _warp_arrays(env)]
        return own + [x.data_ptr() for x in env._outputs.parts.values()]

    before = places()
    steps = [env.step(action) for action in random_actions(env, 4)]
    env.set_state(env.get_state())
    env.reset(seed=1)
    assert places() == before
    given = [x.data_ptr() for step in steps for x in flat(step)]
    assert not set(given) & set(before)


def _warp_arrays(env):
    data = env._data
    return data.qpos, data.qvel, data.ctrl, data.qacc_warmstart, data.time


@needs_warp
def test_what_the_model_can_have_is_what_there_is_room_for():
    env = make("ant", 3, engine="mujoco_warp")
    # A sphere and 12 capsules on the floor; pyramids of 4 rows, and 8 limits.
    assert env._data.naconmax == 3 * 25
    assert env._data.njmax == 108


MIXED = """<mujoco>
  <option cone="elliptic"/>
  <worldbody>
    <geom type="plane" size="1 1 1"/>
    <body name="a" pos="0 0 1">
      <freejoint/>
      <geom size=".1" condim="6"/>
      <geom size=".2"/>
    </body>
    <body pos="0 0 2"><joint frictionloss="1"/><geom type="box" size=".1 .1 .1"/></body>
    <body pos="0 0 9"><geom type="ellipsoid" size="1 1 1" contype="0" conaffinity="0"/></body>
  </worldbody>
  <equality><weld body1="a"/></equality>
</mujoco>"""


def test_most_contacts_and_rows():
    bounds = {
        "cartpole": (0, 1),
        "hopper": (8, 35),
        "ant": (25, 108),
        # A trunk and four knees, which are capsules, and four feet; no limits.
        "anymal": (14, 56),
        # 16 capsules, the head and the hands; 21 limits.
        "humanoid": (35, 161),
    }
    for name, expected in bounds.items():
        for variant in TASKS[name].variants:
            assert contacts_and_rows(TASKS[name](variant=variant).model()) == expected
    model = mujoco.MjModel.from_xml_string(MIXED)
    # Plane with 2 spheres and a box, the box with 2 spheres; 6 rows each; friction; the weld.
    assert contacts_and_rows(model) == (2 + 8 + 2, 12 * 6 + 1 + 7)


@needs_warp
@pytest.mark.parametrize(("name", "rows"), [("ant", 108), ("anymal", 56), ("humanoid", 161)])
def test_no_more_contacts_and_rows_than_bounded(name, rows):
    """Limp robots, thrown at the floor in every posture."""
    env = make(name, 12, engine="mujoco_warp")
    generator = torch.Generator().manual_seed(2)
    env._qpos[:, 2] = 0.35
    env._qpos[:, 3:7] = torch.nn.functional.normalize(torch.randn(12, 4, generator=generator))
    most = 0
    for action in torch.zeros(10, 12, env.task.action_dim):
        env.step(action)
        most = max(most, int(env._data.nefc.numpy().max()))
    assert 20 < most <= rows
    assert env._counters[2] == 0


@needs_warp
def test_dropped_contacts_are_reported():
    env = MujocoWarpEnv(TASKS["hopper"](), 2, device="cpu", max_contacts=1)
    place(env, 0, qpos_1=-0.1)
    place(env, 1, qpos_1=-0.1)
    with pytest.warns(RuntimeWarning, match=r"buffers overflowed \(.*NARROWPHASE.*\): contacts of"):
        for action in torch.zeros(3, 2, 3):
            env.step(action)
    env = MujocoWarpEnv(TASKS["hopper"](), 2, device="cpu", max_rows=5)
    place(env, 0, qpos_1=-0.1)
    with pytest.warns(RuntimeWarning, match="NEFC"):
        env.step(torch.zeros(2, 3))


@needs_warp
def test_a_closed_environment():
    env = make("cartpole", 2, engine="mujoco_warp")
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.step(torch.zeros(2, 1))


@needs_warp
def test_states_of_the_other_engine():
    warp, native = make("hopper", 2, engine="mujoco_warp"), make("hopper", 2)
    with pytest.raises(ValueError, match=r"of the physics engine mujoco, .* env.engine=mujoco "):
        warp.set_state(native.get_state())
    with pytest.raises(ValueError, match="of the physics engine mujoco_warp, this environment"):
        native.set_state(warp.get_state())
    old = {k: v for k, v in native.get_state().items() if k != "engine"}
    native.set_state(old)  # saved before there was another
    state = warp.get_state()
    with pytest.raises(ValueError, match="another kind of device"):
        warp.set_state({**state, "generator": state["generator"][:16]})


class Cuda:
    """Stands in for the parts of torch.cuda and Warp that the capture uses, and logs them."""

    def __init__(self, env, monkeypatch):
        self.env, self.log = env, []
        warp = env._wp
        self.warp = types.SimpleNamespace(
            ScopedStream=lambda stream, sync_enter: warp.ScopedDevice("cpu"),
            capture_begin=lambda stream, external: self.note(f"warp begins, external={external}"),
            capture_end=lambda stream: self.note("warp ends"),
        )
        stream = types.SimpleNamespace(
            device=env.device, wait_stream=lambda other: self.note("wait")
        )
        for name, value in {
            "current_stream": lambda device: stream,
            "stream": self.scope("stream"),
            "device": self.scope("device"),
            "graph": lambda graph, stream, capture_error_mode: self.scope("capture")(None),
            "MemPool": lambda: "memory",
            "use_mem_pool": lambda pool, device: self.scope(pool)(),
            "synchronize": lambda device: self.note("synchronize"),
            "CUDAGraph": lambda: self,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(env, "_wp", self.warp)
        monkeypatch.setattr(env, "_cuda_stream", stream)
        monkeypatch.setattr(env, "_warp_stream", stream, raising=False)

    def note(self, what):
        self.log.append(what)

    def scope(self, name):
        @contextlib.contextmanager
        def inside(*args):
            self.note(f"{name} {{")
            yield
            self.note(f"}} {name}")

        return inside

    def register_generator_state(self, generator):
        assert generator is self.env._generator
        self.note("generator known")

    def replay(self):
        self.note("replay")
        self.env._control_step()


@needs_warp
@pytest.mark.parametrize("collecting", [True, False])
def test_the_order_of_a_capture(collecting, monkeypatch):
    """On stand-ins: what has to come before, within and after it. The envs do not notice."""
    env = make("hopper", 2, engine="mujoco_warp", seed=3, max_episode_steps=2)
    twin = make("hopper", 2, engine="mujoco_warp", seed=3, max_episode_steps=2)
    cuda = Cuda(env, monkeypatch)
    advance = env._advance

    def logged():
        cuda.note(f"physics, collector {'on' if gc.isenabled() else 'off'}")
        advance()

    monkeypatch.setattr(env, "_advance", logged)
    monkeypatch.setattr(gc, "collect", lambda: cuda.note("collect"))
    on = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        env._capture()
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if on else gc.disable)()
    state = "on" if collecting else "off"
    eager = [f"physics, collector {state}"] * 2
    assert cuda.log == [
        *("wait", "stream {", *eager, "} stream", "wait", "synchronize"),
        *("generator known", "device {", "} device", "device {", "stream {", "collect"),
        *("capture {", "memory {", "warp begins, external=True", "physics, collector off"),
        *("warp ends", "} memory", "} capture", "} stream", "} device", "synchronize"),
    ]
    assert not env._counters.any()
    for action in random_actions(env, 5):
        assert same(env.step(action), twin.step(action))
    assert cuda.log.count("replay") == 5


@needs_warp
def test_a_capture_that_fails(monkeypatch):
    env = make("cartpole", 2, engine="mujoco_warp")
    cuda = Cuda(env, monkeypatch)
    control_step, calls = env._control_step, []

    def failing():
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("no capture of this")
        control_step()

    monkeypatch.setattr(env, "_control_step", failing)
    with pytest.raises(RuntimeError, match="no capture of this"):
        env._capture()
    assert "warp ends" in cuda.log, "Warp would hold the stream for capturing"
    assert gc.isenabled()
    assert env._graph is None


def test_packed():
    parts = {
        "a": ((3, 5), torch.float32),
        "b": ((3,), torch.bool),
        "c": ((2,), torch.int64),
        "none": ((0, 4), torch.float32),
    }
    packed = Packed(parts, torch.device("cpu"))
    for name, (shape, dtype) in parts.items():
        tensor = packed.parts[name]
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        tensor.fill_(1)
    copies = packed.snapshot()
    for name in parts:
        packed.parts[name].zero_()
        assert copies[name].bool().all()
        assert copies[name].dtype == parts[name][1]
    packed.parts["a"].fill_(math.pi)
    assert not packed.parts["b"].any()
    assert not packed.parts["c"].any()


def test_watch_on_a_cpu_sees_the_latest():
    counters = torch.zeros(2, dtype=torch.int64)
    watch = Watch(counters)
    assert watch.poll() == [0, 0]
    counters[1] = 3
    assert watch.poll() == watch.now() == [0, 3]


# --- with a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    return torch.device("cuda", torch.cuda.current_device())


def on_gpu(test):
    return pytest.mark.gpu(needs_gpu(needs_warp(test)))


@on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_captured_step_never_waits(name, gpu):
    env = make(name, 64, engine="mujoco_warp", device=gpu, max_episode_steps=7)
    assert env._graph is not None
    actions = random_actions(env, 200).to(gpu)
    env.step(actions[0])
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = [env.step(action) for action in actions]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(x.is_cuda for x in flat(steps[-1]))
    assert steps[-1][4]["episode"]["length"].tolist() == [(200 % 7) + 1] * 64


@on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_captured_step_is_the_eager_one(name, gpu):
    """Same resets to the bit; physics to the order of sums."""
    envs = [
        MujocoWarpEnv(TASKS[name](), 32, seed=3, max_episode_steps=3, device=gpu, graph=graph)
        for graph in (True, False)
    ]
    assert torch.equal(*(env._obs for env in envs))
    for i, action in enumerate(random_actions(envs[0], 9).to(gpu)):
        ours, theirs = (env.step(action) for env in envs)
        if i % 3 == 2:
            assert ours[3].all()
            assert torch.equal(ours[0], theirs[0]), "new episodes start alike"
        for a, b in zip(flat(ours), flat(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@on_gpu
@pytest.mark.parametrize("task", [TASKS["cartpole"], TASKS["hopper"], EllipticAnt])
def test_each_control_step_on_a_gpu_is_that_of_native_physics(task, gpu):
    warp, native = MujocoWarpEnv(task(), 16, device=gpu), MujocoEnv(task(), 16)
    errors = []
    for action in random_actions(native, 60):
        put(warp, native)
        ours, theirs = warp.step(action.to(gpu)), native.step(action)
        final = ours[4]["final_obs"].cpu(), theirs[4]["final_obs"]
        errors.append((final[0] - final[1]).abs().amax(-1))
        torch.testing.assert_close(ours[1].cpu(), theirs[1], rtol=1e-5, atol=1e-5)
    assert (torch.stack(errors) < 5e-4).float().mean() > 0.99


@on_gpu
def test_seeds_and_states_on_a_gpu(gpu):
    first = make("hopper", 16, engine="mujoco_warp", device=gpu, seed=5, max_episode_steps=4)
    second = make("hopper", 16, engine="mujoco_warp", device=gpu, seed=5, max_episode_steps=4)
    actions = random_actions(first, 12).to(gpu)
    assert torch.equal(first.reset(seed=9)[0], second.reset(seed=9)[0])
    state = first.get_state()
    starts = [first.step(action)[0] for action in actions][3::4]
    second.set_state(state)
    again = [second.step(action)[0] for action in actions][3::4]
    assert all(torch.equal(a, b) for a, b in zip(starts, again, strict=True))
    assert not torch.equal(starts[0], starts[1]), "replays draw new numbers"


@on_gpu
def test_the_graph_on_another_stream_and_beside_other_work(gpu):
    """Its memory is its own: what is allocated between replays does not disturb it."""
    env = make("ant", 16, engine="mujoco_warp", device=gpu, seed=1)
    other = make("ant", 16, engine="mujoco_warp", device=gpu, seed=1)
    stream = torch.cuda.Stream()
    for action in random_actions(env, 5).to(gpu):
        expected = other.step(action)
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.empty_cache()  # as another recording does
        with torch.cuda.stream(stream):
            noise = [torch.full((1000, n), math.nan, device=gpu) for n in (1, 37, 256, 4096)]
            ours = env.step(action)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.stream(env._cuda_stream):  # whose freed memory nobody else would get
            noise += [torch.full((size,), math.nan, device=gpu) for size in range(4, 4000, 16)]
        torch.cuda.current_stream().wait_stream(env._cuda_stream)
        for a, b in zip(flat(ours), flat(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        del noise


@on_gpu
def test_what_went_wrong_on_a_gpu_is_said_later(gpu):
    env = make("hopper", 4, engine="mujoco_warp", device=gpu)
    actions = torch.zeros(4, 3, device=gpu)
    before = env._obs.clone()
    actions[2, 1] = math.nan
    obs, reward, terminated, _, info = env.step(actions)
    assert terminated.tolist() == [False, False, True, False]
    assert torch.equal(info["final_obs"][2], before[2])
    assert torch.isfinite(obs).all()
    assert torch.isfinite(reward).all()
    place(env, 1, qvel_0=math.nan)
    actions.zero_()
    assert env.step(actions)[2].tolist() == [False, True, False, False]
    with pytest.warns(RuntimeWarning) as said:
        for _ in range(130):
            env.step(actions)
            torch.cuda.synchronize()
    texts = [str(w.message) for w in said]
    assert any("1 of 4 envs of hopper got an action that is not finite" in t for t in texts)
    assert any("diverged in 1 of 4 envs" in t for t in texts)


@on_gpu
def test_every_env_on_a_second_gpu(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    second = torch.device("cuda", 1)
    env = make("hopper", 8, engine="mujoco_warp", device=second)
    step = env.step(random_actions(env, 1)[0].to(second))
    assert all(x.device == second for x in flat(step))


@on_gpu
def test_one_seed_gives_one_run_of_an_env_on_a_gpu(gpu):
    """Repetitions of the same actions agree while rounding has not grown."""
    runs = []
    for _ in range(2):
        env = make("cartpole", 8, engine="mujoco_warp", device=gpu, seed=2)
        runs.append([env.step(action) for action in random_actions(env, 20).to(gpu)])
    for a, b in zip(*runs, strict=True):
        assert same(a, b) or all(
            torch.allclose(x, y, atol=1e-4) for x, y in zip(flat(a), flat(b), strict=True)
        )
