"""Which OpenGL MuJoCo draws with where there is no screen."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from typing import Any

from pwm_fast.envs import _answers
from pwm_fast.envs.protocol import CannotRender

VARIABLE = "MUJOCO_GL"  # MuJoCo's, Gymnasium's and dm_control's
OFF_SCREEN = ("egl", "osmesa")  # that need no screen on Linux, in the order they are tried
# PyOpenGL's EGL takes glGetError from libOpenGL.
INSTALL = (
    "apt-get install libegl1 libopengl0 libgl1-mesa-dri (or libosmesa6), or a GPU's driver with EGL"
)
PROBE_SECONDS = 60.0
_PROBE = """\
import mujoco
from mujoco.{name} import GLContext
gl = GLContext(16, 16)
gl.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), 150).free()
gl.free()
"""


def choose() -> None:
    """Set MUJOCO_GL, where it is not set, to what works here without a screen, if anything does.

    Gymnasium's and dm_control's renderers read it, too, the latter when it is imported. To be
    called before anything draws.
    """
    # Mesa draws on a CPU with an LLVM, and Triton, which torch's optimisers import, has another.
    # They do not get on in every order (triton 3.7.1, Mesa 22.3.6): Triton comes first.
    with suppress(Exception):
        import_module("triton")
    if sys.platform == "linux" and not os.environ.get(VARIABLE):
        found = next((name for name in OFF_SCREEN if why_not(name) is None), None)
        if found is not None:
            os.environ[VARIABLE] = found


@functools.cache
def why_not(name: str) -> str | None:
    """Why ``egl`` or ``osmesa`` cannot draw here; None where it can.

    It is tried in a process of its own: a driver may crash, and a failed EGL keeps OSMesa out.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE.format(name=name)],
            env={**os.environ, VARIABLE: name},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_SECONDS:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def context(width: int, height: int) -> Any:
    """A new GL context for pictures of up to that many pixels, current in this thread.

    Raises:
        CannotRender: there is none here; the message says what was tried.
    """
    choose()
    name = os.environ.get(VARIABLE, "").strip().lower()
    if not name and sys.platform == "linux":
        tried = "; ".join(f"{given}: {why_not(given)}" for given in OFF_SCREEN)
        raise CannotRender(f"there is no OpenGL to draw with ({tried}): {INSTALL}")
    try:
        # Not mujoco.Renderer, whose backend is fixed when MuJoCo is first imported.
        own = {"egl", "glfw", "osmesa"} & {name}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GLFW's, without a screen
            module = import_module(f"mujoco.{name}" if own else "mujoco")
            made = module.GLContext(width, height)
            made.make_current()
    except Exception as error:  # what a missing library raises is of any kind
        raise unusable(error) from error
    return made


def unusable(error: Exception) -> CannotRender:
    """What to raise where the OpenGL that MUJOCO_GL names fails."""
    return CannotRender(
        f"there is no OpenGL to draw with ({VARIABLE}={os.environ.get(VARIABLE, '')}: "
        f"{_answers.said(error)}): {INSTALL}; unset {VARIABLE} to have one chosen"
    )
