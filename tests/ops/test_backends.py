"""Every backend keeps the contract, and all agree where several can run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pwm_fast.backends import select
from pwm_fast.backends.native import why_missing
from pwm_fast.fused import gemm
from tests.ops.contract import CASES, POLICIES, ROLLOUTS, Case, check, values_and_gradients
from tests.ops.test_contract import expanded, strided, transposed

FUSED = tuple(
    case
    for case in CASES
    if case in (*ROLLOUTS, *POLICIES)
    or case.name.startswith(("mlp", "linear_norm_act", "velocity_field", "flow_step"))
    or case.name in ("linear_act_norm", "linear_act_norm_ensemble_shared_input")
)
# Every operation over rows, a new one too.
ROWS = tuple(name for name, declared in select.OPERATIONS.items() if declared.family == "rows")
NATIVE = (
    *FUSED,
    *(case for case in CASES if case.name.startswith(ROWS)),
)
needs_native = pytest.mark.skipif(
    why_missing() is not None, reason=f"no native kernels: {why_missing()}"
)


def names(cases: tuple[Case, ...]) -> list[str]:
    return [case.name for case in cases]


@pytest.mark.parametrize("case", FUSED, ids=names(FUSED))
def test_algebra_in_float64(case: Case) -> None:
    """Hoisting, fold and batched gradients change nothing but rounding."""
    case = dataclasses.replace(case, constants=tuple({*case.constants} & {"noise", "mask"}))
    with select.backend("torch"):
        for batch in (1, 7):
            for width in (7, 33):
                check(case, case.inputs(batch, width, torch.float64))
        inputs = case.inputs(7, 7, torch.float64)
        check(case, inputs, summed=True)
        check(case, {name: strided(x) for name, x in inputs.items()})
        check(case, {name: transposed(x) for name, x in inputs.items()})
        check(case, inputs | {name: expanded(inputs[name]) for name in case.rows})


@pytest.mark.parametrize("case", FUSED, ids=names(FUSED))
def test_algebra_in_float32(case: Case) -> None:
    """What ``auto`` does not take keeps the 2x rule as well."""
    with select.backend("torch"):
        for batch, width in ((7, 7), (199, 33)):
            check(case, case.inputs(batch, width, torch.float32))


@needs_native
@pytest.mark.parametrize("case", NATIVE, ids=names(NATIVE))
def test_native_runs_what_auto_takes(case: Case) -> None:
    """Asking for native raises nothing: the contract of ``auto`` in float32 was native's."""
    with select.backend("native"):
        check(case, case.inputs(5, case.widths[1], torch.float32))


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", ROLLOUTS[:4], ids=names(ROLLOUTS[:4]))
def test_any_number_of_threads(case: Case, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(case, case.inputs(199, 510, torch.float32))
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("case", ROLLOUTS, ids=names(ROLLOUTS))
def test_prepacked_products(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's products, where they are taken or asked for, keep the 2x rule of torch's own."""
    if not gemm._onednn_works():
        pytest.skip("this torch has no oneDNN Linear with prepacked weights")
    for batch, width in ((1, 7), (33, 510), (16, 777)):
        inputs = case.inputs(batch, width, torch.float32)
        found = {}
        for choice in ("torch", "onednn"):
            with monkeypatch.context() as patch:
                patch.setenv(gemm.VARIABLE, choice)
                check(case, inputs)
                found[choice] = values_and_gradients(case, case.call, inputs, summed=False)
        assert batch == 1 or any(
            not torch.equal(y, found["torch"][key]) for key, y in found["onednn"].items()
        )


@pytest.mark.parametrize(
    ("capability", "intel", "expected"),
    [("AVX512", False, True), ("AVX512", True, False), ("AVX2", False, False)],
)
def test_products_by_cpu(
    capability: str, intel: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not gemm._onednn_works():
        pytest.skip("this torch has no oneDNN Linear with prepacked weights")
    monkeypatch.delenv(gemm.VARIABLE, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(gemm, "_intel", lambda: intel)
    assert gemm.prepacks(torch.zeros(2, 2)) is expected
    assert not gemm.prepacks(torch.zeros(2, 2, dtype=torch.float64))


def test_trying_products_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the caller's random numbers, nor of the modes of the first call."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    expected = gemm._onednn_works()
    gemm._onednn_works.cache_clear()
    try:
        before = torch.get_rng_state()
        torch.set_default_dtype(torch.float64)
        with FakeTensorMode(), torch.inference_mode(), torch.device("meta"):
            assert gemm._onednn_works() is expected
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_default_dtype(torch.float32)
        gemm._onednn_works.cache_clear()


def test_unknown_choice_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gemm.VARIABLE, "cublas")
    with pytest.raises(ValueError, match="PWM_FAST_GEMM must be one of auto, torch, onednn"):
        gemm.prepacks(torch.zeros(2, 2))


def test_trying_onednn_draws_none_of_the_caller_s_random_numbers() -> None:
    """It is tried once a process: a resumed run would draw others than the one that went on."""
    gemm._onednn_works.cache_clear()
    before = torch.get_rng_state()
    gemm._onednn_works()
    assert torch.equal(torch.get_rng_state(), before)
