"""Wrong codes and sizes raise ValueError that names the argument; nothing is read or written."""

from __future__ import annotations

import re

import pytest

from tests.native.harness import _C


def named(names: str) -> dict[str, float]:
    """All 0: absent, fp32, none."""
    return dict.fromkeys(names.split(), 0)


GOOD = {
    "norm_act_fwd": named(
        "x ld_x x_type add ld_add add_rows tau tau_stride w_tau bias gamma beta y ld_y y_type "
        "xhat xhat_type rstd rows n act group eps threads"
    ),
    "norm_act_bwd": named(
        "dy ld_dy dy_type xhat xhat_type rstd gamma beta y ld_y y_type dx ld_dx dx_type dgamma "
        "dbeta dbias rows n act group threads"
    ),
    "act_norm_fwd": named(
        "x ld_x x_type bias gamma beta y ld_y y_type u u_type mean rstd rows n act "
        "rows_per_member eps threads"
    ),
    "act_norm_bwd": named(
        "dy ld_dy dy_type u u_type mean rstd gamma dx ld_dx dx_type dgamma dbeta dbias rows n "
        "act rows_per_member threads"
    ),
    "simnorm_fwd": named("x ld_x y ld_y rows n group threads"),
    "simnorm_bwd": named("dy ld_dy y ld_y dx ld_dx rows n group threads"),
    "two_hot_decode_fwd": named(
        "logits ld x_type value mean lse rows bins vmin vmax transform threads"
    ),
    "two_hot_decode_bwd": named(
        "dvalue logits ld x_type mean lse dlogits ld_d rows bins vmin vmax transform threads"
    ),
    "two_hot_ce_fwd": named("logits ld x_type x loss lse rows bins vmin vmax transform threads"),
    "two_hot_ce_bwd": named(
        "dloss logits ld x_type x lse dlogits ld_d rows bins vmin vmax transform threads"
    ),
    "axpby": named("z k1 k2 out c1 c2 n threads"),
    "esnr": named("grads sizes signal noise m tensors threads"),
}
for _arguments in GOOD.values():
    for _name in _arguments:
        if _name.startswith("ld"):
            _arguments[_name] = 8
    _known = {"n": 8, "bins": 8, "group": 4, "m": 1, "threads": 1, "vmax": 1.0, "eps": 1e-5}
    _arguments.update({name: value for name, value in _known.items() if name in _arguments})
GOOD["axpby"]["n"] = 0

WRONG = {  # argument -> values, and what the message says is right
    "x_type": ([-1, 2], "0 (fp32) or 1 (bf16)"),
    "y_type": ([-1, 2], "0 (fp32) or 1 (bf16)"),
    "dy_type": ([2], "0 (fp32) or 1 (bf16)"),
    "dx_type": ([2], "0 (fp32) or 1 (bf16)"),
    "u_type": ([2], "0 (fp32) or 1 (bf16)"),
    "xhat_type": ([2], "0 (fp32) or 1 (bf16)"),
    "rows": ([-1], "at least 0"),
    "n": ([-1], "at least "),
    "bins": ([1, 0], "at least 2"),
    "threads": ([0, -3], "at least 1"),
    "act": ([-1, 3], "0 (none)"),
    "rows_per_member": ([-1], "at least 0"),
    "m": ([0], "at least 1"),
    "tensors": ([-1], "at least 0"),
}
CASES = [(k, a, v) for k, good in GOOD.items() for a in good for v in WRONG.get(a, ([], ""))[0]]


@pytest.mark.parametrize("kernel", GOOD)
def test_rows_of_nothing(kernel: str) -> None:
    """No row, no element: all arguments are right, and no address is used."""
    getattr(_C, kernel)(**GOOD[kernel])
    getattr(_C, kernel)(*GOOD[kernel].values())


@pytest.mark.parametrize(("kernel", "argument", "value"), CASES)
def test_wrong_argument(kernel: str, argument: str, value: int) -> None:
    expected = f"{argument} must be {WRONG[argument][1]}"
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        getattr(_C, kernel)(**GOOD[kernel] | {argument: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize("kernel", [k for k in GOOD if "rows" in GOOD[k]])
def test_overlapping_rows(kernel: str) -> None:
    for name in GOOD[kernel]:
        if not name.startswith("ld") or name == "ld_add":
            continue
        arguments = GOOD[kernel] | {"rows": 2, name: 7}
        if kernel == "norm_act_bwd":
            arguments["act"] = 2  # else y is not read
        with pytest.raises(ValueError, match=f"{name} must be at least 8, got 7"):
            getattr(_C, kernel)(**arguments)


def test_wrong_group() -> None:
    for kernel in ("simnorm_fwd", "simnorm_bwd", "norm_act_fwd", "norm_act_bwd"):
        arguments = dict(GOOD[kernel])
        if "act" in arguments:
            arguments["act"] = 2
        for group in (0, -1, 3, 16):
            with pytest.raises(ValueError, match=f"group must be a divisor of n = 8, got {group}"):
                getattr(_C, kernel)(**arguments | {"group": group})


def test_wrong_range_of_bins() -> None:
    for vmin, vmax in ((1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="vmin must be below vmax"):
            _C.two_hot_ce_fwd(**GOOD["two_hot_ce_fwd"] | {"vmin": vmin, "vmax": vmax})


def test_wrong_added_rows() -> None:
    with pytest.raises(ValueError, match="add_rows must be at least 1, got 0"):
        _C.norm_act_fwd(**GOOD["norm_act_fwd"] | {"add": 64})
