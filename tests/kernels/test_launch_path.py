"""What a launch on the fake device goes through, by kernels that are wrong in one way each.

Whatever keeps a kernel from being launched on a GPU has to show here without one: else the tests
that launch everything (test_launched_updates.py, test_launched_operators.py) would say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytest.skip("stands in for a GPU where there is none", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import JITFunction, driver

from bench import fake_driver
from bench.fake_cuda import DEVICE, PROPERTIES, FakeCuda
from tests.kernels.launched import Watched, needs_launcher


@pytest.fixture
def cuda() -> Iterator[Watched]:
    with Watched() as device:
        yield device


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, device=DEVICE)


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def all_kinds_kernel(flag, small, one, x, missing, large, rate, pair, SIZES: tl.constexpr):
    value = small + large + one + rate + tl.load(pair[0]) + tl.load(pair[1][0]) + SIZES[1]
    if flag:
        tl.store(x, value)


@triton.jit
def options_kernel(x, options):
    tl.store(x, tl.load(options))


@triton.jit
def params_kernel(x, params):
    tl.store(x, tl.load(params))


@triton.jit
def first_kernel(pointers):
    tl.store(pointers[0], 1.0)


@triton.jit
def large_kernel(x, BLOCK: tl.constexpr):
    """Programs that exchange more numbers between their threads than shared memory holds."""
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.gather(tl.load(x + i), BLOCK - 1 - i, 0))


# --- with or without compiling --------------------------------------------------------------------

BOTH = pytest.mark.parametrize("compile", [False, pytest.param(True, marks=needs_launcher)])


@BOTH
@pytest.mark.parametrize(
    ("kernel", "error"), [(options_kernel, SyntaxError), (params_kernel, TypeError)]
)
def test_names_that_the_launch_has_itself_fail(
    kernel: Any, error: type[Exception], compile: bool
) -> None:
    """Such names once kept every optimiser step from a GPU, and no test saw it."""
    with FakeCuda(compile), pytest.raises(error):
        kernel[(1,)](zeros(4), zeros(4))


@BOTH
def test_unknown_options_fail(compile: bool) -> None:
    with FakeCuda(compile), pytest.raises(KeyError, match="num_wraps"):
        copy_kernel[(1,)](zeros(4), zeros(4), 4, BLOCK=4, num_wraps=4)


@BOTH
def test_what_is_no_argument_fails(compile: bool) -> None:
    with FakeCuda(compile), pytest.raises(TypeError, match="BLOCK"):
        copy_kernel[(1,)](zeros(4), zeros(4), 4)


@BOTH
def test_leaves_triton_as_it_was(compile: bool) -> None:
    before = JITFunction.run, driver._active
    with FakeCuda(compile) as cuda:
        copy_kernel[(1,)](zeros(4), zeros(4), 4, BLOCK=4, num_warps=1)
    assert cuda.launches["triton copy_kernel"] == 1
    assert (JITFunction.run, driver._active) == before
    assert set(copy_kernel.device_caches) == {fake_driver.ORDINAL}  # nothing of a real device
    assert fake_driver.knobs.runtime.jit_cache_hook is None
    assert fake_driver.knobs.compilation.listener is None


# --- specialisation -------------------------------------------------------------------------------


def test_addresses_are_those_of_a_gpu() -> None:
    with FakeCuda():
        x, y = zeros(64), torch.zeros(8, dtype=torch.float16, device=DEVICE)
        assert x.data_ptr() % 512 == 0 and y.data_ptr() % 512 == 0
        assert x.data_ptr() != y.data_ptr()
        assert x[3:].data_ptr() == x.view(8, 8)[0, 3:].data_ptr() == x.data_ptr() + 12
        assert y[1:].data_ptr() == y.data_ptr() + 2
        assert x[:0].data_ptr() == 0
        assert torch.nn.Parameter(x).data_ptr() == x.data_ptr()


@needs_launcher
def test_arguments_are_specialised_as_they_are(cuda: Watched) -> None:
    """Alignment of addresses and integers, and a 1 that becomes a constant."""
    x, y = zeros(64), zeros(64)
    made = {
        name: copy_kernel[(1,)](*args, BLOCK=4, num_warps=1)
        for name, args in {
            "aligned": (x, y, 16),
            "odd": (x[1:], y[4:], 16),
            "one": (x, y, 1),
            "prime": (x, y, 17),
        }.items()
    }
    aligned = {name: [i for (i,), kind in k.src.attrs.items() if kind] for name, k in made.items()}
    assert aligned == {"aligned": [0, 1, 2], "odd": [1, 2], "one": [0, 1], "prime": [0, 1]}
    assert made["one"].src.signature["n"] == "constexpr"
    assert {k.metadata.target.arch for k in made.values()} == {90}


# --- the launch -----------------------------------------------------------------------------------


@needs_launcher
def test_every_kind_of_argument_arrives(cuda: Watched) -> None:
    """:class:`Watched` compares the bytes that a kernel would find."""
    x, y, z = zeros(4), zeros(4), zeros(4)
    all_kinds_kernel[(3, 2)](
        True, -7, 1, x[1:], None, 2**40, 0.3, (y, (z,), 5), SIZES=(1, 2), num_warps=2
    )
    launch = fake_driver.last_launch()
    assert launch.parameters == 8 + 2  # without the 1, None and SIZES; with the scratch pointers
    assert tuple(launch.grid) == (3, 2, 1) and launch.block[0] == 64


@needs_launcher
def test_a_wrong_record_would_be_seen(cuda: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_driver.last_launch

    def altered() -> fake_driver.Launch:
        launch = seen()
        launch.values[8] ^= 1
        return launch

    monkeypatch.setattr("tests.kernels.launched.last_launch", altered)
    with pytest.raises(AssertionError, match="copy_kernel"):
        copy_kernel[(1,)](zeros(4), zeros(4), 4, BLOCK=4, num_warps=1)


@needs_launcher
def test_the_cooperative_flag_arrives(cuda: Watched) -> None:
    x = zeros(4)
    for together in (True, False):
        copy_kernel[(8,)](x, x, 4, BLOCK=4, num_warps=1, launch_cooperative_grid=together)
        assert fake_driver.last_launch().cooperative == together
    assert cuda.cooperative == {"copy_kernel"}


@needs_launcher
@pytest.mark.parametrize(
    ("grid", "options", "why"),
    [
        ((1, 65536), {}, "too many programs"),
        ((132 * 32 + 1,), {"launch_cooperative_grid": True}, "resident at once"),
    ],
)
def test_what_a_driver_refuses(
    cuda: Watched, grid: tuple[int, ...], options: dict[str, Any], why: str
) -> None:
    x = zeros(4)
    with pytest.raises(RuntimeError, match=why):
        copy_kernel[grid](x, x, 4, BLOCK=4, num_warps=2, **options)


@needs_launcher
def test_more_parameters_than_fit(cuda: Watched) -> None:
    pointers = tuple(zeros(1) for _ in range(512))  # 4096 bytes, and two more
    with pytest.raises(RuntimeError, match="more than 4096 bytes"):
        first_kernel[(1,)](pointers, num_warps=1)


@needs_launcher
def test_shared_memory_that_there_is_not(cuda: Watched) -> None:
    with pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        large_kernel[(1,)](zeros(2**16), BLOCK=2**16, num_warps=32)


@needs_launcher
def test_the_hosts_memory_is_refused(cuda: Watched) -> None:
    memory = torch.UntypedStorage(16)
    host = SimpleNamespace(dtype=torch.float32, data_ptr=memory.data_ptr)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        copy_kernel[(1,)](zeros(4), host, 4, BLOCK=4, num_warps=1)


@needs_launcher
def test_the_device_is_the_one_of_the_counts() -> None:
    """The stand-in for the driver has the numbers of bench/fake_cuda.py."""
    found = fake_driver._driver((9, 0), True).utils.get_device_properties(0)
    assert found["multiprocessor_count"] == PROPERTIES.multi_processor_count
    assert found["max_shared_mem"] == PROPERTIES.shared_memory_per_block_optin
    assert found["max_num_regs"] == PROPERTIES.regs_per_multiprocessor
    target = fake_driver._driver((9, 0), True).get_current_target()
    assert (target.backend, target.arch, target.warp_size) == ("cuda", 90, 32)


# --- the cache ------------------------------------------------------------------------------------


@needs_launcher
def test_kernels_are_counted_that_were_not_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for compiled in (1, 0):
        copy_kernel.device_caches.clear()  # as in another process
        with FakeCuda(compile=True) as cuda:
            for _ in range(2):
                copy_kernel[(1,)](zeros(4), zeros(4), 4, BLOCK=4, num_warps=1)
        assert cuda.compiled["copy_kernel"] == compiled
        assert cuda.launches["triton copy_kernel"] == 2


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(fake_driver, "_library", fake_driver._library.__wrapped__)
    assert "needs a C compiler" in str(fake_driver.why_not())
    monkeypatch.setattr(fake_driver, "_driver", fake_driver._driver.__wrapped__)
    before = JITFunction.run, torch.nn.Module.to
    with pytest.raises(fake_driver.NoLauncherError), FakeCuda(compile=True):
        pass
    assert (JITFunction.run, torch.nn.Module.to) == before
