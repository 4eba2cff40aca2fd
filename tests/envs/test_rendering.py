"""Pictures of envs: of the right size, of what happens, and without a trace in the physics."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pwm_fast.envs import TASKS, CannotRender, OfflineEnv, TorchVectorEnv, VectorEnv, _gl, make
from pwm_fast.envs import _rendering as rendering
from pwm_fast.envs.gymnasium_adapter import GymnasiumEnv
from pwm_fast.envs.protocol import viewer_of
from tests.envs.opengl import opengl
from tests.envs.suites import dm_control_suite
from tests.envs.torch_envs import Carts

pytest.importorskip("mujoco.batch", reason="needs pip install 'pwm-fast[train]'")

ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT = 96, 64


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MUJOCO_GL is what it was after the test, and what works is looked for anew."""
    monkeypatch.setenv(_gl.VARIABLE, "")
    _gl.why_not.cache_clear()
    yield
    _gl.why_not.cache_clear()


@pytest.fixture
def drawn() -> None:
    opengl()


def frames(env: VectorEnv, *which: int) -> list[np.ndarray]:
    with closing(viewer_of(env, WIDTH, HEIGHT)) as viewer:
        found = [viewer.frame(i) for i in which]
    for frame in found:
        assert (frame.shape, frame.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
        assert frame.std() > 8, "nothing is to be seen"
    return found


def step(env: VectorEnv, times: int = 1) -> list[torch.Tensor]:
    action = torch.linspace(-1, 1, env.num_envs * env.single_action_space.shape[0])
    return [env.step(action.reshape(env.num_envs, -1))[0] for _ in range(times)]


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((np.abs(one.astype(int) - other) > 20).any())


# --- robots ---------------------------------------------------------------------------------------


def robot_pixels(frame: np.ndarray) -> np.ndarray:
    """Rows and columns of what is orange."""
    red, _, blue = frame.astype(int).transpose(2, 0, 1)
    return np.argwhere(red > blue + 50)


@pytest.mark.parametrize("name", TASKS)
def test_a_robot_is_seen_and_followed(name: str, drawn: None) -> None:
    env = make(name, 2)
    env._qpos[1] = env._qpos[0]  # type: ignore[attr-defined]
    env._qpos[1, 0] += 3.5 if name == "cartpole" else 40.25  # type: ignore[attr-defined]
    first, far = frames(env, 0, 1)
    for frame in (first, far):
        seen = robot_pixels(frame)
        assert len(seen) > 0.005 * WIDTH * HEIGHT
        assert abs(seen[:, 1].mean() - WIDTH / 2) < WIDTH / 6, "in the middle"
        assert frame[0].mean() > frame[-1].mean() + 50, "the sky is above"
    assert differ(first, far), "the floor stays behind"
    assert viewer_of(env, WIDTH, HEIGHT).step_seconds == pytest.approx(1 / 60)


def test_pictures_follow_the_state_and_leave_it_alone(drawn: None) -> None:
    watched, plain = make("ant", 2, seed=3), make("ant", 2, seed=3)
    with closing(viewer_of(watched, WIDTH, HEIGHT)) as viewer:
        before = viewer.frame(1)
        assert not differ(before, viewer.frame(1))
        for _ in range(8):
            found, expected = step(watched), step(plain)
            assert torch.equal(found[0], expected[0])
            viewer.frame(0)
        assert differ(before, viewer.frame(1))
    state, other = watched.get_state(), plain.get_state()
    assert torch.equal(state["physics"], other["physics"])


def test_a_robot_needs_neither_names_nor_a_floor(
    drawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its root has no name, nothing lies under it, and its slide has no limit."""
    model = """<mujoco><worldbody><body><joint name="s" type="slide" axis="1 0 0"/>
        <geom type="box" size=".2 .2 .2"/></body></worldbody>
        <actuator><motor joint="s"/></actuator></mujoco>"""
    task = TASKS["cartpole"]()
    monkeypatch.setattr(task, "mjcf", lambda: model)
    qpos = torch.tensor([[0.0], [7.0]], dtype=torch.float64)
    with closing(rendering.of_robot(task, qpos, WIDTH, HEIGHT)) as viewer:
        assert len(robot_pixels(viewer.frame(0))) > 50
        assert len(robot_pixels(viewer.frame(1))) > 50


def test_a_closed_viewer_may_be_closed_again(drawn: None) -> None:
    viewer = viewer_of(make("cartpole", 1), WIDTH, HEIGHT)
    viewer.frame(0)
    viewer.close()
    viewer.close()


# --- other libraries ------------------------------------------------------------------------------


def test_dm_control(drawn: None) -> None:
    dm_control_suite()
    watched, plain = (make("dmc", 2, seed=5, domain="walker", task="walk") for _ in range(2))
    model = watched._envs[0].physics.model  # type: ignore[attr-defined]
    size = model.vis.global_.offwidth, model.vis.global_.offheight
    with closing(viewer_of(watched, 704, 512)) as viewer:  # above the model's own buffer
        assert viewer.step_seconds == pytest.approx(0.05), "two repeats of 0.025 s"
        assert viewer.frame(0).shape == (512, 704, 3)
    assert (model.vis.global_.offwidth, model.vis.global_.offheight) == size
    before = frames(watched, 0, 1)
    assert differ(*before)
    alone = [frames(watched, i)[0] for i in (0, 1)]
    assert np.array_equal(before, alone), "nothing of one is in the other's picture"
    assert np.array_equal(frames(watched, 1, 0, 1, 0)[2:], alone[::-1])
    for _ in range(10):
        assert torch.equal(step(watched)[0], step(plain)[0])
    assert differ(before[0], frames(watched, 0)[0])


def test_tasks_side_by_side(drawn: None) -> None:
    dm_control_suite()
    tasks = ["walker-walk", "cheetah-run"]
    env = make("dmc_tasks", 4, tasks=tasks, seed=1)
    found = frames(env, 0, 1, 2, 3)
    parts = [frames(part, 0, 1) for part in env._parts]  # type: ignore[attr-defined]
    expected = [parts[0][0], parts[1][0], parts[0][1], parts[1][1]]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert viewer_of(env, WIDTH, HEIGHT).step_seconds == pytest.approx(0.05)
    env.close()


def test_gymnasium_mujoco(drawn: None) -> None:
    pytest.importorskip("gymnasium.envs.mujoco", reason="needs pip install 'pwm-fast[gym]'")
    env = make("gym", 2, id="Hopper-v5", kwargs={"render_mode": "rgb_array"})
    viewer = viewer_of(env, WIDTH, HEIGHT)
    assert viewer.step_seconds == pytest.approx(1 / 125)
    before = frames(env, 1)[0]
    assert (before[:, : (WIDTH - HEIGHT) // 2 - 1] == 0).all(), "a square within black"
    step(env, 20)
    assert differ(before, frames(env, 1)[0])
    env.close()


def test_gymnasium_without_pictures() -> None:
    gymnasium = pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")
    pytest.importorskip("PIL")
    none = pytest.raises(CannotRender, match=r"Pendulum.*render_mode=rgb_array, got None")
    with closing(make("gym", 1, id="Pendulum-v1")) as env, none:
        viewer_of(env, WIDTH, HEIGHT).frame(0)
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    apart = gymnasium.vector.AsyncVectorEnv(
        [lambda: gymnasium.make("Pendulum-v1")], autoreset_mode=mode
    )
    refused = pytest.raises(CannotRender, match="AsyncVectorEnv cannot be rendered one by one")
    with closing(GymnasiumEnv(apart, max_episode_steps=200)) as env, refused:
        viewer_of(env, WIDTH, HEIGHT)


class Painted(Carts):
    """Shows what it is given, and draws a random number as it does."""

    step_dt = 0.02
    picture: Any = None

    def render(self) -> Any:
        torch.rand(1)
        return self.picture


def test_batched_torch_environments() -> None:
    pytest.importorskip("PIL")
    base = Painted(2, auto_reset=False)
    env = TorchVectorEnv(base)
    viewer = viewer_of(env, WIDTH, HEIGHT)
    assert viewer.step_seconds == 0.02
    base.picture = torch.full((HEIGHT, WIDTH, 3), 7, dtype=torch.uint8)
    random = torch.get_rng_state()
    frame = viewer.frame(0)
    assert frame.shape == (HEIGHT, WIDTH, 3) and (frame == 7).all()
    assert torch.equal(torch.get_rng_state(), random), "its random numbers are not the process's"
    base.picture = np.full((HEIGHT, HEIGHT, 3), 9, dtype=np.uint8)
    frame = viewer.frame(0)
    assert frame.shape == (HEIGHT, WIDTH, 3)
    assert (frame[:, WIDTH // 2] == 9).all() and (frame[:, 0] == 0).all()
    with pytest.raises(CannotRender, match="not of one env"):
        viewer.frame(1)
    for wrong in (None, "a picture", np.zeros((4, 4, 3)), np.zeros((4, 4), dtype=np.uint8)):
        base.picture = wrong
        with pytest.raises(CannotRender, match="Painted: render\\(\\) must give a picture"):
            viewer.frame(0)


def test_what_shows_no_pictures() -> None:
    with pytest.raises(CannotRender, match=r"Carts shows no pictures: it has no render\(\)"):
        viewer_of(TorchVectorEnv(Carts(2, auto_reset=False)), WIDTH, HEIGHT)
    offline = OfflineEnv(1, obs_dim=2, action_dim=1, max_episode_steps=3, rows=4)
    with pytest.raises(CannotRender, match="OfflineEnv shows no pictures"):
        viewer_of(offline, WIDTH, HEIGHT)


# --- OpenGL ---------------------------------------------------------------------------------------


def test_triton_can_be_loaded_afterwards(drawn: None) -> None:
    """As training does, after the first film: it is loaded before, for Mesa has an LLVM, too."""
    pytest.importorskip("triton")
    code = "from pwm_fast.envs import _gl\n_gl.context(16, 16).free()\nimport triton"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def probe(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(_gl, "_PROBE", code)


def test_the_first_that_works(variable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(monkeypatch, "import os; assert '{name}' == os.environ['MUJOCO_GL'] == 'osmesa'")
    _gl.choose()
    assert os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "")
    _gl.why_not.cache_clear()
    probe(monkeypatch, "")
    _gl.choose()
    assert os.environ["MUJOCO_GL"] == "egl"


def test_what_the_user_set_stays(variable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    probe(monkeypatch, "")
    _gl.choose()
    assert os.environ["MUJOCO_GL"] == "glfw"


def test_without_opengl(variable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(monkeypatch, "raise ImportError('no {name} here')")
    expected = "egl: ImportError: no egl here; osmesa: ImportError: no osmesa here.*apt-get install"
    with pytest.raises(CannotRender, match=expected):
        viewer_of(make("cartpole", 1), WIDTH, HEIGHT)
    assert not os.environ["MUJOCO_GL"]


def test_opengl_that_crashes_or_hangs(variable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(monkeypatch, "import os; os._exit(11)")
    assert _gl.why_not("egl") == "exit status 11"
    probe(monkeypatch, "import time; time.sleep(9)")
    monkeypatch.setattr(_gl, "PROBE_SECONDS", 0.05)
    assert _gl.why_not("osmesa") == "no answer within 0 s"


@pytest.mark.parametrize("name", ["egl", "osmesa", "off"])
def test_what_the_user_set_does_not_work(
    name: str, variable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUJOCO_GL", name)

    def missing(module: str) -> Any:
        assert module == ("mujoco" if name == "off" else f"mujoco.{name}")
        raise ImportError("libGL.so.1 is missing")

    monkeypatch.setattr(_gl, "import_module", missing)
    expected = f"MUJOCO_GL={name}: ImportError: libGL.so.1 is missing.*unset MUJOCO_GL"
    with pytest.raises(CannotRender, match=expected):
        viewer_of(make("cartpole", 1), WIDTH, HEIGHT)
