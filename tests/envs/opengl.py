"""OpenGL without a screen, where it can be had."""

from __future__ import annotations

import pytest

from pwm_fast.envs import _gl
from pwm_fast.envs.protocol import CannotRender


def opengl() -> None:
    """Choose what MuJoCo draws with; skips the test where nothing can."""
    pytest.importorskip("mujoco", reason="needs pip install 'pwm-fast[train]'")
    try:
        _gl.context(16, 16).free()
    except CannotRender as error:
        pytest.skip(str(error))
