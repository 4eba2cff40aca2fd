"""Every operation keeps the numeric contract: all dtypes, odd sizes, any strides."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_2x
from tests.ops.contract import CASES, Case, Inputs, check

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
CASE_IDS = [case.name for case in CASES]


def sizes() -> list:
    return [
        pytest.param(case, batch, width, id=f"{case.name}-{batch}x{width}")
        for case in CASES
        for batch in case.batches
        for width in case.widths
    ]


@pytest.mark.parametrize(("case", "batch", "width"), sizes())
def test_float32_sizes(case: Case, batch: int, width: int) -> None:
    """float32 values and gradients over odd widths and empty, single and odd batches."""
    check(case, case.inputs(batch, width, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_16_bit(case: Case, dtype: torch.dtype) -> None:
    """16-bit values and gradients keep their dtype and err at most twice as much as PyTorch."""
    for width in case.widths[:-1]:
        check(case, case.inputs(33, width, dtype))


def strided(x: Tensor) -> Tensor:
    """Every other element of the last axis of a wider buffer."""
    buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    buffer[..., ::2] = x
    return buffer[..., ::2]


def transposed(x: Tensor) -> Tensor:
    """The same values with the first axis fastest in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def expanded(x: Tensor) -> Tensor:
    """The first row, repeated with stride 0."""
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("layout", [strided, transposed, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_layouts(case: Case, layout, dtype: torch.dtype) -> None:
    """Inputs and parameters of any strides give what contiguous ones give."""
    for width in case.widths[1 : 3 if dtype == torch.float32 else 2]:
        inputs: Inputs = case.inputs(7, width, dtype)
        if layout is expanded:
            inputs |= {name: expanded(inputs[name]) for name in case.rows}
        else:
            inputs = {name: layout(x) for name, x in inputs.items()}
        check(case, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_stride_0_gradient(case: Case, dtype: torch.dtype) -> None:
    """The gradient of a plain sum arrives with stride 0 and is read as such."""
    check(case, case.inputs(7, case.widths[1], dtype), summed=True)


def test_2x_rule_rejects_what_is_wrong() -> None:
    """The rule itself: three times PyTorch's error, NaN, another dtype or shape all fail."""
    ref = torch.randn(100, dtype=torch.float64)
    same = ref.float() + 1e-3
    assert_2x(ref.float() + 1.9e-3, same, ref)
    for wrong in (
        ref.float() + 3e-3,
        torch.full_like(same, float("nan")),
        ref.clone(),
        same[:99],
    ):
        with pytest.raises(AssertionError):
            assert_2x(wrong, same, ref)


@pytest.mark.parametrize("factor", [6.0, math.nan])
def test_the_contract_refuses_what_errs_too_much(factor: float) -> None:
    """Also where the numbers are few, and it looks at many draws of both sides before it does."""
    mlp = next(case for case in CASES if case.name == "mlp")

    def wrong(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        (y,) = mlp.torch_call(inputs)
        (truth,) = mlp.torch_call({k: v.double() for k, v in inputs.items()})
        return ((truth + factor * (y.double() - truth)).to(y.dtype),)

    with pytest.raises(AssertionError, match="mlp: output 0"):
        check(dataclasses.replace(mlp, call=wrong), mlp.inputs(7, 7, torch.float32))
