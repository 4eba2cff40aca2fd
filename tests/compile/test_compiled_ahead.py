"""What may be launched on a GPU is among the cases that are compiled ahead of time.

Two ways: whatever a plan returns over a grid of sizes, and what the updates of a published model
launch, recorded on a made-up device. A product or a persistent rollout must be compiled exactly as
it is launched, but for the number of tiles of a row, for tensors that a launch goes without (the
case has them and needs no fewer registers), and for int32 arguments that the case does not take to
be multiples of 16. An element kernel must be compiled with the same constants for rows as wide.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl

from bench import launches
from bench.fake_cuda import FakeCuda
from pwm_fast import config
from pwm_fast.kernels import rollout
from pwm_fast.kernels.gemm_tile import POINTER_TYPES, constants_of
from pwm_fast.kernels.plan import TILES, GemmShape, Limits, plan
from tests.compile import report
from tests.compile.aot import SHARED_LIMIT, Case
from tests.compile.gemm_cases import OPERANDS

SMS = {80: 108, 90: 132, 100: 148}  # of an A100, an H200 and a B200
ROWS = (1, 16, 100, 128, 512, 1000, 2048, 16384)
WIDTHS = (16, 64, 100, 128, 200, 256, 399, 400, 512, 768, 1024, 1376, 1792, 4096)
#: Constants that make no other code, or that of a launch that does less.
FREE = {"TILES_N", "TILES_2", "ROWS", "TENSORS", "SIZES", "FIRST"}
MORE = {"SAVE", "KEEP", "SCALED", "SUMS", "BIAS_SUM", "LEAD"}
#: Without KEEP another tensor stands for them.
KEPT = {"y1_ptr", "y2_ptr", "dh2_ptr", "dh2_scale_ptr", "dq_ptr", "dq_scale_ptr", "sums_ptr"}
TWIN = {tl.bfloat16: tl.float16}
POINTERS = POINTER_TYPES | {torch.int32: "*i32", torch.int64: "*i64", torch.float64: "*fp64"}


class Launch(NamedTuple):
    """A launch, as far as it decides what is compiled."""

    kernel: str
    constants: dict[str, Any]
    pointers: dict[str, str]
    odd: frozenset[str]  # integers that are no multiples of 16
    warps: int
    stages: int | None


@functools.lru_cache
def cases(arch: int) -> dict[str, list[Case]]:
    """By the name of the kernel."""
    found: dict[str, list[Case]] = {}
    for module in report.modules():
        for case in report.cases_of(module):
            if arch in case.archs:
                found.setdefault(case.fn.fn.__name__, []).append(case)
    return found


def differences(case: Case, launch: Launch) -> list[str]:
    """Why a case does not stand for a launch."""
    elementwise = not case.tensor_cores
    found = []
    for name, value in launch.constants.items():
        have = case.constants.get(name)
        if name in FREE or (name in MORE and have is not None and have >= value):
            continue
        if name == "BLOCK" and elementwise and have is not None and have >= value:
            continue
        if have != value:
            found.append(f"{name} {have}")
    for name, pointer in launch.pointers.items():
        have = case.signature[name]
        if name in KEPT and not launch.constants["KEEP"]:
            continue
        if have == "constexpr" or (not elementwise and have != pointer):
            found.append(f"{name} {have}")
    if not elementwise:
        odd = launch.odd - case.unaligned - case.constants.keys()
        found += [f"{name} aligned" for name in sorted(odd)]
        if (case.num_warps, case.num_stages) != (launch.warps, launch.stages):
            found.append(f"{case.num_warps} warps, {case.num_stages} stages")
    return found


def missing(launch: Launch, arch: int) -> str | None:
    """What no case has of a launch; None if it is compiled ahead."""
    each = cases(arch).get(launch.kernel, [])
    if "*bf16" in launch.pointers.values():
        assert any("*bf16" in case.signature.values() for case in each)
        launch = launch._replace(
            pointers={n: p.replace("bf16", "fp16") for n, p in launch.pointers.items()},
            constants={n: TWIN.get(v, v) for n, v in launch.constants.items()},
        )
    found = [(differences(case, launch), case.name) for case in each]
    nearest, name = min(found, key=lambda e: len(e[0]), default=(["no case at all"], "none"))
    return f"{launch}; the nearest, {name}, has {nearest}" if nearest else None


# --- plans ----------------------------------------------------------------------------------------


def planned(kernel: str, operand: str, arch: int) -> Iterator[Launch]:
    """What a kernel's plan returns over a grid of sizes."""
    limits = Limits(SMS[arch], SHARED_LIMIT[arch])
    seen = set()
    for rows, n, k in itertools.product(ROWS, WIDTHS, WIDTHS):
        product = GemmShape(kernel, rows, n, k, element=OPERANDS[operand].itemsize)
        found = plan(product, limits)
        if found is None:
            continue
        constants = constants_of(kernel, found, n, k, "tf32")
        odd = frozenset(name for name, size in {"N": n, "K": k}.items() if size % 16)
        key = (found.warps, found.stages, odd, *constants.items())
        if key not in seen:
            seen.add(key)
            pointers = {"w": POINTER_TYPES[OPERANDS[operand]]}
            yield Launch(f"{kernel}_kernel", constants, pointers, odd, found.warps, found.stages)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("kernel", TILES)
def test_every_plan_is_compiled_ahead(kernel: str, operand: str, arch: int) -> None:
    found = [missing(launch, arch) for launch in planned(kernel, operand, arch)]
    assert found, "no plan at all"
    assert not [text for text in found if text]


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padded", [512, 1024])
def test_every_layout_of_published_rollouts_is_compiled_ahead(
    padded: int, dtype: torch.dtype, arch: int
) -> None:
    device = SMS[arch], SHARED_LIMIT[arch]
    planned = {rollout.choose_layout(batch, padded, dtype, *device) for batch in ROWS}
    tiles = {(p.bm, p.bn) for p in planned if not isinstance(p, str)}
    # Two slices of 1024 features in float32 are more than a multiprocessor holds.
    assert tiles or (padded, dtype) == (1024, torch.float32)
    for layout in (p for p in rollout.LAYOUTS if (p.bm, p.bn) in tiles):
        scheme = rollout.Scheme("heun", 4, padded - 2)
        constants = rollout.constants_of(padded, layout, dtype, scheme)
        pointers = {"w2_ptr": POINTER_TYPES[dtype]}
        for kernel in ("rollout_forward_kernel", "rollout_backward_kernel"):
            launch = Launch(kernel, constants, pointers, frozenset(), layout.warps, 1)
            assert missing(launch, arch) is None


# --- whole updates --------------------------------------------------------------------------------


class Recorder(FakeCuda):
    """Keeps Triton's launches."""

    def __init__(self) -> None:
        super().__init__()
        RECORDED.clear()

    def _launched(
        self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any], made: Any
    ) -> None:
        names = kernel.arg_names
        given = dict(zip(names, args, strict=False))
        given |= {name: value for name, value in options.items() if name in names}
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        fixed |= {name for name, value in given.items() if value is None}
        tensors = {n: x for n, x in given.items() if isinstance(x, Tensor)}
        integers = {n for n, x in given.items() if type(x) is int and x % 16 and x != 1}
        launch = Launch(
            kernel.fn.__name__,
            {name: given[name] for name in fixed if given[name] is not None},
            {name: POINTERS[x.dtype] for name, x in tensors.items()},
            frozenset(integers - fixed),
            options["num_warps"],
            options.get("num_stages"),
        )
        RECORDED[repr(launch)] = launch


RECORDED: dict[str, Launch] = {}


@pytest.mark.slow
@pytest.mark.parametrize(("alg", "precision"), [("pwm_5M_flow", "fast"), ("pwm_5M", "tf32")])
def test_what_a_published_model_launches_is_compiled_ahead(
    alg: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "FakeCuda", Recorder)
    launches.count(config.compose(f"alg={alg}").alg, "triton", precision)
    assert len(RECORDED) > 20
    found = [missing(launch, 90) for launch in RECORDED.values()]
    if any(found):
        pytest.fail("\n".join(text for text in found if text), pytrace=False)


# --- modes that are not offered -------------------------------------------------------------------


def split_product(x: Tensor, w: Tensor, dtype: torch.dtype, parts: int) -> Tensor:
    """``x w^T`` in float32 from products of rounded parts of the operands, the smallest first."""
    pieces = []
    for operand in (x, w):
        rest, each = operand, []
        for _ in range(parts):
            each.append(rest.to(dtype).float())
            rest = rest - each[-1]
        pieces.append(each)
    pairs = [(i, j) for i in range(parts) for j in range(parts) if i + j < parts]
    pairs.sort(key=sum, reverse=True)
    return sum(pieces[0][i] @ pieces[1][j].t() for i, j in pairs)  # type: ignore[return-value]


def test_bf16x3_is_no_exact_mode() -> None:
    """Of two bf16 parts its errors exceed float32's by far, of three (bf16x6) they do not."""
    x = torch.nn.functional.mish(torch.randn(256, 512))
    w = torch.randn(256, 512) / 512**0.5
    truth = x.double() @ w.double().t()
    single, double, triple = (
        float((y.double() - truth).abs().max())
        for y in (x @ w.t(), *(split_product(x, w, torch.bfloat16, n) for n in (2, 3)))
    )
    assert double > 5 * single
    assert triple < 2 * single
