"""Which engine is chosen, what is said of it, and what is missing by name."""

import sys

import pytest
import torch

from pwm_fast.envs import MujocoEnv, MujocoWarpEnv, choose, engines, make
from tests.envs.engines import needs_warp

pytest.importorskip("mujoco.batch", reason="needs pip install 'pwm-fast[train]'")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def usable(monkeypatch):
    """As if mujoco-warp ran on the GPU."""
    monkeypatch.setattr(engines, "why_unusable", lambda device: None)


def test_a_cpu_gets_native_physics(monkeypatch):
    def never(device):
        raise AssertionError("nothing looks for Warp on a CPU")

    monkeypatch.setattr(engines, "why_unusable", never)
    for engine in ("auto", "mujoco"):
        chosen = choose(engine, CPU)
        assert (chosen.name, chosen.device, chosen.why_not_gpu) == ("mujoco", CPU, "")
    assert choose("mujoco", GPU).device == CPU
    assert chosen.describe(1) == "physics: mujoco on the CPU (1 thread)"
    assert chosen.describe(4) == "physics: mujoco on the CPU (4 threads)"
    assert type(make("hopper", 2)) is MujocoEnv


def test_a_gpu_gets_mujoco_warp(usable):
    for engine in ("auto", "mujoco_warp"):
        chosen = choose(engine, GPU)
        assert (chosen.name, chosen.device) == ("mujoco_warp", GPU)
        assert chosen.describe() == "physics: mujoco_warp on cuda:1"


def test_a_gpu_without_the_extra_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    chosen = choose("auto", GPU)
    assert (chosen.name, chosen.device) == ("mujoco", CPU)
    if sys.version_info >= (3, 11):
        said = chosen.describe(2)
        assert said.startswith("physics: mujoco on the CPU (2 threads); not on the GPU: ")
        assert "mujoco_warp not installed: pip install 'pwm-fast[gpu]'" in said
        with pytest.raises(ImportError, match=r"env.engine=mujoco_warp .* pip install 'pwm-fast"):
            make("ant", 2, engine="mujoco_warp", device="cpu")


def test_python_3_10_has_no_mujoco_warp(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 14, "final", 0))
    assert "Python 3.11 or newer, this is 3.10.14" in choose("auto", GPU).describe()
    with pytest.raises(ImportError, match=r"needs Python 3\.11 or newer, this is 3\.10\.14"):
        choose("mujoco_warp", CPU)


def test_deterministic_runs_stay_on_the_cpu_unless_told(usable):
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic=true" in choose("auto", GPU).describe()
        assert choose("mujoco_warp", GPU).name == "mujoco_warp"
    finally:
        torch.use_deterministic_algorithms(False)


@needs_warp
def test_threads_are_of_native_physics():
    with pytest.raises(ValueError, match=r"env\.threads must be 1 for env\.engine=mujoco_warp"):
        make("ant", 2, engine="mujoco_warp", threads=2)


@needs_warp
def test_mujoco_warp_on_the_cpu_where_asked_for():
    env = make("hopper", 2, engine="mujoco_warp")
    assert type(env) is MujocoWarpEnv
    assert env.device == CPU
