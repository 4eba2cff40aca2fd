"""Wrong arguments raise an error that names them; nothing is read or written."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.native.harness import _C

N = 8
ROWS = {  # kernel -> its matrices [rows, N], vectors [rows] and vectors [N]
    "norm_act_fwd": ("x y xhat add", "rstd tau", "gamma beta bias w_tau"),
    "norm_act_bwd": ("dy dx xhat y", "rstd", "gamma beta dgamma dbeta dbias"),
    "act_norm_fwd": ("x y u", "mean rstd", "bias gamma beta"),
    "act_norm_bwd": ("dy dx u", "mean rstd", "gamma dgamma dbeta dbias"),
    "simnorm_fwd": ("x y", "", ""),
    "simnorm_bwd": ("dy y dx", "", ""),
    "two_hot_decode_fwd": ("logits", "value mean lse", ""),
    "two_hot_decode_bwd": ("logits dlogits", "dvalue mean lse", ""),
    "two_hot_ce_fwd": ("logits", "x loss lse", ""),
    "two_hot_ce_bwd": ("logits dlogits", "dloss x lse", ""),
}
NUMBERS = {
    "act": "mish",
    "group": 4,
    "eps": 1e-5,
    "width": 0,
    "rows_per_member": 0,
    "vmin": 0.0,
    "vmax": 1.0,
    "transform": False,
    "threads": 1,
}
FP32_ALONE = ("add", "rstd", "tau", "gamma", "beta", "bias", "w_tau", "mean", "lse", "value")


def sums(name: str) -> bool:
    return name in ("dgamma", "dbeta", "dbias")


def good(kernel: str, rows: int = 2) -> dict[str, Any]:
    """Arguments that are right."""
    if kernel == "axpby":
        return {name: torch.zeros(rows, N) for name in ("z", "k1", "k2", "out")} | {
            "c1": 1.0,
            "c2": 1.0,
            "threads": 1,
        }
    if kernel == "esnr":
        grads = [torch.zeros(rows) for _ in range(6)]
        tables = {
            "grads": torch.tensor([g.data_ptr() for g in grads]).view(2, 3),
            "sizes": torch.full((3,), rows),
        }
        return tables | {k: torch.zeros(3).double() for k in ("signal", "noise")} | {"threads": 1}
    if kernel == "adam":
        names = ("params", "grads", "means", "squares")
        count = {name: torch.zeros(1, dtype=torch.int64) for name in ("skipped", "in_a_row")}
        return {
            "options": torch.ones(4).double(),
            **{name: [torch.zeros(rows, N), torch.zeros(3)] for name in names},
            "steps": [torch.zeros(2)],
            "rates": [torch.zeros(1)],
            "loss": torch.zeros(1),
            "norm": torch.zeros(1),
            **count,
            "keep": False,
            "threads": 1,
        }
    matrices, by_row, by_column = (names.split() for names in ROWS[kernel])
    tensors = {name: torch.zeros(rows, N) for name in matrices}
    tensors |= {name: torch.zeros(rows) for name in by_row}
    tensors |= {
        name: torch.zeros(N, dtype=torch.float64 if sums(name) else torch.float32)
        for name in by_column
    }
    if "add" in tensors:
        tensors["add"] = torch.zeros(1, N)
    names = inspect.signature(getattr(_C, kernel)).parameters
    return tensors | {name: value for name, value in NUMBERS.items() if name in names}


KERNELS = (*ROWS, "adam", "axpby", "esnr")
TENSORS = [(k, a) for k in KERNELS for a, value in good(k).items() if isinstance(value, Tensor)]
WRONG: dict[str, tuple[list[Any], str]] = {  # argument -> values, and what the message says
    "threads": ([0, -3], "at least 1"),
    "act": (["", "relu"], "none, mish or simnorm"),
    "width": ([-1, 9], "from 0 to n = 8"),
    "rows_per_member": ([-1], "at least 0"),
}
CASES = [(k, a, v) for k in KERNELS for a in good(k) for v in WRONG.get(a, ([], ""))[0]]


def fails(kernel: str, error: type[Exception], message: str, **changes: Any) -> None:
    """The call fails so, and has written nothing."""
    given = good(kernel) | changes
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor) and x.is_cpu}
    with pytest.raises(error, match=re.escape(message)):
        getattr(_C, kernel)(**given)
    for name, x in before.items():
        assert torch.equal(given[name], x), name


def test_all_kernels_are_here() -> None:
    assert set(KERNELS) == set(_C.KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [0, 2])
def test_right_arguments(kernel: str, rows: int) -> None:
    """By name and by position; of no rows too."""
    function, given = getattr(_C, kernel), good(kernel, rows)
    function(**given)
    function(**{"".join([*name]): value for name, value in given.items()})  # not interned
    names = inspect.signature(function).parameters
    function(*(given.get(name) for name in names))


@pytest.mark.parametrize("kernel", KERNELS)
def test_help_shows_the_arguments(kernel: str) -> None:
    """Those that a call may have: a name that is none of them is refused."""
    function = getattr(_C, kernel)
    assert set(good(kernel)) <= set(inspect.signature(function).parameters)
    assert function.__doc__


@pytest.mark.parametrize(("kernel", "argument", "value"), CASES)
def test_wrong_argument(kernel: str, argument: str, value: Any) -> None:
    expected = f"{argument} must be {WRONG[argument][1]}"
    fails(kernel, ValueError, expected, **{argument: value})
    fails(kernel, ValueError, f", got {value}", **{argument: value})


@pytest.mark.parametrize(("kernel", "argument"), TENSORS)
def test_wrong_tensor(kernel: str, argument: str) -> None:
    """Of another size, dtype, stride, device, or none."""
    right = good(kernel)[argument]
    assert isinstance(right, Tensor)
    longer = torch.zeros(right.numel() + 1, dtype=right.dtype)
    if right.dim() == 2:
        longer = torch.zeros(right.shape[0], right.shape[1] + 1, dtype=right.dtype)
    first = next(iter(good(kernel)))  # the others are measured against it
    if argument not in (first, "logits"):
        with pytest.raises(ValueError, match="must be "):
            getattr(_C, kernel)(**good(kernel) | {argument: longer})
    for dtype in (torch.float16, torch.int32, torch.bool):
        fails(kernel, ValueError, f"{argument} must be ", **{argument: right.to(dtype)})
    meta = torch.empty_like(right, device="meta")
    with pytest.raises((ValueError, RuntimeError, BufferError)):
        getattr(_C, kernel)(**good(kernel) | {argument: meta})
    every_other = torch.zeros(*right.shape[:-1], 2 * right.shape[-1], dtype=right.dtype)[..., ::2]
    if right.shape[-1] > 1:  # one number has no stride
        fails(
            kernel,
            ValueError,
            f"{argument} must be a tensor whose last stride is 1, got 2",
            **{argument: every_other},
        )
    for value in (right.numpy(), right.data_ptr(), "x"):
        fails(kernel, TypeError, f"{argument} must be a tensor", **{argument: value})


@pytest.mark.parametrize(
    ("kernel", "argument"), [c for c in TENSORS if c[1] in FP32_ALONE or sums(c[1])]
)
def test_wrong_precision(kernel: str, argument: str) -> None:
    wanted = "float64" if sums(argument) else "float32"
    for dtype in {torch.bfloat16, torch.float32, torch.float64} - {getattr(torch, wanted)}:
        wrong = good(kernel)[argument].to(dtype)
        fails(kernel, ValueError, f"{argument} must be {wanted}, got ", **{argument: wrong})


@pytest.mark.parametrize("kernel", KERNELS)
def test_arguments_that_do_not_belong(kernel: str) -> None:
    function, given = getattr(_C, kernel), good(kernel)
    fails(kernel, TypeError, f"{kernel}() has no argument 'scale'", scale=1)
    first = next(iter(inspect.signature(function).parameters))
    with pytest.raises(TypeError, match=f"got '{first}' twice"):
        function(given[first], **given)
    names = inspect.signature(function).parameters
    with pytest.raises(TypeError, match=f"takes {len(names)} arguments, got {len(names) + 1}"):
        function(*(given.get(name) for name in names), 1)
    rest = {name: value for name, value in given.items() if name != first}
    with pytest.raises(TypeError, match=f"lacks the argument '{first}'"):
        function(**rest)
    fails(kernel, TypeError, f"{first} must be a tensor, got None", **{first: None})


@pytest.mark.parametrize("kernel", ROWS)
def test_overlapping_rows(kernel: str) -> None:
    saved = ("xhat", "u", "add")  # "xhat" and "u" are contiguous
    for name in ROWS[kernel][0].split():
        near = torch.zeros(N + 7).as_strided((2, N), (7, 1))
        act = {"act": "simnorm"} if kernel == "norm_act_bwd" else {}  # else y is not read
        message = f"the row stride of {name} must be at least 8, got 7"
        if name in saved[:2]:
            message = f"{name} must be contiguous, got rows of 8 that are 7 apart"
        fails(kernel, ValueError, message, **{name: near}, **act)


@pytest.mark.parametrize("kernel", ["norm_act_fwd", "norm_act_bwd"])
@pytest.mark.parametrize("name", ["xhat"])
def test_saved_rows_with_gaps(kernel: str, name: str) -> None:
    apart = torch.zeros(2, N + 3)[:, :N]
    message = f"{name} must be contiguous, got rows of 8 that are 11 apart"
    fails(kernel, ValueError, message, **{name: apart})


def test_leading_dimensions_are_rows() -> None:
    x, y, flat = torch.randn(2, 3, N), torch.zeros(2, 3, N), torch.zeros(6, N)
    _C.simnorm_fwd(x=x, y=y, group=4)
    _C.simnorm_fwd(x=x.view(6, N), y=flat, group=4)
    assert torch.equal(y.view(6, N), flat)
    with pytest.raises(ValueError, match="x must be a tensor whose rows are equally far apart"):
        _C.simnorm_fwd(x=torch.randn(3, 2, N).transpose(0, 1), y=y, group=4)


def test_strides_without_rows() -> None:
    """They may be any: PyTorch takes such a tensor for contiguous."""
    for strides in ((0, 0), (32, 2), (1, 7)):
        x = torch.zeros(0, N).as_strided((0, N), strides)
        _C.simnorm_fwd(x=x, y=x, group=4)
        _C.simnorm_bwd(dy=x, y=x, dx=x, group=4)
    apart = torch.zeros(3, 0, N).as_strided((3, 0, N), (1, 5, 2))
    _C.simnorm_fwd(x=apart, y=apart, group=4)


def test_parameters_that_need_a_gradient() -> None:
    gamma = torch.nn.Parameter(torch.ones(N))
    given = good("norm_act_fwd") | {"gamma": gamma, "beta": gamma}
    _C.norm_act_fwd(**given)


def test_wrong_group() -> None:
    for kernel in ("simnorm_fwd", "simnorm_bwd", "norm_act_fwd", "norm_act_bwd"):
        act = {"act": "simnorm"} if "act" in good(kernel) else {}
        for group in (0, -1, 3, 16):
            message = f"group must be a divisor of n = 8, got {group}"
            fails(kernel, ValueError, message, group=group, **act)
    for kernel in ("act_norm_fwd", "act_norm_bwd"):
        fails(kernel, ValueError, "act must be none or mish, got simnorm", act="simnorm")


def test_simnorm_needs_its_result() -> None:
    fails("norm_act_bwd", ValueError, "y must be a tensor here, got None", act="simnorm", y=None)


def test_scales_belong_to_others() -> None:
    for kernel in ("norm_act_bwd", "act_norm_bwd"):
        for name in ("dy_scale", "dx_scale"):
            fails(kernel, ValueError, f"{name} must be None", **{name: torch.ones(2)})


def test_too_few_members() -> None:
    per_member = {"rows_per_member": 1}
    parameters = {name: torch.zeros(2, N) for name in ("bias", "gamma", "beta")}
    _C.act_norm_fwd(**good("act_norm_fwd") | parameters | per_member)
    for name in parameters:
        one = {name: torch.zeros(1, N)}
        message = f"{name} must be [2, 8], got [1, 8]"
        fails("act_norm_fwd", ValueError, message, **parameters | per_member | one)


def test_wrong_bins() -> None:
    for vmin, vmax in ((1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)):
        for kernel in (k for k in KERNELS if k.startswith("two_hot")):
            fails(kernel, ValueError, "vmin must be below vmax", vmin=vmin, vmax=vmax)
    for bins in (0, 1):
        for kernel in (k for k in KERNELS if k.startswith("two_hot")):
            message = f"the bins of logits must be at least 2, got {bins}"
            fails(kernel, ValueError, message, logits=torch.zeros(2, bins))


def test_no_columns() -> None:
    empty = torch.zeros(2, 0)
    message = "the columns of x must be at least 1, got 0"
    fails("simnorm_fwd", ValueError, message, x=empty, y=empty)


def test_wrong_added_rows() -> None:
    message = "the rows of add must be at least 1, got 0"
    fails("norm_act_fwd", ValueError, message, add=torch.zeros(0, N))


def test_wrong_tables_of_esnr() -> None:
    fails("esnr", ValueError, "sizes must be at least 0, got -1", sizes=torch.tensor([1, -1, 1]))
    none = torch.zeros(0, 3, dtype=torch.int64)
    fails("esnr", ValueError, "the rows of grads must be at least 1, got 0", grads=none)


def test_threads_are_asked_for() -> None:
    """Without a number, the kernels take what their function says."""
    x = torch.zeros(2, N)
    try:
        _C.set_thread_count(lambda: 0)
        with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
            _C.simnorm_fwd(x=x, y=x, group=4)
    finally:
        _C.set_thread_count(torch.get_num_threads)
    _C.simnorm_fwd(x=x, y=x, group=4)
