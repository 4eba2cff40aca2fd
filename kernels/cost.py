"""The cost model that orders launch choices: a few constants of one GPU, and what they add up to.

A tile's loads come at what an SM takes in, its products run at the tensor cores' rate, then there
is its epilogue, and the exchange where a row lies in several tiles. The constants are an H200's.
None was measured through these kernels: they order the choices, they are not promises. ``make gpu``
measures most of them, and ``python -m bench.tune`` says how far the model is off for each kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pwm_fast.kernels.plan import Plan, Product
    from pwm_fast.kernels.rollout_plan import Plan as Layout


class Constant(NamedTuple):
    """A constant of the model.

    Attributes:
        text: what it is.
        value: in ``unit``.
        unit: of the value.
        source: ``assumed``, ``literature``, or ``other code`` (measured on an H200, not by ours).
        reading: the microbenchmark whose reading replaces it, in the same unit; None: only the
            tuner's ratios tell.
    """

    text: str
    value: float
    unit: str
    source: str
    reading: str | None = None


#: Everything that the model knows of a GPU.
CONSTANTS = {
    "ingress": Constant("what one SM reads from L2", 85.0, "GB/s", "assumed", "L2 read by one SM"),
    "l2": Constant("reading what L2 holds", 6.4, "TB/s", "literature", "L2 read, 12 MB"),
    "hbm": Constant("reading device memory", 4.3, "TB/s", "other code", "HBM read"),
    "launch": Constant("start and drain of a product", 1.6, "µs", "assumed", "small product"),
    "exchange": Constant(
        "a row block's programs meeting, about a flag to and fro",
        1.1,
        "µs",
        "assumed",
        "flag round trip",
    ),
    "epilogue": Constant("elements of an epilogue a cycle and SM", 4.5, "/clk/SM", "assumed"),
    "clock": Constant("cycles of an SM", 1.755, "GHz", "assumed", "SM clock"),
    "16": Constant("16-bit products", 790.0, "TF/s", "other code", "product fp16 8192"),
    "tf32": Constant("products in tf32", 395.0, "TF/s", "assumed", "product tf32 8192"),
    "ieee": Constant("products in float32", 50.0, "TF/s", "assumed", "product fp32 8192"),
    "wide": Constant("share of it by warpgroups, 64 rows a tile and more", 0.7, "", "assumed"),
    "narrow": Constant("share of it by tiles of fewer rows", 0.35, "", "assumed"),
    "library": Constant("the library's float32 products, of tl.dot's", 2.0, "", "assumed"),
    "flags": Constant(
        "a meeting of a persistent rollout by flags, less its data", 0.8, "µs", "assumed"
    ),
    "words": Constant("the same by words", 0.5, "µs", "assumed"),
    "shared": Constant("what an SM reads of its shared memory a cycle", 128.0, "B", "literature"),
    "rest": Constant(
        "what else an evaluation of it takes: Mish, sums, barriers", 0.8, "µs", "assumed"
    ),
}
SMS = 132  # multiprocessors of the GPU that the rates of products are of
_IN_L2 = 32e6  # bytes between two kernels that L2 still holds

_INGRESS = CONSTANTS["ingress"].value * 1e3  # bytes a microsecond
_L2 = CONSTANTS["l2"].value * 1e6
_HBM = CONSTANTS["hbm"].value * 1e6
_LAUNCH = CONSTANTS["launch"].value
_EXCHANGE = CONSTANTS["exchange"].value
_EPILOGUE = 1e-3 / (CONSTANTS["epilogue"].value * CONSTANTS["clock"].value)  # µs an element
_RATE = {r: CONSTANTS[r].value * 1e6 / SMS for r in ("16", "tf32", "ieee")}  # FLOP a µs and SM


def _busy(plan: Plan, product: Product, sms: int) -> tuple[int, int, float]:
    """Waves of tiles, tiles at once, and microseconds that a tile's product takes."""
    tiles = product.members * -(-product.rows // plan.block_m) * plan.tiles_n
    together = min(tiles, plan.programs if plan.synced else sms)
    # Columns beyond a row's end are multiplied, but not read.
    columns = min(plan.block_n, product.n)
    bytes_in = (plan.block_m + columns) * product.k * product.element
    share = CONSTANTS["wide" if plan.block_m >= 64 else "narrow"].value
    flops = 2.0 * plan.block_m * plan.block_n * product.k
    busy = max(
        flops / (_RATE[product.rate] * share), bytes_in / _INGRESS, bytes_in * together / _L2
    )
    return -(-tiles // together), together, busy


def fused(plan: Plan, product: Product, sms: int) -> float:
    """Microseconds that the model gives a plan."""
    waves, together, busy = _busy(plan, product, sms)
    # An epilogue computes, or waits for what it reads and writes beside the product.
    moved = plan.block_m * min(plan.block_n, product.n) * product.traffic
    epilogue = max(plan.block_m * plan.block_n * _EPILOGUE, moved * together / _L2)
    return _LAUNCH + waves * (busy + epilogue + (_EXCHANGE if plan.synced else 0.0))


def unfused(plans: list[Plan], product: Product, sms: int) -> float:
    """Microseconds that the model gives a plain product and an element kernel after it.

    Args:
        plans: tiles of the plain product, of which it takes the best, without an epilogue.
        product: what is to be computed.
        sms: multiprocessors of the device.
    """
    times = (_busy(p, product, sms) for p in plans)
    time = min(waves * busy for waves, _, busy in times)
    if product.rate == "ieee":
        time /= CONSTANTS["library"].value
    # The product is written and read in float32, on top of what the fused kernel moves.
    between = product.members * product.rows * product.n * (8 + product.traffic)
    return 2 * _LAUNCH + time + between / (_L2 if between < _IN_L2 else _HBM)


def rollout(layout: Layout, padded: int, element: int) -> float:
    """Microseconds that the model gives a forward evaluation of the persistent rollout.

    Args:
        layout: of its programs.
        padded: Up.
        element: bytes of an operand's number.
    """
    # A warp multiplies shares of 16 by 8, whose operands it reads from shared memory; with fewer
    # shares than warps some are computed more than once.
    shares = max(layout.bm * layout.bn // (16 * 8), layout.warps)
    bytes_read = shares * (16 + 8) * padded * element
    clock = CONSTANTS["clock"].value * 1e3  # cycles a microsecond
    product = bytes_read / (CONSTANTS["shared"].value * clock)
    travels = 2 * element if layout.exchange == "words" else element
    data = layout.bm * padded * travels / _INGRESS
    # Two layers, each with a product and two meetings, of which one is about all activations.
    return 2 * (product + 2 * CONSTANTS[layout.exchange].value + data) + CONSTANTS["rest"].value
