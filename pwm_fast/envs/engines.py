"""Which physics engine steps the built-in robots: native MuJoCo's threads or mujoco-warp."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch

ENGINES = ("auto", "mujoco", "mujoco_warp")
WARP_NEEDS_PYTHON = (3, 11)


@dataclass(frozen=True)
class Engine:
    """An engine, and where it runs.

    Attributes:
        name: ``mujoco`` or ``mujoco_warp``.
        device: where states and observations live.
        why_not_gpu: where ``auto`` had a GPU and did not take it, the reason; else empty.
    """

    name: str
    device: torch.device
    why_not_gpu: str = ""

    def describe(self, threads: int = 1) -> str:
        """One line for the user.

        Args:
            threads: physics threads, of ``mujoco`` alone.
        """
        if self.name == "mujoco_warp":
            return f"physics: mujoco_warp on {self.device}"
        plural = "" if threads == 1 else "s"
        line = f"physics: mujoco on the CPU ({threads} thread{plural})"
        return f"{line}; not on the GPU: {self.why_not_gpu}" if self.why_not_gpu else line


def choose(engine: str, device: torch.device) -> Engine:
    """The engine that ``env.engine`` means for an agent on ``device``.

    ``auto`` takes mujoco-warp where the device is a CUDA GPU and mujoco-warp can run on it, unless
    torch has to be deterministic; everywhere else native MuJoCo. ``mujoco_warp`` also runs on the
    CPU, where it is slow: for tests.

    Raises:
        ValueError: another name.
        ImportError: ``mujoco_warp`` was asked for and cannot run here.
    """
    if engine not in ENGINES:
        raise ValueError(f"env.engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    native = Engine("mujoco", torch.device("cpu"))
    if engine == "mujoco" or (engine == "auto" and device.type != "cuda"):
        return native
    reason = why_unusable(device)
    if engine == "mujoco_warp":
        if reason is not None:
            raise ImportError(f"env.engine=mujoco_warp cannot run: {reason}")
        return Engine("mujoco_warp", device)
    if reason is None and torch.are_deterministic_algorithms_enabled():
        reason = "deterministic=true, and mujoco-warp's sums have no fixed order by default"
    if reason is None:
        return Engine("mujoco_warp", device)
    return Engine("mujoco", torch.device("cpu"), reason)


def why_unusable(device: torch.device) -> str | None:
    """Why mujoco-warp cannot run on ``device``; None where it can."""
    if sys.version_info[:2] < WARP_NEEDS_PYTHON:
        have = ".".join(str(n) for n in sys.version_info[:3])
        return f"mujoco-warp needs Python 3.11 or newer, this is {have}"
    missing = [name for name in ("warp", "mujoco_warp") if not _installed(name)]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'pwm-fast[gpu]'"
    if device.type != "cuda":
        return None
    warp = import_warp()
    if not warp.is_cuda_available():
        return "Warp sees no CUDA driver"
    if not warp.is_conditional_graph_supported():
        return "the loops in its CUDA graph need a driver for CUDA 12.4 or newer"
    if not warp.is_mempool_supported(warp.device_from_torch(device)):
        return f"{device} has no stream-ordered memory, which its CUDA graph needs"
    return None


def import_warp() -> ModuleType:
    """Warp, ready; quiet unless the program uses it for something else already."""
    first = "warp" not in sys.modules
    import warp

    if first:
        warp.config.log_level = warp.LOG_WARNING  # else it reports every kernel, on stdout
    warp.init()
    return warp


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # None in sys.modules
        return False
