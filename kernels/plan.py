"""Which tiles a fused product is launched with, or that it had better not be fused.

The choice is the least of a small cost model: a tile's loads at what an SM takes in, its products
at the tensor cores' rate, its epilogue, and the exchange where a row lies in several tiles. The
constants are an H200's, partly assumed and not yet measured through these kernels; they order the
choices, they are not promises. Entries of :mod:`pwm_fast.kernels.tuning` come before it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from pwm_fast.kernels.tuning import load

VARIABLE = "PWM_FAST_FUSED_PRODUCTS"

#: Tiles ``(BLOCK_M, BLOCK_N)`` of rows that lie in several tiles.
SHARED_ROWS = ((16, 64), (32, 64), (64, 64), (64, 128), (128, 128), (64, 256))
#: Rows of a tile that holds whole rows, and the widest such row.
WHOLE_ROWS = (16, 32, 64)
WIDEST = 512
#: Rows of such a tile where a row's end is masked: with 64, as warpgroup products, it spills.
GROUPED_ROWS = (16, 32)
#: Elements of a tile, and of one in a backward pass: larger ones spill in the epilogue.
LARGEST, LARGEST_BACKWARD = 16384, 8192
#: Column tiles that a row may lie in.
MOST_TILES = 64

_INGRESS = 85e3  # bytes a microsecond into one SM
_L2 = 6.4e6  # bytes a microsecond, all SMs
_HBM = 4.3e6
_LAUNCH = 1.6  # microseconds to start and drain a product
_EXCHANGE = 1.1  # microseconds until a row block's programs have met
_EPILOGUE = 0.22 / 1755.0  # microseconds an element
_FLOPS = {"16": 5.98e6, "tf32": 2.99e6, "tf32x3": 1.0e6, "bf16x3": 1.99e6, "ieee": 0.38e6}


@dataclass(frozen=True)
class Plan:
    """How one fused product is launched.

    Attributes:
        block_m: rows of a tile.
        block_n: columns of a tile.
        block_k: summed at once.
        warps: of a program.
        stages: of software pipelining.
        tiles_n: column tiles that a row lies in; 1: no exchange.
        groups: row blocks in flight; ``groups * tiles_n`` programs.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tiles_n: int
    groups: int

    @property
    def programs(self) -> int:
        """Programs of a launch."""
        return self.groups * self.tiles_n

    @property
    def synced(self) -> bool:
        """Programs wait for one another: the launch has to be cooperative."""
        return self.tiles_n > 1


def make_plan(
    block_m: int,
    block_n: int,
    rows: int,
    n: int,
    sms: int,
    element: int,
    shared: int,
    backward: bool = False,
) -> Plan | None:
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
    """
    tiles_m, tiles_n = _cdiv(rows, block_m), _cdiv(n, block_n)
    largest = LARGEST_BACKWARD if backward else LARGEST
    if tiles_n > min(sms, MOST_TILES) or block_m * block_n > largest:
        return None
    block_k = 128 // element  # one line of shared memory
    stages = min(4, (shared - 8192) // ((block_m + block_n) * block_k * element))
    if stages < 2:
        return None
    # At most 64 accumulators a thread: the epilogue holds about as much again, backward more.
    # Products of few rows take their operands through registers as well.
    fewer = backward or block_m < 32
    warps = max(4, block_m * block_n // (1024 if fewer else 2048))
    groups = tiles_m if tiles_n == 1 else min(tiles_m, sms // tiles_n)
    return Plan(block_m, block_n, block_k, warps, stages, tiles_n, groups)


def candidates(
    rows: int,
    n: int,
    sms: int,
    *,
    element: int = 2,
    shared: int = 227 * 1024,
    backward: bool = False,
) -> list[Plan]:
    """Every plan that fits, for a tuner to try."""
    shapes = [] if n > WIDEST else [(m, _power_of_two(max(n, 64))) for m in WHOLE_ROWS]
    shapes += [(m, b) for m, b in SHARED_ROWS if b < n]
    plans = [make_plan(m, b, rows, n, sms, element, shared, backward) for m, b in shapes]
    return [p for p in plans if p is not None]


def _busy(plan: Plan, rows: int, k: int, sms: int, element: int, rate: str) -> tuple[int, float]:
    """Waves of tiles, and microseconds that the model gives a tile's product."""
    tiles = _cdiv(rows, plan.block_m) * plan.tiles_n
    together = min(tiles, plan.programs if plan.synced else sms)
    bytes_in = (plan.block_m + plan.block_n) * k * element
    # Tiles of fewer than 64 rows do not reach the warpgroup products.
    efficiency = 0.7 if plan.block_m >= 64 else 0.35
    products = 2.0 * plan.block_m * plan.block_n * k / (_FLOPS[rate] * efficiency)
    return _cdiv(tiles, together), max(products, bytes_in / _INGRESS, bytes_in * together / _L2)


def cost(plan: Plan, rows: int, k: int, sms: int, element: int, rate: str) -> float:
    """Microseconds that the model gives a plan."""
    waves, busy = _busy(plan, rows, k, sms, element, rate)
    epilogue = plan.block_m * plan.block_n * _EPILOGUE
    return _LAUNCH + waves * (busy + epilogue + (_EXCHANGE if plan.synced else 0.0))


def unfused_cost(rows: int, n: int, k: int, sms: int, element: int, rate: str) -> float:
    """Microseconds that the model gives a plain product and an element kernel after it.

    The product is the best of the same tiles without epilogue and exchange.
    """
    shapes = [p for p in candidates(rows, n, sms, element=element) if p.tiles_n > 1 or n <= 64]
    busy = [_busy(p, rows, k, sms, element, rate) for p in shapes]
    product = min((waves * each for waves, each in busy), default=0.0)
    if rate == "ieee":  # cuBLAS's float32 products make better use of the cores than tl.dot's
        product *= 0.5
    between = 2 * rows * n * 4 + 2 * rows * n * element  # fp32 written and read, y and xhat
    return 2 * _LAUNCH + product + between / (_L2 if between < 32e6 else _HBM)


def plan(
    rows: int,
    n: int,
    k: int,
    sms: int,
    *,
    element: int = 2,
    input_precision: str = "tf32",
    shared: int = 227 * 1024,
    backward: bool = False,
    tuned: Mapping[str, Mapping[str, int]] | None = None,
) -> Plan | None:
    """How to launch a fused product ``[rows, k] [n, k]^T``, or None: do not fuse it.

    Args:
        rows: of the result.
        n: columns of the result.
        k: summed over.
        sms: multiprocessors of the device.
        element: bytes of an operand's element.
        input_precision: of fp32 operands, as ``tl.dot`` names it.
        shared: bytes of shared memory that a program may have.
        backward: the plan is for a backward kernel.
        tuned: entries that come before the model: :func:`key` to a plan's fields ``block_m`` and
            ``block_n`` (others optional); ``block_m`` 0 says not to fuse.

    Raises:
        ValueError: a size is not positive, or a tuned entry does not fit the shapes.
    """
    if min(rows, n, k, sms) < 1:
        raise ValueError(f"sizes must be positive, got rows={rows}, n={n}, k={k}, sms={sms}")
    rate = "16" if element == 2 else input_precision
    name = key(rows, n, k, rate)
    if tuned is not None and name in tuned:
        return _tuned(name, tuned[name], rows, n, sms, element, shared, backward)
    found = candidates(rows, n, sms, element=element, shared=shared, backward=backward)
    if not found:
        return None
    best = min(found, key=lambda p: cost(p, rows, k, sms, element, rate))
    if cost(best, rows, k, sms, element, rate) > unfused_cost(rows, n, k, sms, element, rate):
        return None
    return best


def whole_rows(
    block_m: int,
    rows: int,
    n: int,
    element: int,
    shared: int,
    backward: bool = False,
) -> Plan | None:
    """The plan of tiles that hold whole rows of one member each, or None where it does not fit.

    Args:
        block_m: rows of a tile.
        rows: of a member.
        n: columns of the result.
        element: bytes of an operand's element.
        shared: bytes of shared memory that a program may have.
        backward: its epilogue holds more.
    """
    if n > WIDEST:
        return None
    block_n = _power_of_two(max(n, 64))
    return make_plan(block_m, block_n, rows, n, 1, element, shared, backward)


def grouped_plan(
    rows: int,
    members: int,
    n: int,
    k: int,
    sms: int,
    *,
    element: int = 2,
    input_precision: str = "tf32",
    shared: int = 227 * 1024,
    backward: bool = False,
) -> Plan | None:
    """How to launch a fused product of each of an ensemble's members, whole rows a tile.

    None says not to fuse it. The grid is ``[plan.groups, members]``.

    Args:
        rows: of a member.
        members: of the ensemble; 1: a layer alone.
        n: columns of the result.
        k: summed over.
        sms: multiprocessors of the device.
        element: bytes of an operand's element.
        input_precision: of fp32 operands, as ``tl.dot`` names it.
        shared: bytes of shared memory that a program may have.
        backward: the plan is for a backward kernel.

    Raises:
        ValueError: a size is not positive.
    """
    if min(rows, members, n, k, sms) < 1:
        raise ValueError(
            f"sizes must be positive, got rows={rows}, members={members}, n={n}, k={k}, sms={sms}"
        )
    if not backward and k % 16:
        return None  # the weight's rows would be read number by number, which spills
    rate = "16" if element == 2 else input_precision
    made = [whole_rows(m, rows, n, element, shared, backward) for m in GROUPED_ROWS]
    found = {
        p: cost(p, members * p.groups * p.block_m, k, sms, element, rate)
        for p in made
        if p is not None
    }
    if not found:
        return None
    best = min(found, key=lambda p: found[p])
    if found[best] > unfused_cost(members * rows, n, k, sms, element, rate):
        return None
    return best


def key(rows: int, n: int, k: int, rate: str) -> str:
    """Name of a tuned entry; rows count by the power of two that holds them."""
    return f"{rate} R{_power_of_two(rows)} N{n} K{k}"


def _tuned(
    name: str,
    entry: Mapping[str, int],
    rows: int,
    n: int,
    sms: int,
    element: int,
    shared: int,
    backward: bool,
) -> Plan | None:
    fields = dict(entry)
    try:
        block_m, block_n = fields.pop("block_m"), fields.pop("block_n", 0)
    except KeyError as error:
        raise ValueError(f"tuned entry {name!r} has no {error}") from error
    if block_m == 0:
        return None
    made = None
    if block_n:
        made = make_plan(block_m, block_n, rows, n, sms, element, shared, backward)
    unknown = set(fields) - {"block_k", "warps", "stages"}
    if made is None or unknown:
        raise ValueError(
            f"tuned entry {name!r} does not fit {rows} rows of {n} on {sms} multiprocessors, "
            f"or has unknown fields: {dict(entry)}"
        )
    values = {**made.__dict__, **fields}
    return Plan(**values)


@lru_cache(maxsize=16)
def _limits(device: torch.device) -> tuple[int, int, str]:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 163 * 1024)
    return properties.multi_processor_count, int(shared), properties.name


def device_plan(
    kernel: str,
    rows: int,
    n: int,
    k: int,
    element: int,
    device: torch.device,
    input_precision: str,
) -> Plan | None:
    """:func:`plan` for a device, with its tuned entries.

    On CPU tensors, which Triton's interpreter works on, a plan of whole rows or none: there nobody
    can wait.

    Args:
        kernel: whose entries: ``"linear_norm_act_fwd"``, ``"linear_norm_act_bwd"`` or
            ``"linear_axpby"``, whose epilogue holds as much as a backward one.
        rows: of the result.
        n: columns of the result.
        k: summed over.
        element: bytes of an operand's element.
        device: of the tensors.
        input_precision: of fp32 operands.

    Raises:
        ValueError: ``PWM_FAST_FUSED_PRODUCTS`` is neither 1 nor 0, which asks for no plan ever.
    """
    if min(rows, n, k) < 1 or not _wanted():
        return None
    backward = not kernel.endswith("fwd")
    if device.type != "cuda":
        found = candidates(rows, n, 1, element=element, backward=backward)
        return next((p for p in found if not p.synced), None)
    sms, shared, name = _limits(device)
    return plan(
        rows,
        n,
        k,
        sms,
        element=element,
        input_precision=input_precision,
        shared=shared,
        backward=backward,
        tuned=load(name).get(kernel),
    )


def device_grouped_plan(
    rows: int,
    members: int,
    n: int,
    k: int,
    element: int,
    device: torch.device,
    input_precision: str,
    *,
    backward: bool,
) -> Plan | None:
    """:func:`grouped_plan` for a device; on CPU tensors the first plan that fits.

    Args:
        rows: of a member.
        members: of the ensemble; 1: a layer alone.
        n: columns of the result.
        k: summed over.
        element: bytes of an operand's element.
        device: of the tensors.
        input_precision: of fp32 operands.
        backward: the plan is for a backward kernel.

    Raises:
        ValueError: ``PWM_FAST_FUSED_PRODUCTS`` is neither 1 nor 0, which asks for no plan ever.
    """
    if min(rows, members, n, k) < 1 or not _wanted():
        return None
    if device.type != "cuda":
        return whole_rows(GROUPED_ROWS[0], rows, n, element, 163 * 1024, backward)
    sms, shared, _ = _limits(device)
    return grouped_plan(
        rows,
        members,
        n,
        k,
        sms,
        element=element,
        input_precision=input_precision,
        shared=shared,
        backward=backward,
    )


def _wanted() -> bool:
    choice = os.environ.get(VARIABLE) or "1"
    if choice not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {choice!r}")
    return choice == "1"


class Exchange:
    """Slots and counters of launches that follow one another on one stream.

    Counters start from zero and only grow, so whoever runs a sequence of launches makes one of
    these at its beginning (in a captured sequence the zeroing is part of the graph) and never
    shares it with launches that may run at the same time.

    Args:
        plan: of the launches.
        rows: of their results.
        planes: values a row and tile; the most that any of the launches exchanges.
        device: of the tensors.
    """

    def __init__(self, plan: Plan, rows: int, planes: int, device: torch.device) -> None:
        tiles_m = _cdiv(rows, plan.block_m)
        self.stride = tiles_m * plan.block_m
        self.planes = planes
        self.tiles_n = plan.tiles_n
        self.slots = torch.empty(planes * plan.tiles_n * self.stride, device=device)
        # COUNTER_STRIDE of kernels/tile.py, which cannot be imported without triton
        self.counters = torch.zeros(tiles_m * 32, dtype=torch.int32, device=device)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
