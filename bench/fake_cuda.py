"""A CUDA device without one: what would be launched on it, and where the host would wait.

The code runs as it would on a GPU, on PyTorch's fake tensors: they have a shape and a device, and
no data. What needs data fails: asking for a value, or a shape that depends on values. What mixes
the host's memory with the device's fails too. The fused operators are opened, so that what happens
inside is seen, and Triton's kernels are counted where they are launched.

``FakeCuda()`` takes each launch of a Triton kernel through the function that Triton generates for
it, the specialisation of its arguments and the check of its options, and ends where it would be
compiled. ``FakeCuda(compile=True)`` takes it all the way: compiled for sm_90 into Triton's cache
(``TRITON_CACHE_DIR``), under the keys that a process with an H100 looks up, then through Triton's C
launcher into a driver that runs nothing (:mod:`bench.fake_driver`). Then ``loaded`` counts by name
what this process had not launched before, and ``compiled`` what was not in the cache.

A PyTorch without CUDA lacks three things that are made up here while a :class:`FakeCuda` is active:
the guard that switches CUDA devices (the CPU's, which does nothing, takes its place), streams for
the autograd engine (it is told that tensors are on ``meta``, where it needs none), and the device's
properties (those of :data:`PROPERTIES`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import warnings
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.internals import weight_cache

DEVICE = torch.device("cuda:0")
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
WAITING = {"item", "equal", "allclose", "is_nonzero", "embedding_renorm_", "multinomial"}
# Operators without a kernel that no schema tells from those with one.
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_reshape_alias"}
# torch's multi-tensor kernels: tensors a launch by the number of lists; blocks and chunk of one.
TENSORS, BLOCKS, CHUNK = (110, 64, 48, 36, 30), 320, 65536
# Addresses of the device, as fake_libcuda.c knows, and how PyTorch's allocator aligns on a GPU.
MEMORY, ALIGNMENT = 1 << 56, 512


class HostSyncError(AssertionError):
    """The host would wait for the device, or copy to or from it."""


class FakeCuda(TorchDispatchMode):
    """Active as a context; ``launches`` counts by the operator's or the Triton kernel's name.

    An operator counts as one launch, whatever it takes on the device (a sort takes several), except
    that those on lists of tensors count as often as torch launches them.

    Args:
        compile: Triton's kernels are compiled and launched.

    Raises:
        NoLauncherError: they cannot be (when it becomes active).
    """

    def __init__(self, compile: bool = False) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.loaded: Counter[str] = Counter()
        self.compiled: Counter[str] = Counter()
        self._compile = compile
        self._fake = FakeTensorMode(allow_non_fake_inputs=False)
        self._stack = ExitStack()
        self._depth = 0

    @property
    def total(self) -> int:
        """All launches."""
        return self.launches.total()

    def __enter__(self) -> FakeCuda:
        if self._depth == 0:
            with ExitStack() as stack:  # undone if something cannot be had
                stack.enter_context(_DeviceGuard())
                for patch in _patches():
                    stack.enter_context(patch)
                stack.enter_context(self._triton())
                stack.enter_context(warnings.catch_warnings())
                for message in ("Accessing the data pointer of FakeTensor", "CUDA initialization"):
                    warnings.filterwarnings("ignore", message=message)
                stack.enter_context(self._fake)
                self._stack = stack.pop_all()
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            self._stack.close()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked by C++ alone: the autograd engine
            device = args[0].fake_device
            return torch.device("meta") if device.type == "cuda" else device
        name = func.overloadpacket.__name__
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        new = name.startswith("new_") and args[0].fake_device.type == "cuda"
        if new or kwargs.get("device") == torch.device("meta"):
            kwargs = {**kwargs, "device": DEVICE}  # C++ filled in the tensor's device
        if name in WAITING:
            raise HostSyncError(f"{func} waits for the device")
        if func.namespace == "pwm_fast":
            from pwm_fast.ops.registration import IMPLEMENTATIONS

            with self:
                return IMPLEMENTATIONS[name](*args, **kwargs)
        if func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._refuse_host(func, (args, kwargs))
        # It has no form without data; its tensors are updated in place.
        result = None if name.startswith("_fused_adam") else func(*args, **kwargs)
        self._refuse_host(func, result)
        if name.startswith(("_foreach_", "_fused_")):
            self.launches[name] += _list_launches(args) + 2 * ("norm" in name)
        elif name not in FREE and not func.is_view and not _same(name, args, result):
            self.launches[name] += 1
        return result

    def _refuse_host(self, func: Any, values: Any) -> None:
        left = [values]  # torch's pytree would take a fifth of all the time that counting takes
        while left:
            x = left.pop()
            if isinstance(x, FakeTensor):
                if x.fake_device.type != "cuda":
                    raise HostSyncError(f"{func} takes or makes a tensor on {x.fake_device}")
            elif isinstance(x, list | tuple):
                left.extend(x)
            elif isinstance(x, dict):
                left.extend(x.values())

    def _triton(self) -> AbstractContextManager[Any]:
        """Triton's launches are seen on their way, on a device of :data:`PROPERTIES`."""
        if importlib.util.find_spec("triton") is None and not self._compile:
            return nullcontext()
        from triton.runtime.jit import JITFunction

        from bench import fake_driver

        launch = JITFunction.run

        def run(kernel: Any, *args: Any, **options: Any) -> Any:
            made = launch(kernel, *args, **options)
            self._launched(kernel, args, options, made)
            return made

        def loaded(name: str, compiled: bool) -> None:
            self.loaded[name] += 1
            self.compiled[name] += compiled

        capability = (PROPERTIES.major, PROPERTIES.minor)
        with ExitStack() as stack:
            stack.enter_context(
                fake_driver.launching(capability, loaded)
                if self._compile
                else fake_driver.binding(capability)
            )
            stack.enter_context(mock.patch.object(JITFunction, "run", run))
            return stack.pop_all()

    def _launched(
        self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any], made: Any
    ) -> None:
        """A Triton kernel was launched; ``made`` is what Triton compiled, None if nothing."""
        self.launches[f"triton {kernel.fn.__name__}"] += 1


def _same(name: str, args: tuple[Any, ...], result: Any) -> bool:
    """A conversion to what the tensor is already: C++ asked for ``meta``."""
    return name == "_to_copy" and args[0].dtype == result.dtype


def _list_launches(args: tuple[Any, ...]) -> int:
    """Launches of a multi-tensor operator: each has room for so many tensors and blocks."""
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    most = TENSORS[min(len(lists), len(TENSORS)) - 1]
    launches, tensors, blocks = 0, 0, 0
    for x in lists[0]:
        tensors += 1
        for _ in range(-(-x.numel() // CHUNK)):
            blocks += 1
            if blocks == BLOCKS:
                launches, tensors, blocks = launches + 1, 1, 0
        if tensors == most:
            launches, tensors, blocks = launches + 1, 0, 0
    return launches + (blocks > 0)


class _DeviceGuard:
    """The CPU's device guard stands in for CUDA's where PyTorch was built without."""

    def __enter__(self) -> None:
        libraries = Path(torch.__file__).parent / "lib"
        library = next(p for n in ("libc10.so", "libc10.dylib") if (p := libraries / n).exists())
        table = (ctypes.c_void_p * 2).in_dll(
            ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE"
        )
        self._table, self._before = table, table[1]
        if table[1] is None:
            table[1] = table[0]  # CPU is number 0 of the device types, CUDA 1

    def __exit__(self, *error: Any) -> None:
        self._table[1] = self._before


def _patches() -> list[Any]:
    properties = mock.Mock(return_value=PROPERTIES)
    supported = [*torch.utils._foreach_utils._foreach_supported_types, FakeTensor]
    return [
        mock.patch.object(FakeTensor, "is_cuda", property(_is_cuda), create=True),
        mock.patch.object(FakeTensor, "data_ptr", _address),
        mock.patch.object(torch.utils._foreach_utils, "_foreach_supported_types", supported),
        mock.patch.object(  # tensors are grouped in C++, which is told of meta
            torch.utils._foreach_utils,
            "_get_foreach_kernels_supported_devices",
            lambda: ["cuda", "meta"],
        ),
        mock.patch.object(weight_cache, "PLAIN", (*weight_cache.PLAIN, FakeTensor)),
        mock.patch.object(torch.cuda, "get_device_properties", properties),
        mock.patch.object(torch.cuda, "get_device_capability", mock.Mock(return_value=(9, 0))),
        mock.patch.object(torch.cuda, "get_device_name", mock.Mock(return_value=PROPERTIES.name)),
        mock.patch.object(torch.cuda, "current_device", mock.Mock(return_value=0)),
        mock.patch.object(torch.cuda, "device", lambda *_: nullcontext()),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", mock.Mock(return_value=True)),
        # Parameters are made on the device at once, without values.
        mock.patch.object(nn.Module, "to", lambda module, *_, **__: module),
        mock.patch.object(nn.init, "trunc_normal_", _as_is),
        mock.patch.object(nn.init, "orthogonal_", _as_is),
    ]


def _as_is(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor


def _address(tensor: FakeTensor) -> int:
    """Where the data would lie."""
    if tensor.numel() == 0:
        return 0
    storage = tensor.untyped_storage()._cdata  # the host's address of its record: no other's
    return MEMORY + storage * ALIGNMENT + tensor.storage_offset() * tensor.element_size()


def _is_cuda(tensor: FakeTensor) -> bool:
    return bool(tensor.fake_device.type == "cuda")
