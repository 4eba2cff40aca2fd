from typing import Literal

def cpu_isa() -> Literal["generic", "avx2", "avx512"]: ...
def build_info() -> dict[str, str | bool]: ...

# The kernels: csrc/cpu/kernels.h says what they compute. Addresses are of CPU memory, 0 where
# absent; ld_* are row strides in elements; types are 0 (fp32) and 1 (bf16); act is 0 (none),
# 1 (mish) or 2 (simnorm). ValueError names a size or a code that is wrong; addresses are believed.

def set_openmp(path: str) -> bool: ...
def norm_act_fwd(
    x: int,
    ld_x: int,
    x_type: int,
    add: int,
    ld_add: int,
    add_rows: int,
    tau: int,
    tau_stride: int,
    w_tau: int,
    bias: int,
    gamma: int,
    beta: int,
    y: int,
    ld_y: int,
    y_type: int,
    xhat: int,
    xhat_type: int,
    rstd: int,
    rows: int,
    n: int,
    act: int,
    group: int,
    eps: float,
    threads: int,
    width: int = 0,
) -> None: ...
def norm_act_bwd(
    dy: int,
    ld_dy: int,
    dy_type: int,
    xhat: int,
    xhat_type: int,
    rstd: int,
    gamma: int,
    beta: int,
    y: int,
    ld_y: int,
    y_type: int,
    dx: int,
    ld_dx: int,
    dx_type: int,
    dgamma: int,
    dbeta: int,
    dbias: int,
    rows: int,
    n: int,
    act: int,
    group: int,
    threads: int,
    width: int = 0,
) -> None: ...
def act_norm_fwd(
    x: int,
    ld_x: int,
    x_type: int,
    bias: int,
    gamma: int,
    beta: int,
    y: int,
    ld_y: int,
    y_type: int,
    u: int,
    u_type: int,
    mean: int,
    rstd: int,
    rows: int,
    n: int,
    act: int,
    rows_per_member: int,
    eps: float,
    threads: int,
) -> None: ...
def act_norm_bwd(
    dy: int,
    ld_dy: int,
    dy_type: int,
    u: int,
    u_type: int,
    mean: int,
    rstd: int,
    gamma: int,
    dx: int,
    ld_dx: int,
    dx_type: int,
    dgamma: int,
    dbeta: int,
    dbias: int,
    rows: int,
    n: int,
    act: int,
    rows_per_member: int,
    threads: int,
) -> None: ...
def simnorm_fwd(
    x: int,
    ld_x: int,
    y: int,
    ld_y: int,
    rows: int,
    n: int,
    group: int,
    threads: int,
) -> None: ...
def simnorm_bwd(
    dy: int,
    ld_dy: int,
    y: int,
    ld_y: int,
    dx: int,
    ld_dx: int,
    rows: int,
    n: int,
    group: int,
    threads: int,
) -> None: ...
def two_hot_decode_fwd(
    logits: int,
    ld: int,
    x_type: int,
    value: int,
    mean: int,
    lse: int,
    rows: int,
    bins: int,
    vmin: float,
    vmax: float,
    transform: bool,
    threads: int,
) -> None: ...
def two_hot_decode_bwd(
    dvalue: int,
    logits: int,
    ld: int,
    x_type: int,
    mean: int,
    lse: int,
    dlogits: int,
    ld_d: int,
    rows: int,
    bins: int,
    vmin: float,
    vmax: float,
    transform: bool,
    threads: int,
) -> None: ...
def two_hot_ce_fwd(
    logits: int,
    ld: int,
    x_type: int,
    x: int,
    loss: int,
    lse: int,
    rows: int,
    bins: int,
    vmin: float,
    vmax: float,
    transform: bool,
    threads: int,
) -> None: ...
def two_hot_ce_bwd(
    dloss: int,
    logits: int,
    ld: int,
    x_type: int,
    x: int,
    lse: int,
    dlogits: int,
    ld_d: int,
    rows: int,
    bins: int,
    vmin: float,
    vmax: float,
    transform: bool,
    threads: int,
) -> None: ...
def esnr(
    grads: int,
    sizes: int,
    signal: int,
    noise: int,
    m: int,
    tensors: int,
    threads: int,
) -> None: ...
def axpby(
    z: int, k1: int, k2: int, out: int, c1: float, c2: float, n: int, threads: int
) -> None: ...
def checksum(pieces: list[int], threads: int) -> int: ...

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
    grads: int,
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
    grads: int,
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
