"""A kernel has one key in Triton's cache, whatever was launched before it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")

KEYS = """
import json, sys
from pwm_fast.kernels.launch import settle
from tests.compile import report

cases = [case for module in report.modules() for case in report.cases_of(module)]
functions = {case.fn.fn.__qualname__: case.fn for case in cases}
for name in sorted(functions, reverse=sys.argv[1] == "reverse"):
    settle(functions[name])
print(json.dumps({name: functions[name].cache_key for name in sorted(functions)}))
"""


def keys(order: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", KEYS, order], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_keys_do_not_depend_on_the_order_of_launches() -> None:
    found = keys("forward")
    assert {"linear_axpby_kernel", "linear_norm_act_fwd_kernel"} <= set(found)
    assert found == keys("reverse")
