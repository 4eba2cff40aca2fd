"""SimNorm, a softmax over consecutive groups of a row, forward and backward.

Groups lie one after another whatever the rows are, so a program takes a tile ``[groups, width]`` of
them. Any group width up to what a program keeps in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.launch import MAX_WIDTH, Tile, launch
from pwm_fast.kernels.pointwise import rounded

_NUMBERS = 1024  # of a program


@triton.jit
def simnorm_fwd_kernel(x, y, groups, width, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """``y = softmax(x)`` of every group."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    col = tl.arange(0, WIDTH)
    inside = (group < groups)[:, None] & (col < width)[None, :]
    at = group.to(tl.int64)[:, None] * width + col[None, :]
    v = tl.load(x + at, mask=inside, other=-float("inf")).to(tl.float32)
    # A group beyond the last has no largest entry: NaN there, which is not stored.
    e = tl.exp(v - tl.max(v, axis=1)[:, None])
    s = e / tl.sum(e, axis=1)[:, None]
    tl.store(y + at, rounded(s, y.dtype.element_ty), mask=inside)


@triton.jit
def simnorm_bwd_kernel(
    dy, y, dx, scale, groups, width, per_row, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    """``dx = y (dy - sum(dy y))`` of every group; ``dy`` may have a scale a row."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    col = tl.arange(0, WIDTH)
    group_in = group < groups
    inside = group_in[:, None] & (col < width)[None, :]
    at = group.to(tl.int64)[:, None] * width + col[None, :]
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        d *= tl.load(scale + group // per_row, mask=group_in, other=0.0)[:, None]
    result = s * (d - tl.sum(d * s, axis=1)[:, None])
    tl.store(dx + at, rounded(result, dx.dtype.element_ty), mask=inside)


def tile_of(group: int) -> Tile:
    """What a program works on: groups in place of rows.

    Raises:
        ValueError: a group does not fit.
    """
    if group > MAX_WIDTH:
        raise ValueError(f"groups of {group} features do not fit: at most {MAX_WIDTH}")
    width = triton.next_power_of_2(group)
    groups = max(1, _NUMBERS // width)
    return Tile(groups, width, min(max(groups * width // 256, 4), 16))


def simnorm_fwd(x: Tensor, y: Tensor, group: int) -> None:
    """``y = softmax`` over groups of ``x [R, n]``; both contiguous."""
    tile = tile_of(group)
    groups = x.numel() // group
    launch(
        simnorm_fwd_kernel,
        tile.grid(groups),
        x,
        y,
        groups,
        group,
        GROUPS=tile.rows,
        WIDTH=tile.block,
        num_warps=tile.warps,
    )


def simnorm_bwd(
    dy: Tensor, y: Tensor, dx: Tensor, group: int, dy_scale: Tensor | None = None
) -> None:
    """Gradient of :func:`simnorm_fwd`, from its result ``y``; all contiguous, ``dy_scale [R]``."""
    tile = tile_of(group)
    groups = y.numel() // group
    launch(
        simnorm_bwd_kernel,
        tile.grid(groups),
        dy,
        y,
        dx,
        dy_scale,
        groups,
        group,
        y.shape[-1] // group,
        GROUPS=tile.rows,
        WIDTH=tile.block,
        num_warps=tile.warps,
    )
