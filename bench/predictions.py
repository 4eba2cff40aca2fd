"""What the design expects of a GPU, beside which measurements are shown.

Nothing here was measured on a GPU by this project's code: these are the design's assumptions, the
output of its cost model for an H200, and the figures that are aimed at. A result never comes from
this file.
"""

from __future__ import annotations

from typing import NamedTuple


class Assumption(NamedTuple):
    """A constant of the cost model.

    Attributes:
        text: what it is.
        value: what is assumed; None where the model has no figure.
        unit: of the value.
        source: ``assumed``, ``literature``, or ``other code`` (measured, but not by this command).
        to: the end of a range that begins with the value.
    """

    text: str
    value: float | None
    unit: str
    source: str = "assumed"
    to: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "no figure"
        end = "" if self.to is None else f" to {self.to:g}"
        return f"{self.value:g}{end} {self.unit}"


# By name of the reading that replaces it (bench/micro.py and the programs of bench/cuda).
ASSUMPTIONS = {
    "graph node": Assumption("a kernel node in a CUDA graph", 1.3, "µs", "literature"),
    "graph node, PDL": Assumption("the same, launched programmatically", 0.7, "µs"),
    "small product": Assumption("start and drain of a small product, in a graph", 1.6, "µs"),
    "eager operation": Assumption("an eager operation on the host, with its launch", 6.5, "µs"),
    "flag round trip": Assumption("a flag to and fro through L2, by Triton's atomics", None, "µs"),
    "flag round trip, st.release and ld.acquire": Assumption(
        "the same by stores and loads", None, "µs"
    ),
    "L2 read, 12 MB": Assumption("reading 12 MB that L2 holds", 6.4, "TB/s", "literature"),
    "L2 read, 56 MB": Assumption("reading 56 MB, about L2's size", None, "TB/s"),
    "L2 read by one SM": Assumption("what one SM reads from L2", 85.0, "GB/s"),
    "L2 read by one SM, a cycle": Assumption("the same a cycle, at most", 64.0, "B"),
    "L2 read by each SM": Assumption("what each of all SMs reads from L2", None, "GB/s"),
    "L2 read by TMA, 12 MB": Assumption("reading 12 MB that L2 holds, by TMA", None, "TB/s"),
    "L2 read by TMA by one SM": Assumption("what one SM reads from L2 by TMA", None, "GB/s"),
    "HBM read": Assumption("reading device memory", 4.3, "TB/s", "other code"),
    "HBM copy": Assumption(
        "copying device memory, bytes read and written", 4.3, "TB/s", "other code"
    ),
    "product bf16 8192": Assumption("a 16-bit product of 8192 cubed", 790.0, "TF/s", "other code"),
    "product fp16 8192": Assumption("the same in fp16", 790.0, "TF/s"),
    "product tf32 8192": Assumption("the same in tf32", 395.0, "TF/s"),
    "product fp32 8192": Assumption("the same in float32", 50.0, "TF/s"),
    "Mish": Assumption(
        "Mish elements a cycle and SM: 16 special functions, 2 each", 8.0, "/clk/SM"
    ),
    "Mish in Triton": Assumption("the same as the project's kernels form it", None, "/clk/SM"),
    "SM clock": Assumption("cycles of an SM under a light load", None, "GHz"),
    "clusters of 4 at once": Assumption("clusters of 4 blocks at once", None, "clusters"),
    "clusters of 8 at once": Assumption("clusters of 8 blocks at once", 16.0, "clusters"),
    "clusters of 16 at once": Assumption("clusters of 16 blocks at once", None, "clusters"),
    "DSMEM load": Assumption(
        "a load of another block's shared memory", 180.0, "cycles", "literature", 200.0
    ),
    "DSMEM hop": Assumption("a number to another block by st.async", 200.0, "cycles"),
    "all-gather of 8 KB, st.async": Assumption("8 KB gathered by 8 blocks", 300.0, "cycles"),
    "all-gather of 64 KB, st.async": Assumption(
        "64 KB, of which 56 come at 32 to 14 B a cycle", 1792.0, "cycles", "literature", 4096.0
    ),
    "all-gather of 64 KB, L2 and TMA multicast": Assumption(
        "the same through L2 and multicast", None, "cycles"
    ),
    "wgmma RS, layer of 64 x 512 by 8": Assumption(
        "a layer of 64 x 512 by 8 rows on wgmma, and its wait", 120.0, "cycles"
    ),
    "wgmma RS m64n64k16, two warpgroups": Assumption(
        "a wgmma m64n64k16 at 4096 FLOP a cycle", 32.0, "cycles"
    ),
    "mma.sync m16n8k16, 16 warps": Assumption("an mma.sync m16n8k16 on 16 warps", None, "cycles"),
}

# Imagined rollout forward and backward to the actor, H = 16: milliseconds of the cost model.
# (model, batch, K): eager fp32, compile + graph in tf32, the same in 16 bit, this project's plan.
ROLLOUT_MODEL = {
    ("5M", 64, 4): (30.8, 9.4, 8.6, None),
    ("5M", 128, 4): (30.8, 9.5, 8.7, 1.6),
    ("5M", 128, 1): (15.7, 4.7, 4.4, None),
    ("5M", 512, 4): (30.8, 10.5, 9.1, 2.5),
    ("5M", 2048, 4): (43.0, 14.4, 11.9, 3.9),
    ("5M", 16384, 4): (273.0, 56.0, 37.5, 14.8),
    ("48M", 128, 4): (31.0, 11.0, 9.8, 3.95),
    ("48M", 512, 4): (60.0, 15.9, 12.4, 5.6),
    ("48M", 2048, 4): (187.0, 35.0, 22.8, 15.3),
    ("48M", 16384, 4): (1400.0, 218.0, 123.0, 95.0),
    ("317M", 128, 4): (63.0, 17.0, 12.3, 7.1),
    ("317M", 512, 4): (205.0, 35.0, 22.2, 15.0),
    ("317M", 2048, 4): (776.0, 112.0, 61.6, 53.0),
    ("317M", 16384, 4): (5940.0, 814.0, 430.0, 392.0),
}
# One pass over M x P float32 at 4.3 TB/s, times the 1.1 that is aimed at: milliseconds.
ESNR_MODEL = {
    ("5M", 4): 0.02,
    ("5M", 16): 0.07,
    ("5M", 64): 0.30,
    ("48M", 4): 0.18,
    ("48M", 16): 0.71,
    ("48M", 64): 2.86,
    ("317M", 4): 1.18,
    ("317M", 16): 4.72,
    ("317M", 64): 18.9,
}
ESNR_SHARE = 1.1
EPOCH_AIM = 10.0  # milliseconds: updates of an epoch of pwm_5M_flow at K = 2
