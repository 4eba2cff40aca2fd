from collections.abc import Callable
from typing import Literal

from torch import Tensor

def cpu_isa() -> Literal["generic", "avx2", "avx512"]: ...
def build_info() -> dict[str, str | bool]: ...

# The kernels of csrc/cpu/ops.def; the headers of csrc/cpu say what they compute. Tensors are on the
# CPU and have a last stride of 1; None is absent; of `threads` it is torch's. ValueError names
# an argument that is wrong, also one whose size does not fit the others; TypeError one that is
# missing, unknown or of another type. Addresses in tables are believed.

KERNELS: tuple[str, ...]

def set_openmp(path: str) -> bool: ...
def set_thread_count(function: Callable[[], int]) -> None: ...
def checksum(pieces: list[int], threads: int) -> int: ...

# Steps that are done for one block of rows after another: csrc/cpu/row_program.h.
class RowProgram:
    STEPS: dict[str, int]
    def __init__(
        self,
        slots: list[tuple[str, int, int, int, int, int, int]],
        packs: list[tuple[tuple[int, int], bool]],
        totals: list[tuple[int, int]],
        instructions: list[
            tuple[int, tuple[tuple[int, int], ...], tuple[int, ...], tuple[float, ...]]
        ],
    ) -> None: ...
    def run(self, tensors: list[Tensor], rows: int, threads: int) -> None: ...

# Any other name is a kernel: help(_C.norm_act_fwd) shows its arguments.
def __getattr__(name: str) -> Callable[..., None]: ...
def cuda_devices() -> tuple[int, str]: ...
def cuda_why_not(device: int) -> str: ...
def esnr_workspace_words(sizes: int, tensors: int, rows: int) -> int: ...
def cuda_esnr(
    rows: int,
    sizes: int,
    type: int,
    signal: int,
    noise: int,
    m: int,
    tensors: int,
    workspace: int,
    words: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_esnr_update(
    rows: int,
    sizes: int,
    type: int,
    squares: int,
    tensors: int,
    workspace: int,
    words: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_esnr_result(
    rows: int,
    sizes: int,
    type: int,
    squares: int,
    signal: int,
    noise: int,
    m: int,
    tensors: int,
    workspace: int,
    words: int,
    device: int,
    stream: int,
) -> None: ...
def emulated_esnr(
    rows: int,
    sizes: int,
    type: int,
    signal: int,
    noise: int,
    m: int,
    tensors: int,
    workspace: int,
    words: int,
    order: int,
) -> None: ...
def emulated_esnr_update(
    rows: int,
    sizes: int,
    type: int,
    squares: int,
    tensors: int,
    workspace: int,
    words: int,
    order: int,
) -> None: ...
def emulated_esnr_result(
    rows: int,
    sizes: int,
    type: int,
    squares: int,
    signal: int,
    noise: int,
    m: int,
    tensors: int,
    workspace: int,
    words: int,
    order: int,
) -> None: ...
