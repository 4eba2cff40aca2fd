from collections.abc import Callable
from typing import Literal

from torch import Tensor

def cpu_isa() -> Literal["generic", "avx2", "avx512"]: ...
def build_info() -> dict[str, str | bool]: ...

# The kernels of csrc/cpu/ops.def; the headers of csrc/cpu say what they compute. Tensors are on the
# CPU and have a last stride of 1; None is absent; of `threads` it is torch's. ValueError names
# an argument that is wrong, also one whose size does not fit the others; TypeError one that is
# missing, unknown or of another type. Addresses in tables are believed.

Act = Literal["none", "mish", "simnorm"]
KERNELS: tuple[str, ...]

def set_openmp(path: str) -> bool: ...
def set_thread_count(function: Callable[[], int]) -> None: ...
def checksum(pieces: list[int], threads: int) -> int: ...
def norm_act_fwd(
    x: Tensor,
    y: Tensor,
    xhat: Tensor | None = None,
    rstd: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    act: Act,
    group: int,
    eps: float,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    tau: Tensor | None = None,
    w_tau: Tensor | None = None,
    width: int | None = None,
    threads: int | None = None,
) -> None: ...
def norm_act_bwd(
    dy: Tensor,
    dx: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    y: Tensor | None = None,
    *,
    act: Act,
    group: int,
    dgamma: Tensor | None = None,
    dbeta: Tensor | None = None,
    dbias: Tensor | None = None,
    width: int | None = None,
    dy_scale: None = None,
    dx_scale: None = None,
    threads: int | None = None,
) -> None: ...
def act_norm_fwd(
    x: Tensor,
    y: Tensor,
    u: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    act: Act,
    eps: float,
    rows_per_member: int | None = None,
    threads: int | None = None,
) -> None: ...
def act_norm_bwd(
    dy: Tensor,
    dx: Tensor,
    u: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    act: Act,
    rows_per_member: int | None = None,
    dgamma: Tensor | None = None,
    dbeta: Tensor | None = None,
    dbias: Tensor | None = None,
    dy_scale: None = None,
    dx_scale: None = None,
    threads: int | None = None,
) -> None: ...
def simnorm_fwd(
    x: Tensor,
    y: Tensor,
    group: int,
    threads: int | None = None,
) -> None: ...
def simnorm_bwd(
    dy: Tensor,
    y: Tensor,
    dx: Tensor,
    group: int,
    threads: int | None = None,
) -> None: ...
def two_hot_decode_fwd(
    logits: Tensor,
    value: Tensor,
    mean: Tensor | None,
    lse: Tensor | None,
    vmin: float,
    vmax: float,
    transform: bool,
    threads: int | None = None,
) -> None: ...
def two_hot_decode_bwd(
    dvalue: Tensor,
    logits: Tensor,
    mean: Tensor,
    lse: Tensor,
    dlogits: Tensor,
    vmin: float,
    vmax: float,
    transform: bool,
    threads: int | None = None,
) -> None: ...
def two_hot_ce_fwd(
    logits: Tensor,
    x: Tensor,
    loss: Tensor,
    lse: Tensor | None,
    vmin: float,
    vmax: float,
    transform: bool,
    threads: int | None = None,
) -> None: ...
def two_hot_ce_bwd(
    dloss: Tensor,
    logits: Tensor,
    x: Tensor,
    lse: Tensor,
    dlogits: Tensor,
    vmin: float,
    vmax: float,
    transform: bool,
    threads: int | None = None,
) -> None: ...
def axpby(
    z: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    out: Tensor,
    c1: float,
    c2: float,
    threads: int | None = None,
) -> None: ...
def esnr(
    grads: Tensor,
    sizes: Tensor,
    signal: Tensor,
    noise: Tensor,
    threads: int | None = None,
) -> None: ...

# GPUs: csrc/cuda. Without CUDA in the build, cuda_devices and cuda_why_not say so, and launches
# raise RuntimeError with that; else with what CUDA says of a launch that fails. Addresses: rows and
# sizes are of the CPU, int64 [rows, tensors] and [tensors]; the others are of the device, float64
# [tensors], and int64 [words]. Types are 0 (fp32), 1 (bf16) and 2 (fp16). Launches are not waited
# for. The emulations, for tests, do the same in the CPU's memory, to the same bits, in an order of
# blocks that `order` picks (0: first to last).

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
