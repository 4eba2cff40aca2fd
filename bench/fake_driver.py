"""What Triton asks of a CUDA driver where there is none, so that launches take their whole path.

:func:`binding` takes a launch through the function that Triton generates of a kernel's arguments,
their specialisation and the check of its options, up to where it would be compiled.
:func:`launching` takes it all the way: compiled for :data:`~bench.fake_cuda.PROPERTIES`' H100
through Triton's cache, loaded, and given to ``cuLaunchKernelEx`` by Triton's own driver and its
C launcher. The library that they call is ``fake_libcuda.c``, which loads and checks, and runs
nothing. The cache has then what a GPU's process would put there (see docs/kernels.md).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor
from triton import knobs
from triton.backends.driver import GPUDriver
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

MEMORY = 1 << 56  # addresses from here on are the fake device's, as fake_libcuda.c has it
ORDINAL = 1 << 20  # no device's: what is kept by device for a real one stays as it is
_ALIGNED = 512  # as PyTorch's allocator aligns what it hands out
_SOURCE = Path(__file__).with_name("fake_libcuda.c")


class NoLauncherError(RuntimeError):
    """The C launcher cannot be built or called here; the message says why."""


class Launch(ctypes.Structure):
    """What reached ``cuLaunchKernelEx`` last, and what the kernel's cubin says."""

    _fields_ = (
        ("function", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("cooperative", ctypes.c_uint32),
        ("parameters", ctypes.c_uint32),
        ("bytes", ctypes.c_uint32),
        ("registers", ctypes.c_int32),
        ("refusal", ctypes.c_char * 128),
    )


def address(tensor: Tensor) -> int:
    """Where a fake tensor's data would lie; its storage at a multiple of 512, as on a GPU."""
    if tensor.numel() == 0:
        return 0
    storage = tensor.untyped_storage()._cdata  # an address, so no other storage's
    return MEMORY + storage * _ALIGNED + tensor.storage_offset() * tensor.element_size()


class _Driver(nvidia.CudaDriver):
    """Triton's driver, told of the device."""

    def __init__(self, capability: tuple[int, int], library: Path | None) -> None:
        if library is None:
            GPUDriver.__init__(self)
        else:
            with knobs.nvidia.scope():
                knobs.nvidia.libcuda_path = str(library.parent)
                super().__init__()
        self.get_device_capability = lambda device: capability
        self.get_current_device = lambda: ORDINAL
        self.get_current_stream = lambda device: 0


@functools.lru_cache
def _library() -> Any:
    """The built and loaded ``libcuda.so.1``, for the life of the process."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoLauncherError("no C compiler, which Triton needs for its launcher: set CC")
    folder = tempfile.TemporaryDirectory(prefix="fake-libcuda-")
    path = Path(folder.name) / "libcuda.so.1"
    command = [compiler, "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(_SOURCE)]
    command += [f"-I{each}" for each in nvidia.include_dirs]
    done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoLauncherError(f"{compiler} does not build {_SOURCE.name}:\n{done.stderr}")
    ctypes.CDLL(str(path))
    library = ctypes.CDLL("libcuda.so.1")  # by its name, as the launcher will
    if not hasattr(library, "last_launch"):
        raise NoLauncherError("this process has loaded NVIDIA's libcuda.so.1")
    library.folder = folder
    return library


@functools.lru_cache
def _drivers(capability: tuple[int, int], launches: bool) -> Any:
    if not launches:
        return _Driver(capability, None)
    return _Driver(capability, Path(_library().folder.name) / "libcuda.so.1")


@contextmanager
def binding(capability: tuple[int, int]) -> Iterator[None]:
    """Launches end where they would be compiled: the kernel is bound, and nothing else."""
    with _active(_drivers(capability, False)), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = lambda **_: True
        yield


@contextmanager
def launching(
    capability: tuple[int, int], compiled: Callable[[str, bool], None]
) -> Iterator[Callable[[], Launch]]:
    """Launches are compiled and made, on a device that runs nothing.

    Args:
        capability: of the device.
        compiled: called with the kernel's name and whether it lay in Triton's cache already, once
            for each kernel that this process has not loaded yet.

    Yields:
        what the last launch was.

    Raises:
        NoLauncherError: no C compiler, or a real driver is in the way.
    """
    library = _library()

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        compiled(src.name, cache_hit)

    with _active(_drivers(capability, True)), knobs.compilation.scope():
        knobs.compilation.listener = listen
        yield lambda: Launch.from_buffer_copy(Launch.in_dll(library, "last_launch"))


def _active(chosen: Any) -> Any:
    return mock.patch.object(driver, "_active", chosen)
