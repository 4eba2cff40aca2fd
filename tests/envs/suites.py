"""dm_control's suite, where it can be had."""

from __future__ import annotations

import warnings
from typing import Any

import pytest


def dm_control_suite() -> Any:
    """``dm_control.suite``; skips the test, or the module that is imported, where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a machine without a display
        suite = pytest.importorskip("dm_control.suite", reason="needs pip install 'pwm-fast[dmc]'")
    try:
        suite.load("cartpole", "swingup")
    except AttributeError:
        pytest.skip(
            "this dm-control does not work with this MuJoCo: needs pip install 'pwm-fast[dmc]'",
            allow_module_level=True,
        )
    return suite
