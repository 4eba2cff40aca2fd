"""Which tiles a fused GEMM is launched with, or that it had better not be fused.

What there is to choose from is :data:`TILES`, for every kernel. The choice is an entry of the GPU's
file of measured ones (:mod:`pwm_fast.kernels.tuning`) or else the least of the cost model
(:mod:`pwm_fast.kernels.cost`). It depends on sizes, precision and device alone, is made once for
each of them and launches nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from pwm_fast.kernels import cost, tuning

VARIABLE = "PWM_FAST_FUSED_PRODUCTS"

#: The widest row that a tile holds whole.
WIDEST = 512
#: Tiles ``(BLOCK_M, BLOCK_N)`` of rows that lie in several tiles.
SHARED_ROWS = ((16, 64), (32, 64), (64, 64), (64, 128), (128, 128))
#: Tiles of whole rows of ensembles' layers, which are masked. With 64 rows, as warpgroup GEMMs,
#: they would spill.
GROUPED = ((16, 256), (32, 256), (16, 512), (32, 512))
#: Of 16 rows of 256, by 4 warps, Triton 3.6 keeps 3 KB a thread in memory.
GROUPED_BACKWARD = ((32, 256), (16, 512))
#: Elements of a tile, and of one in a backward pass: larger ones spill in the epilogue.
LARGEST, LARGEST_BACKWARD = 16384, 8192
#: Column tiles of a row whose programs wait for one another.
MOST_TILES = 64


class Tiles(NamedTuple):
    """What a kernel can be launched with.

    Every tile here is compiled ahead of time, in every precision, for every generation of GPUs; so
    there are none that no published width takes, and widths that would multiply them are not fused.

    Attributes:
        whole: tiles that hold whole rows.
        shared: tiles of rows that lie in several.
        waits: the programs of such a row wait for one another.
        backward: the epilogue holds more, so that tiles are smaller and have more warps.
        grouped: members of an ensemble have a grid axis; programs do not loop.
        masked: tiles may reach beyond a row's end; else its columns are a multiple of theirs.
        columns: the result's must be a multiple of so many.
        summed: the summed width must be; 0: of BLOCK_K.
        state: bytes that the epilogue moves of each element in float32.
        operands: numbers that it moves of each in the operands' dtype.
    """

    whole: tuple[tuple[int, int], ...]
    shared: tuple[tuple[int, int], ...]
    waits: bool
    backward: bool
    grouped: bool = False
    masked: bool = False
    columns: int = 1
    summed: int = 0
    state: int = 0
    operands: int = 2


#: By kernel.
TILES: Mapping[str, Tiles] = {
    "linear_norm_act_fwd": Tiles(((16, 512), (32, 512)), SHARED_ROWS, True, False),
    "linear_norm_act_bwd": Tiles(((16, 512),), SHARED_ROWS, True, True),
    # A weight's unaligned rows would be read number by number, which spills.
    "linear_act_norm_fwd": Tiles(GROUPED, (), False, False, True, True, summed=16),
    "linear_act_norm_bwd": Tiles(GROUPED_BACKWARD, (), False, True, True, True, summed=1),
    "linear_axpby": Tiles(
        (), SHARED_ROWS, False, True, masked=True, columns=16, state=12, operands=1
    ),
}
RATES = ("16", "tf32", "ieee")


class GemmShape(NamedTuple):
    """A GEMM ``[rows, k] [n, k]^T``, or one of each member, with what follows it.

    Attributes:
        kernel: a key of :data:`TILES`.
        rows: of the result, of one member.
        n: columns of the result.
        k: summed over.
        members: of an ensemble; 1: a layer alone.
        element: bytes of an operand's element.
        input_precision: of fp32 operands, as ``tl.dot`` names it.
    """

    kernel: str
    rows: int
    n: int
    k: int
    members: int = 1
    element: int = 2
    input_precision: str = "tf32"

    @property
    def rate(self) -> str:
        """Of :data:`RATES`: what it is multiplied in."""
        return "16" if self.element == 2 else self.input_precision

    @property
    def traffic(self) -> int:
        """Bytes that the epilogue moves of each element of the result."""
        tiles = TILES[self.kernel]
        return tiles.state + tiles.operands * self.element

    @property
    def key(self) -> str:
        """Of a tuned entry: precision, members, rows by the power of two that holds them, N, K."""
        members = "" if self.members == 1 else f" E{self.members}"
        return f"{self.rate}{members} R{_power_of_two(self.rows)} N{self.n} K{self.k}"

    def check(self) -> None:
        """Raise ValueError for what is no GEMM."""
        if self.kernel not in TILES:
            raise ValueError(f"kernel must be one of {', '.join(TILES)}, got {self.kernel!r}")
        if min(self.rows, self.n, self.k, self.members) < 1:
            raise ValueError(
                f"sizes must be positive, got rows={self.rows}, n={self.n}, k={self.k}, "
                f"members={self.members}"
            )
        if self.rate not in RATES:
            raise ValueError(f"input_precision must be tf32 or ieee, got {self.input_precision!r}")


_KEY = re.compile(r"(16|tf32|ieee)(?: E(\d+))? R(\d+) N(\d+) K(\d+)")


def gemm_shape(kernel: str, key: str) -> GemmShape:
    """The largest GEMM that a tuned entry is for; of a key that ``tuning.load`` let pass."""
    rate, members, rows, n, k = _KEY.fullmatch(key).groups()  # type: ignore[union-attr]
    element = 2 if rate == "16" else 4
    precision = "tf32" if rate == "16" else rate
    return GemmShape(kernel, int(rows), int(n), int(k), int(members or 1), element, precision)


class Limits(NamedTuple):
    """What of a device matters.

    Attributes:
        sms: multiprocessors.
        shared: bytes of shared memory that a program may have.
    """

    sms: int
    shared: int = 227 * 1024


@dataclass(frozen=True)
class GemmPlan:
    """How one fused GEMM is launched.

    Attributes:
        block_m: rows of a tile.
        block_n: columns of a tile.
        block_k: summed at once.
        warps: of a program.
        stages: of software pipelining.
        tiles_n: column tiles that a row lies in.
        groups: row blocks in flight, of a member; ``groups * tiles_n`` programs.
        waits: programs of a row that lies in several tiles may wait for one another.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tiles_n: int
    groups: int
    waits: bool = True

    @property
    def programs(self) -> int:
        """Programs of a launch, of a member."""
        return self.groups * self.tiles_n

    @property
    def synced(self) -> bool:
        """Programs wait for one another: the launch has to be cooperative."""
        return self.waits and self.tiles_n > 1

    @property
    def name(self) -> str:
        """``"64x128"``."""
        return f"{self.block_m}x{self.block_n}"


def make_plan(
    block_m: int,
    block_n: int,
    rows: int,
    n: int,
    sms: int,
    element: int,
    shared: int,
    backward: bool = False,
    *,
    waits: bool = True,
) -> GemmPlan | None:
    """The plan of one tile shape, or None where it does not fit the shapes or the device.

    Args:
        block_m: rows of a tile.
        block_n: columns of a tile.
        rows: of the result.
        n: columns of the result.
        sms: multiprocessors of the device.
        element: bytes of an operand's element.
        shared: bytes of shared memory that a program may have.
        backward: its epilogue holds more, so that a thread has half the accumulators.
        waits: programs of a row that lies in several tiles wait for one another: all are resident.
    """
    tiles_m, tiles_n = _cdiv(rows, block_m), _cdiv(n, block_n)
    synced = waits and tiles_n > 1
    if synced and tiles_n > min(sms, MOST_TILES):
        return None
    if block_m * block_n > (LARGEST_BACKWARD if backward else LARGEST):
        return None
    block_k = _block_k(element)
    stages = min(4, (shared - 8192) // ((block_m + block_n) * block_k * element))
    if stages < 2:
        return None
    # At most 64 accumulators a thread: the epilogue holds about as much again, backward more.
    # GEMMs of few rows take their operands through registers as well.
    fewer = backward or block_m < 32
    warps = max(4, block_m * block_n // (1024 if fewer else 2048))
    groups = min(tiles_m, sms // tiles_n) if synced else tiles_m
    return GemmPlan(block_m, block_n, block_k, warps, stages, tiles_n, groups, waits)


def shapes(kernel: str, n: int) -> list[tuple[int, int]]:
    """The tiles ``(BLOCK_M, BLOCK_N)`` that a kernel's rows of ``n`` columns can be cut into."""
    tiles = TILES[kernel]
    if n % tiles.columns:
        return []
    if not tiles.masked:
        whole = [(m, b) for m, b in tiles.whole if b == n]
        return whole + [(m, b) for m, b in tiles.shared if b < n and n % b == 0]
    narrowest = min((b for _, b in tiles.whole if b >= n), default=0)
    first = tiles.shared[0][1] if tiles.shared else 0
    whole = [(m, b) for m, b in tiles.whole if b == narrowest]
    return whole + [(m, b) for m, b in tiles.shared if b < n or b == first]


def candidates(gemm: GemmShape, limits: Limits) -> list[GemmPlan]:
    """Every plan that fits, for the model and the tuner to choose from.

    None of exact float32 GEMMs: they run on no tensor cores, and the library's are faster.

    Raises:
        ValueError: a size is not positive, or the kernel or precision unknown.
    """
    gemm.check()
    tiles = TILES[gemm.kernel]
    if gemm.rate == "ieee" or gemm.k % (tiles.summed or _block_k(gemm.element)):
        return []
    made = (_plan(m, b, gemm, limits) for m, b in shapes(gemm.kernel, gemm.n))
    return [p for p in made if p is not None]


def _plan(block_m: int, block_n: int, gemm: GemmShape, limits: Limits) -> GemmPlan | None:
    tiles = TILES[gemm.kernel]
    return make_plan(
        block_m,
        block_n,
        gemm.rows,
        gemm.n,
        limits.sms,
        gemm.element,
        limits.shared,
        tiles.backward,
        waits=tiles.waits,
    )


def _busy(plan: GemmPlan, gemm: GemmShape, sms: int) -> tuple[int, int, float]:
    """Waves of tiles, tiles at once, and microseconds that a tile's GEMM takes."""
    tiles = gemm.members * -(-gemm.rows // plan.block_m) * plan.tiles_n
    together = min(tiles, plan.programs if plan.synced else sms)
    # Columns beyond a row's end are multiplied, but not read.
    columns = min(plan.block_n, gemm.n)
    bytes_in = (plan.block_m + columns) * gemm.k * gemm.element
    share = cost.CONSTANTS["wide" if plan.block_m >= 64 else "narrow"].value
    flops = 2.0 * plan.block_m * plan.block_n * gemm.k
    multiplied = flops / (cost.RATE[gemm.rate] * share)
    busy = max(multiplied, bytes_in / cost.INGRESS, bytes_in * together / cost.L2)
    return -(-tiles // together), together, busy


def fused_time(plan: GemmPlan, gemm: GemmShape, sms: int) -> float:
    """Microseconds that the model gives a plan."""
    waves, together, busy = _busy(plan, gemm, sms)
    # An epilogue computes, or waits for what it reads and writes beside the GEMM.
    moved = plan.block_m * min(plan.block_n, gemm.n) * gemm.traffic
    epilogue = max(plan.block_m * plan.block_n * cost.EPILOGUE, moved * together / cost.L2)
    return cost.LAUNCH + waves * (busy + epilogue + (cost.EXCHANGE if plan.synced else 0.0))


def unfused_time(plans: list[GemmPlan], gemm: GemmShape, sms: int) -> float:
    """Microseconds that the model gives a plain GEMM and an element kernel after it.

    Args:
        plans: tiles of the plain GEMM, of which it takes the best, without an epilogue.
        gemm: what is to be computed.
        sms: multiprocessors of the device.
    """
    times = (_busy(p, gemm, sms) for p in plans)
    time = min(waves * busy for waves, _, busy in times)
    if gemm.rate == "ieee":
        time /= cost.CONSTANTS["library"].value
    # The GEMM is written and read in float32, on top of what the fused kernel moves.
    between = gemm.members * gemm.rows * gemm.n * (8 + gemm.traffic)
    return 2 * cost.LAUNCH + time + between / (cost.L2 if between < cost.IN_L2 else cost.HBM)


def model(gemm: GemmShape, limits: Limits) -> dict[GemmPlan | None, float]:
    """Microseconds that the cost model gives every candidate; None: plain GEMM, element kernel.

    Raises:
        ValueError: see :func:`candidates`.
    """
    plain = [
        make_plan(m, b, gemm.rows, gemm.n, limits.sms, gemm.element, limits.shared, waits=False)
        for m, b in SHARED_ROWS
        if b < gemm.n or b == SHARED_ROWS[0][1]
    ]
    found: dict[GemmPlan | None, float] = {
        p: fused_time(p, gemm, limits.sms) for p in candidates(gemm, limits)
    }
    found[None] = unfused_time([p for p in plain if p is not None], gemm, limits.sms)
    return found


def plan(
    gemm: GemmShape, limits: Limits, tuned: Mapping[str, Mapping[str, int]] | None = None
) -> GemmPlan | None:
    """How to launch a fused GEMM, or None: do not fuse it.

    Args:
        gemm: what is to be computed.
        limits: of the device.
        tuned: entries that come before the model, by :attr:`GemmShape.key`: see :func:`entry_plan`.

    Raises:
        ValueError: see :func:`candidates`; or a tuned entry does not fit.
    """
    gemm.check()
    entry = None if tuned is None else tuned.get(gemm.key)
    if entry is not None:
        return entry_plan(entry, gemm, limits)
    found = model(gemm, limits)
    return min(found, key=lambda p: found[p])


def entry_plan(entry: Mapping[str, int], gemm: GemmShape, limits: Limits) -> GemmPlan | None:
    """The plan of a tuned entry: a tile's ``block_m`` and ``block_n``; ``block_m`` 0: do not fuse.

    Raises:
        ValueError: the kernel has no such tile, or it does not fit sizes or device.
    """
    tuning.check(gemm.kernel, gemm.key, dict(entry))
    if not entry["block_m"]:
        return None
    found = {(p.block_m, p.block_n): p for p in candidates(gemm, limits)}
    tile = entry["block_m"], entry["block_n"]
    if tile not in found:
        fitting = ", ".join(p.name for p in found.values()) or "none"
        raise ValueError(
            f"{gemm.kernel} has no tile {tile[0]}x{tile[1]} that fits {gemm.rows} rows of "
            f"{gemm.n} on {limits.sms} multiprocessors with {limits.shared} bytes of shared "
            f"memory each; those that do: {fitting}"
        )
    return found[tile]


# --- on a device ----------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def device_limits(device: torch.device) -> tuple[str, Limits]:
    """Name and limits of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 163 * 1024)
    return properties.name, Limits(properties.multi_processor_count, int(shared))


@lru_cache(maxsize=64)
def _tuned(kernel: str, gpu: str, limits: Limits) -> Mapping[str, Mapping[str, int]]:
    def fits(key: str, entry: Mapping[str, int]) -> None:
        entry_plan(entry, gemm_shape(kernel, key), limits)

    return tuning.entries(gpu, kernel, fits)


@lru_cache(maxsize=4096)
def _chosen(gemm: GemmShape, gpu: str, limits: Limits) -> GemmPlan | None:
    return plan(gemm, limits, _tuned(gemm.kernel, gpu, limits))


def device_plan(gemm: GemmShape, device: torch.device) -> GemmPlan | None:
    """:func:`plan` for a device, with its tuned entries; chosen once, then looked up.

    On CPU tensors, which Triton's interpreter works on, the first plan whose programs do not wait:
    there nobody can.

    Args:
        gemm: what is to be computed; without rows, columns or a summed width there is no plan.
        device: of the tensors.

    Raises:
        ValueError: ``PWM_FAST_FUSED_PRODUCTS`` is neither 1 nor 0, which asks for no plan ever; or
            the GPU's file of tuned entries is wrong.
    """
    if min(gemm.rows, gemm.n, gemm.k) < 1 or not fusion_wanted():
        return None
    if device.type != "cuda":
        # Of any width: alignment, precision and how many variants there are matter on GPUs alone.
        block_n = _power_of_two(max(gemm.n, 64))
        return _plan(16, block_n, gemm, Limits(1)) if gemm.n <= WIDEST else None
    return _chosen(gemm, *device_limits(device))


def fusion_wanted() -> bool:
    """Whether ``PWM_FAST_FUSED_PRODUCTS`` allows any.

    Raises:
        ValueError: it is neither 1 nor 0.
    """
    choice = os.environ.get(VARIABLE) or "1"
    if choice not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {choice!r}")
    return choice == "1"


def _block_k(element: int) -> int:
    return 128 // element  # one line of shared memory


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
