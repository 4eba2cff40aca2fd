"""A policy's step against float64: the kernel, and imagined rollouts that take it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast import ops
from pwm_fast.backends import select, triton_gemm
from pwm_fast.backends.specs import LayerSpec
from pwm_fast.kernels import policy
from pwm_fast.kernels.plan import Limits
from pwm_fast.kernels.policy import PolicyLayer, policy_step
from tests.compile import aot
from tests.compile.report import cases_of
from tests.helpers import random_layer
from tests.kernels.harness import DEVICES, Rows, Values, check, on_devices
from tests.ops.contract import ROLLOUTS, Case
from tests.ops.test_precision import check_precision

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def draw(rows: int, widths: list[int], actions: int, columns: int, bases: int) -> Values:
    made = {
        "h": torch.randn(rows, widths[0]),
        "head": torch.randn(actions, widths[-1]) / widths[-1] ** 0.5,
        "head_bias": torch.randn(actions),
        "std": torch.rand(actions),
        "noise": torch.randn(rows, actions),
        "base": torch.randn(bases, columns),
        "w_a": torch.randn(columns, actions),
    }
    for i, n in enumerate(widths):
        made[f"gamma{i}"], made[f"beta{i}"] = 1 + 0.3 * torch.randn(n), 0.3 * torch.randn(n)
        made[f"bias{i}"] = torch.randn(n)
        if i:
            made[f"weight{i}"] = torch.randn(n, widths[i - 1]) / widths[i - 1] ** 0.5
    return made


def plain(values: Values, operand: torch.dtype, acts: list[str], eps: float) -> Values:
    """In PyTorch: exact in float64, else with products of rounded operands, as in autocast."""

    def rounded(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(operand).to(x.dtype)

    found = {}
    x = values["h"]
    for i, act in enumerate(acts):
        if i:
            x = rounded(x) @ rounded(values[f"weight{i}"]).t()
        u = x + values[f"bias{i}"]
        m = torch.nn.functional.mish(u) if act == "mish" else u
        mean, centred = m.mean(1), m - m.mean(1, keepdim=True)
        rstd = torch.rsqrt((centred * centred).mean(1) + eps)
        x = centred * rstd[:, None] * values[f"gamma{i}"] + values[f"beta{i}"]
        found |= {f"u{i}": u, f"y{i}": x, f"mean{i}": mean, f"rstd{i}": rstd}
    mu = rounded(x) @ rounded(values["head"]).t() + values["head_bias"]
    action = torch.tanh(mu + values["std"] * values["noise"])
    return found | {"action": action, "c": values["base"] + action @ values["w_a"].t()}


def run(
    values: Values,
    widths: list[int],
    acts: list[str],
    operand: torch.dtype,
    eps: float,
    device: str,
    block_m: int,
    keep: bool,
) -> Values:
    there = {k: v.to(device) for k, v in values.items()}
    rows, actions, columns = len(values["h"]), len(values["std"]), len(values["w_a"])
    out = {"action": Rows(rows, actions, F32, device), "c": Rows(rows, columns, F32, device)}
    layers = []
    for i, (n, act) in enumerate(zip(widths, acts, strict=True)):
        out[f"y{i}"] = Rows(rows, n, operand, device)
        if keep:
            out[f"u{i}"] = Rows(rows, n, operand, device)
            out |= {f"{name}{i}": Rows(1, rows, F32, device) for name in ("mean", "rstd")}
        layers.append(
            PolicyLayer(
                there[f"weight{i}"].to(operand) if i else None,
                there[f"bias{i}"],
                there[f"gamma{i}"],
                there[f"beta{i}"],
                act,
                eps,
                out[f"y{i}"].tensor,
                out[f"u{i}"].tensor if keep else None,
                *((out[f"{name}{i}"].tensor[0] if keep else None) for name in ("mean", "rstd")),
            )
        )
    weight = torch.full((columns, actions + 3), float("nan"), device=device)
    weight[:, 1 : 1 + actions] = there["w_a"]  # columns of a wider one
    policy_step(
        Rows.of(values["h"], F32, device, 5).tensor,
        layers,
        there["head"].to(operand),
        there["head_bias"],
        std=there["std"],
        noise=there["noise"],
        base=there["base"],
        w_a=weight[:, 1 : 1 + actions],
        action=out["action"].tensor,
        c=out["c"].tensor,
        block_m=block_m,
    )
    written = {k: v.written() for k, v in out.items()}
    return {k: v[0] if k[:4] in ("mean", "rstd") else v for k, v in written.items()}


PUBLISHED = [400, 200, 100]
SIZES = [
    (3, PUBLISHED, 8, 512, 1, 16),
    (37, [33, 17], 3, 130, 37, 16),  # rows in several programs, the last one part full
    (33, [64, 16, 7, 5], 1, 21, 1, 32),
    (1, [1], 61, 510, 1, 16),
]


@pytest.mark.parametrize(
    ("device", "size", "operand", "keep"),
    on_devices(
        [(size, F16, i != 1) for i, size in enumerate(SIZES)],
        [
            ((rows, widths, *rest), operand, keep)
            for _, widths, *rest in SIZES
            for rows in (1, 37, 519)
            for operand in (F16, BF16)
            for keep in (True, False)
            if rest[2] == 1
        ],
    ),
)
def test_kernel(device, size, operand, keep) -> None:
    rows, widths, actions, columns, bases, block_m = size
    values = draw(rows, widths, actions, columns, bases)
    acts = ["none" if i == 1 else "mish" for i in range(len(widths))]
    ours = run(values, widths, acts, operand, 1e-5, device, block_m, keep)
    assert ("u0" in ours) is keep

    def reference(i: Values, dtype: torch.dtype) -> Values:
        return plain(i, operand, acts, 1e-5)

    check(ours, reference, values, f"{size}")


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    values = draw(0, [5, 4], 2, 6, 1)
    ours = run(values, [5, 4], ["mish", "mish"], F16, 1e-5, device, 16, True)
    assert ours["c"].shape == (0, 6) and ours["action"].shape == (0, 2)


@pytest.mark.interpreted
def test_tanh_far_and_near() -> None:
    """Large arguments saturate, small ones keep their relative accuracy, NaN stays."""
    x = torch.tensor([0.0, 1e-30, -1e-4, 0.2499, 0.2501, -0.7, 9.0, -50.0, 1e30, float("nan")])
    values = draw(len(x), [3], 1, 2, 1) | {"noise": x[:, None], "std": torch.ones(1)}
    values |= {"head": torch.zeros(1, 3), "head_bias": torch.zeros(1)}
    ours = run(values, [3], ["mish"], F16, 1e-5, "cpu", 16, False)["action"][:, 0]
    truth = torch.tanh(x.double())
    assert torch.equal(ours.isnan(), x.isnan())
    off = ((ours.double() - truth) / truth.clamp_min(1e-300).where(truth > 0, truth)).abs()
    assert off[1:-1].max() < 3e-7, off
    assert ours[0] == 0.0


@pytest.mark.interpreted
def test_errors() -> None:
    values = draw(4, [5, 4], 2, 6, 1)

    def call(**changed: Tensor) -> None:
        run({**values, **changed}, [5, 4], ["mish", "mish"], F16, 1e-5, "cpu", 16, False)

    with pytest.raises(ValueError, match=r"layer 1's weight must be \[4, 5\] of torch.float16"):
        call(weight1=torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"noise must be a contiguous \[4, 2\]"):
        call(noise=torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"base must be float32 \[1 or 4, 6\], got \[2, 6\]"):
        call(base=torch.randn(2, 6))
    with pytest.raises(ValueError, match=r"h must be float32 \[R, 5\] with contiguous rows"):
        call(h=torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"head must be \[A, 4\], got \[2, 5\]"):
        call(head=torch.randn(2, 5))


def test_what_has_no_kernel() -> None:
    mish = ["mish"] * 3
    assert policy.why_not(PUBLISHED, mish, 8, F16) is None
    for reason, arguments in {
        "layer by layer": (PUBLISHED, mish, 8, F32),
        "0 hidden layers are not 1 to 6": ([], [], 8, F16),
        "7 hidden layers": ([8] * 7, ["mish"] * 7, 8, F16),
        "rows of 513 features": ([513], ["mish"], 8, F16),
        "129 actions": (PUBLISHED, mish, 129, BF16),
        "no activation 'simnorm'": (PUBLISHED, ["mish", "simnorm", "mish"], 8, F16),
    }.items():
        assert reason in str(policy.why_not(*arguments)), reason


def test_shared_memory_of_small_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """99 KB, as of GeForce cards, hold the published widths, but no later layer above 256."""
    for case in cases_of("policy"):
        constants = case.constants
        need = policy.shared_bytes(constants["WIDTHS"], constants["ACTIONS"], constants["BLOCK_M"])
        assert aot.usage(aot.compile_case(case, 90)).shared == need <= 99 * 1024, case.name
    why = policy.why_not([400, 512], ["mish"] * 2, 8, F16, 99 * 1024)
    assert str(why) == "its GEMMs take 139264 bytes of shared memory, the device has 101376"
    small = "small GPU", Limits(128, 99 * 1024)
    monkeypatch.setattr(triton_gemm, "device_limits", lambda device: small)
    products, device = triton_gemm.TritonGemms(), torch.device("cuda")
    hidden = LayerSpec("act_norm", "mish", True, True, 8, 1e-5)
    specs = [hidden, hidden, replace(hidden, act="none", norm=False)]
    assert products.policy(specs, [512, 256, 8], 128, F16, device) is not None
    assert products.policy(specs, [256, 512, 8], 128, F16, device) is None


@pytest.mark.parametrize("case", cases_of("policy"), ids=lambda case: case.name)
def test_a_policys_rows_pass_a_barrier_between_layers(case: aot.Case) -> None:
    """What some warps have stored others load, and no pipeline begins before all have stored."""
    ptx = aot.compile_case(case, 90).asm["ptx"]
    assert ".nc" not in ptx  # nothing that is taken to be constant
    kinds = {r"cp\.async\.c[ag]": "load", r"bar\.sync": "barrier", r"st\.global": "store"}
    found = re.findall("|".join(f"({pattern})" for pattern in kinds), ptx)
    events = [k for each in found for k, hit in zip(kinds.values(), each, strict=True) if hit]
    merged = " ".join(k for k, before in zip(events, ["", *events], strict=False) if k != before)
    ways = re.findall(r"store (?:barrier )?load", merged)
    layers = case.constants["LAYERS"]  # each into a product, and the action into the last one
    assert ways[: layers + 1] == ["store barrier load"] * (layers + 1)
    # In the loop of that last one what is loaded is the action again, after stores of its results.
    assert len(ways) <= layers + 2


def test_rows_of_a_program() -> None:
    """16 while every program has a multiprocessor of its own, which a second would not fit on."""
    assert policy.rows_of(128, 132) == policy.rows_of(16 * 132, 132) == 16
    assert policy.rows_of(16 * 132 + 1, 132) == policy.rows_of(16384, 132) == 32
    case = next(c for c in cases_of("policy") if "A8, 16 rows, fp16" in c.name)
    registers = aot.usage(aot.compile_case(case, 90)).registers
    assert 2 * registers * 32 * case.num_warps > 64 * 1024


# --- in imagined rollouts -----------------------------------------------------------------------

IMAGINED = [case for case in ROLLOUTS if case.name.startswith("imagine")]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of each step of a policy in one launch."""
    seen: list[int] = []
    original = triton_gemm.policy.policy_step

    def spy(h: Tensor, *args: object, **kwargs: object) -> None:
        seen.append(h.shape[0])
        original(h, *args, **kwargs)

    monkeypatch.setattr(triton_gemm.policy, "policy_step", spy)
    with select.backend("triton"):
        yield seen


@pytest.mark.interpreted
@pytest.mark.parametrize("case", IMAGINED, ids=lambda case: case.name)
def test_imagined_rollouts(case: Case, steps: list[int]) -> None:
    """Results and all gradients by the 2x rule, whatever the dynamics, carried or not."""
    for centre in (True, False):
        steps.clear()
        with ops.algebra(centre=centre, pad=centre):
            check_precision(case, "fast", 9, 33)
        assert steps and set(steps) == {9}


@pytest.mark.interpreted
def test_a_policy_of_one_layer(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no case for the kernel; carried from step to step, its bias is added once."""
    ours = imagined([])
    assert not steps
    monkeypatch.setenv("PWM_FAST_ARCHITECTURE", "layers")
    torch.testing.assert_close(ours, imagined([]), rtol=2e-3, atol=2e-3)


def imagined(widths: list[int], act: ops.Activation = "mish") -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def layer(k: int, n: int, **options) -> ops.Layer:
        return random_layer(k, n, dtype=F32, generator=generator, **options)

    sizes = [21, *widths]
    actor = [layer(k, n, act=act) for k, n in pairwise(sizes)] + [layer(sizes[-1], 3, norm=False)]
    net = [layer(25, 33, act="mish"), layer(33, 33, act="mish"), layer(33, 21, norm=False)]
    with select.precision("fast"), ops.algebra(centre=True, pad=True), torch.no_grad():
        return ops.imagine(
            torch.randn(5, 21, generator=generator),
            ops.Policy(actor, torch.rand(1, generator=generator).expand(3)),
            ops.Flow(net, 1, "euler"),
            ops.Heads([layer(24, 1, norm=False)]),
            noise=torch.randn(3, 5, 3, generator=generator),
        ).z


@pytest.mark.interpreted
def test_when_it_is_taken(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    imagined([12, 10])
    assert steps == [5, 5, 5]
    imagined([520])  # too wide
    monkeypatch.setenv("PWM_FAST_FUSED_PRODUCTS", "0")
    imagined([12, 10])
    assert steps == [5, 5, 5]
