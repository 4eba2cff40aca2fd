"""Threads: torch's own, results that do not depend on their number, and one OpenMP runtime."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.native import (
    test_act_norm,
    test_adam,
    test_norm_act,
    test_other_kernels,
    test_row_program,
)
from tests.native.harness import _C, Values

ROWS, N = 331, 777  # more than one thread's least share for up to 15 threads


def openmp_paths() -> list[str]:
    """The OpenMP runtimes in this process."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as file:
            paths = {line.split()[-1] for line in file}
    except OSError:
        return []
    return sorted(p for p in paths if "libgomp" in p or "libiomp5" in p or "libomp" in p)


@pytest.fixture(autouse=True)
def openmp() -> Iterator[None]:
    paths = openmp_paths()
    if not paths:
        pytest.skip("no OpenMP runtime of torch in /proc/self/maps (only Linux has it)")
    assert _C.set_openmp(paths[0])
    yield
    _C.set_openmp("")


def norm_act(act: str) -> Callable[[int], Values]:
    given = test_norm_act.inputs(ROWS, N) | {"dy": torch.randn(ROWS, N)}
    before = torch.Generator().get_state()

    def run(threads: int) -> Values:
        torch.set_rng_state(before)  # the accumulators start from random numbers
        forward = test_norm_act.forward(given, act, 7, threads=threads)
        saved = {k: v for k, v in forward.items() if k != "y" or act == "simnorm"}
        parameters = {name: given[name] for name in ("dy", "gamma", "beta")}
        return forward | test_norm_act.backward(saved | parameters, act, 7, threads=threads)

    return run


def act_norm(members: int, norm: bool = True) -> Callable[[int], Values]:
    given = test_act_norm.inputs(ROWS, N, members, () if norm else ("gamma", "beta"))
    per_member = -(-ROWS // members)
    before = torch.Generator().get_state()

    def run(threads: int) -> Values:
        torch.set_rng_state(before)
        options = {"rows_per_member": per_member, "threads": threads}
        forward = test_act_norm.forward(given, "mish", **options)
        saved = forward | {k: given[k] for k in ("dy", "gamma") if k in given}
        return forward | test_act_norm.backward(saved, "mish", **options)

    return run


def simnorm() -> Callable[[int], Values]:
    given = {"x": torch.randn(ROWS, 776), "dy": torch.randn(ROWS, 776)}
    return lambda threads: test_other_kernels.simnorm(given, 8, threads)


def two_hot() -> Callable[[int], Values]:
    given = test_other_kernels.head_inputs(1000, 101)
    return lambda threads: test_other_kernels.two_hot(given, -10.0, 10.0, True, threads=threads)


def axpby() -> Callable[[int], Values]:
    given = {name: torch.randn(100_003) for name in ("z", "k1", "k2")}
    return lambda threads: {"out": test_other_kernels.axpby(given, threads)}


def esnr(count: int) -> Callable[[int], Values]:
    grads = test_other_kernels.samples(count, 1.0, (5, 40_000, 0, 33_333))

    def run(threads: int) -> Values:
        return dict(zip(("signal", "noise"), test_other_kernels.esnr(grads, threads), strict=True))

    return run


def adam(keep: bool) -> Callable[[int], Values]:
    given = test_adam.inputs((5, 40_000, 0, 33_333))
    return lambda threads: test_adam.step(given, groups=(1, 3), keep=keep, threads=threads)


def checksum() -> Callable[[int], Values]:
    x, y = torch.randn(300_007), torch.randn(999, 201)

    def run(threads: int) -> Values:
        pieces = [x.data_ptr(), 1, 4 * x.numel(), 0, y.data_ptr(), 999, 4 * 190, 4 * 201]
        low, high = (_C.checksum(pieces, threads) >> shift & 0xFFFFFFFF for shift in (0, 32))
        return {"sum": torch.tensor([low, high])}

    return run


def row_program() -> Callable[[int], Values]:
    given = test_row_program.numbers(ROWS, 100, 130)
    return lambda threads: test_row_program.gemms(given, threads)


KERNELS = {
    "norm_act none": lambda: norm_act("none"),
    "norm_act mish": lambda: norm_act("mish"),
    "norm_act simnorm": lambda: norm_act("simnorm"),
    "act_norm": lambda: act_norm(1),
    "act_norm without norm": lambda: act_norm(1, norm=False),
    "act_norm ensemble": lambda: act_norm(3),
    "simnorm": simnorm,
    "two_hot": two_hot,
    "axpby": axpby,
    "adam": lambda: adam(False),
    "adam that keeps gradients": lambda: adam(True),
    "checksum": checksum,
    "row program": row_program,
    "esnr of 4": lambda: esnr(4),
    "esnr of 20": lambda: esnr(20),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_change_no_bit(kernel: str) -> None:
    run = KERNELS[kernel]()
    alone = run(1)
    for threads in (2, 3, 7):
        for name, value in run(threads).items():
            assert torch.equal(value, alone[name]), f"{kernel}: {name} with {threads} threads"


def run_in_new_process(threads: int, code: str) -> None:
    """``code`` finds torch with so many threads, _C, count() of them, call(threads), OPENMP."""
    setup = """
        import os
        import sys
        import torch
        from tests.native.test_threads import openmp_paths
        from pwm_fast import _C

        def count():
            return len(os.listdir("/proc/self/task"))

        x = torch.randn(512, 512)
        y = torch.empty_like(x)

        def call(threads):
            _C.norm_act_fwd(x=x, y=y, act="mish", group=1, eps=1e-5, threads=threads)

        OPENMP = openmp_paths()
        torch.set_num_threads(int(sys.argv[1]))  # starts those of other pools too
        before = count()
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(code), str(threads)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_threads_are_those_of_torch() -> None:
    """One OpenMP runtime before and after, and one pool: torch needs no further thread."""
    run_in_new_process(
        3,
        """
        assert _C.set_openmp(OPENMP[0])
        call(3)
        assert count() == before + 2, (count(), before)
        torch.randn(1000, 1000).exp_().sum()
        assert count() == before + 2, (count(), before)
        assert openmp_paths() == OPENMP
        """,
    )


def test_one_thread_is_one_thread() -> None:
    run_in_new_process(
        1,
        """
        assert _C.set_openmp(OPENMP[0])
        call(torch.get_num_threads())
        assert count() == before
        """,
    )


def test_serial_without_openmp() -> None:
    run_in_new_process(
        2,
        """
        assert not _C.set_openmp("")  # importing the operations may have set it
        call(3)
        assert count() == before, (count(), before)
        for path in ("", "/no/such/libgomp.so.1", "libm.so.6"):
            assert not _C.set_openmp(path)
        call(3)
        assert count() == before
        """,
    )


def test_small_work_stays_on_one_thread() -> None:
    run_in_new_process(
        2,
        """
        assert _C.set_openmp(OPENMP[0])
        z = torch.zeros(8000)
        _C.axpby(z=z, k1=z, k2=None, out=z, c1=1.0, c2=0.0, threads=2)
        assert count() == before
        """,
    )


def test_python_threads_at_once() -> None:
    """The long calls let go of the GIL; each Python thread has its own team."""
    run_in_new_process(
        2,
        """
        from concurrent.futures import ThreadPoolExecutor

        assert _C.set_openmp(OPENMP[0])
        call(1)
        expected = y.clone()
        outputs = [torch.empty_like(x) for _ in range(8)]

        def work(out):
            for _ in range(20):
                out.zero_()
                _C.norm_act_fwd(x=x, y=out, act="mish", group=1, eps=1e-5, threads=2)
                assert torch.equal(out, expected)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, outputs))
        """,
    )
