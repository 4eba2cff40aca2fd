"""``python -m bench.prewarm``: fill Triton's cache with what an H100 will launch, without one.

Whole updates of the algorithms in the precisions, of tasks that terminate and of those that do not,
go through the launch path of a GPU (``FakeCuda(compile=True)``), so what a process with a GPU looks
up in the cache (``TRITON_CACHE_DIR``) is there. It must have the same Triton of the same Python and
the same sources of the kernels; where they lie, and which PyTorch it has, does not matter
(docs/kernels.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from bench.fake_cuda import FakeCuda
from bench.launches import count
from bench.plain import algorithm

ALGS = ("pwm_5M_flow", "pwm_5M", "pwm_48M_flow")
PRECISIONS = ("fast", "tf32", "bf16", "exact")


class Prewarmed(NamedTuple):
    """What is in the cache now.

    Attributes:
        kernels: that were launched, each with all that it was specialised for.
        compiled: of these, as they were not in the cache.
    """

    kernels: int
    compiled: int


def prewarm(algs: Sequence[str] = ALGS, precisions: Sequence[str] = PRECISIONS) -> Prewarmed:
    """Compile all that whole updates launch on an H100.

    Kernels that this process has launched before are not counted again.

    Args:
        algs: configurations of ``configs/alg``.
        precisions: of products.

    Raises:
        NoLauncherError: there is no C compiler, or there is a GPU.
        ValueError: no such algorithm or precision.
    """
    cuda = FakeCuda(compile=True)
    for alg in algs:
        for precision in precisions:
            for ends in (False, True):
                count(algorithm(alg), "triton", precision, can_terminate=ends, cuda=cuda)
    return Prewarmed(cuda.loaded.total(), cuda.compiled.total())


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the cache and say how many kernels that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alg", nargs="+", default=ALGS, metavar="ALG")
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    options = parser.parse_args(arguments)
    found = prewarm(options.alg, options.precision)
    print(f"{found.kernels} kernels, {found.compiled} of them compiled")


if __name__ == "__main__":
    main()
