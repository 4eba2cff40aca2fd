"""What the cost models know of a GPU: a few constants of an H200.

:func:`pwm_fast.kernels.plan.model` orders the tiles of fused GEMMs by them. None was measured
through these kernels: they order the choices, they are not promises. ``make gpu``
measures most of them, and ``python -m bench.tune`` says how far the model is off for each kernel.
"""

from __future__ import annotations

from typing import NamedTuple


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
    "ingress": Constant("reads of one SM from L2", 85.0, "GB/s", "assumed", "L2 read by one SM"),
    "l2": Constant("reads of data that L2 holds", 6.4, "TB/s", "literature", "L2 read, 12 MB"),
    "hbm": Constant("reads of device memory", 4.3, "TB/s", "other code", "HBM read"),
    "launch": Constant("start and drain of a GEMM", 1.6, "µs", "assumed", "small product"),
    "exchange": Constant(
        "barrier of a row block's programs, about a flag there and back",
        1.1,
        "µs",
        "assumed",
        "flag round trip",
    ),
    "epilogue": Constant("elements of an epilogue per cycle and SM", 4.5, "/clk/SM", "assumed"),
    "clock": Constant("clock of an SM", 1.755, "GHz", "assumed", "SM clock"),
    "16": Constant("16-bit GEMMs", 790.0, "TF/s", "other code", "product fp16 8192"),
    "tf32": Constant("GEMMs in tf32", 395.0, "TF/s", "assumed", "product tf32 8192"),
    "ieee": Constant("GEMMs in float32", 50.0, "TF/s", "assumed", "product fp32 8192"),
    "wide": Constant(
        "share of the rate that warpgroups reach, 64 rows a tile and more", 0.7, "", "assumed"
    ),
    "narrow": Constant("share of the rate that tiles of fewer rows reach", 0.35, "", "assumed"),
    "library": Constant("rate of the library's float32 GEMMs over tl.dot's", 2.0, "", "assumed"),
    "flags": Constant(
        "exchange of a persistent rollout by flags, without its data", 0.8, "µs", "assumed"
    ),
    "words": Constant("the same by words", 0.5, "µs", "assumed"),
    "shared": Constant("reads of an SM from its shared memory per cycle", 128.0, "B", "literature"),
    "rest": Constant("rest of an evaluation of it: Mish, sums, barriers", 0.8, "µs", "assumed"),
}
SMS = 132  # multiprocessors of the GPU that the rates of GEMMs are of
IN_L2 = 32e6  # bytes between two kernels that L2 still holds

INGRESS = CONSTANTS["ingress"].value * 1e3  # bytes a microsecond
L2 = CONSTANTS["l2"].value * 1e6
HBM = CONSTANTS["hbm"].value * 1e6
LAUNCH = CONSTANTS["launch"].value
EXCHANGE = CONSTANTS["exchange"].value
EPILOGUE = 1e-3 / (CONSTANTS["epilogue"].value * CONSTANTS["clock"].value)  # µs an element
RATE = {r: CONSTANTS[r].value * 1e6 / SMS for r in ("16", "tf32", "ieee")}  # FLOP a µs and SM
