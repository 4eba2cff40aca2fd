"""What Triton asks of a CUDA driver where there is none, so that launches take their real path.

:func:`binding` takes a launch through the function that Triton generates from the kernel's
arguments, their specialisation and the check of its options, up to where it would be compiled.
:func:`launching` takes it all the way: compiled through Triton's cache, loaded, and given to
``cuLaunchKernelEx`` by Triton's own driver and C launcher. Only the library that these call is not
NVIDIA's but ``fake_libcuda.c``: it reads what it loads, refuses what a driver refuses, keeps a
record (:func:`last_launch`), and runs nothing. It takes a C compiler, as Triton does on a GPU.

Both are of Triton 3.6 and 3.7, by what they have of a public face (``triton.knobs``), but for
``triton.runtime.driver``'s ``_active`` and the names of ``triton.backends.nvidia.driver``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.driver import GPUDriver
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

ORDINAL = 1 << 20  # no real device's: what Triton keeps for those stays as it is
_SOURCE = Path(__file__).with_name("fake_libcuda.c")


class NoLauncherError(RuntimeError):
    """Triton's C launcher cannot be built or called here; the message says why."""


class Launch(ctypes.Structure):
    """What reached ``cuLaunchKernelEx``, and what the kernel's cubin says of itself.

    Attributes:
        function: the kernel's handle.
        grid: programs.
        block: threads of a program.
        shared: bytes of shared memory of a program.
        cooperative: 1 if all programs must be resident at once.
        parameters: that the cubin has.
        bytes: of all of them.
        registers: of a thread.
        refusal: why it was refused, or empty.
        values: the parameters as the kernel finds them, ``bytes`` of them.
    """

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
        ("values", ctypes.c_ubyte * 4096),
    )


def binding(capability: tuple[int, int]) -> AbstractContextManager[None]:
    """Launches on such a device end where they would be compiled, and return None."""
    return _active(_driver(capability, False), knobs.runtime, jit_cache_hook=lambda **_: True)


def launching(
    capability: tuple[int, int], loaded: Callable[[str, bool], None]
) -> AbstractContextManager[None]:
    """Launches are compiled for such a device and made, and nothing runs.

    Args:
        capability: of the device.
        loaded: called with the name of each kernel that this process had not loaded before, and
            with whether it had to be compiled, as it was not in Triton's cache.

    Raises:
        NoLauncherError: there is no C compiler, or there is a GPU.
    """

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        loaded(src.name, not cache_hit)

    return _active(_driver(capability, True), knobs.compilation, listener=listen)


def why_not() -> str | None:
    """Why nothing can be launched here, in words; None if it can."""
    try:
        _library()
    except NoLauncherError as error:
        return str(error)
    return None


def last_launch() -> Launch:
    """The last one that was made, or refused."""
    return Launch.from_buffer_copy(Launch.in_dll(_library(), "last_launch"))


@contextmanager
def _active(chosen: Any, group: Any, **settings: Any) -> Iterator[None]:
    """A driver in force, with settings of one group of Triton's knobs."""
    with mock.patch.object(driver, "_active", chosen), group.scope():
        for name, value in settings.items():
            setattr(group, name, value)
        yield


class _Driver(nvidia.CudaDriver):
    """Triton's driver, told of the device that PyTorch does not find."""

    def __init__(self, capability: tuple[int, int], library: Path | None) -> None:
        if library is None:
            GPUDriver.__init__(self)  # without the C part: nothing is launched
        else:
            with knobs.nvidia.scope():
                knobs.nvidia.libcuda_path = str(library.parent)
                super().__init__()
        self.get_device_capability = lambda device: capability
        self.get_current_device = lambda: ORDINAL
        self.get_current_stream = lambda device: 0


@functools.lru_cache
def _driver(capability: tuple[int, int], launches: bool) -> Any:
    return _Driver(capability, Path(_library()._name) if launches else None)


@functools.lru_cache
def _library() -> ctypes.CDLL:
    """The stand-in for ``libcuda.so.1``, built and loaded, for the life of the process."""
    if torch.cuda.is_available():  # asked first, PyTorch does not look at the stand-in later
        raise NoLauncherError("there is a GPU, for which this would stand in")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoLauncherError("Triton's launcher needs a C compiler: install gcc, or set CC")
    path = Path(_folder().name) / "libcuda.so.1"
    command = [compiler, "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(_SOURCE)]
    command += [f"-I{each}" for each in nvidia.include_dirs]
    done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoLauncherError(f"{compiler} does not compile {_SOURCE.name}:\n{done.stderr}")
    library = ctypes.CDLL(str(path))
    # By that name the launcher finds what was loaded first.
    if not hasattr(ctypes.CDLL("libcuda.so.1"), "last_launch"):
        raise NoLauncherError("NVIDIA's libcuda.so.1 is loaded already")
    return library


@functools.lru_cache
def _folder() -> Any:
    return tempfile.TemporaryDirectory(prefix="fake-libcuda-")
