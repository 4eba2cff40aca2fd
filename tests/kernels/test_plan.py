"""Plans fit what they are made for, and tuned entries come before the model."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from bench.fake_cuda import DEVICE, PROPERTIES, FakeCuda
from pwm_fast.kernels import cost, plan, tuning
from pwm_fast.kernels.plan import GemmShape, Limits, candidates, device_plan, make_plan, model

HOPPER, AMPERE = Limits(132), Limits(108, 163 * 1024)
FORWARD = GemmShape("linear_norm_act_fwd", 500, 512, 512)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing that was chosen before counts, nor what is chosen here afterwards."""
    caches = (plan._chosen, plan._tuned, plan.device_limits)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("kernel", plan.TILES)
def test_plans_fit_the_device(kernel: str) -> None:
    for limits, n, rows, element in itertools.product(
        (HOPPER, AMPERE), (17, 256, 512, 768, 1792, 4096), (1, 64, 519, 16384), (2, 4)
    ):
        found = candidates(GemmShape(kernel, rows, n, 512, 3, element), limits)
        aligned = n != 17 or plan.TILES[kernel].grouped
        assert bool(found) == (aligned and (n <= plan.WIDEST or bool(plan.TILES[kernel].shared)))
        for p in found:
            assert p.block_n * (p.tiles_n - 1) < n <= p.block_n * p.tiles_n
            assert p.stages * (p.block_m + p.block_n) * p.block_k * element <= limits.shared
            assert not p.synced or p.programs <= limits.sms
            assert p.synced or p.groups * p.block_m >= rows
            assert p.tiles_n == 1 or p.synced == plan.TILES[kernel].waits


def test_the_model_prefers_more_programs_for_few_rows() -> None:
    few, many = (
        plan.plan(FORWARD._replace(rows=64), HOPPER),
        plan.plan(FORWARD._replace(rows=16384), HOPPER),
    )
    assert few is not None and many is not None
    assert few.block_m * few.block_n < many.block_m * many.block_n
    assert few.synced


def test_what_has_too_many_tiles_is_not_fused() -> None:
    assert plan.plan(FORWARD._replace(n=64 * 1024), HOPPER) is None
    assert plan.plan(FORWARD._replace(n=4096), Limits(4)) is None


def test_updates_wait_for_nobody() -> None:
    """So they have as many programs as tiles, and the model charges no exchange."""
    update = GemmShape("linear_axpby", 4096, 512, 512)
    shared = [p for p in candidates(update, HOPPER) if p.tiles_n > 1]
    assert shared and not any(p.synced for p in shared)
    assert max(p.programs for p in shared) > HOPPER.sms
    waiting = make_plan(64, 128, 512, 512, 132, 2, HOPPER.shared)
    alone = make_plan(64, 128, 512, 512, 132, 2, HOPPER.shared, waits=False)
    assert waiting is not None and alone is not None
    update = update._replace(rows=512)
    assert plan.fused_time(waiting, update, 132) - plan.fused_time(
        alone, update, 132
    ) == pytest.approx(cost.CONSTANTS["exchange"].value)


def test_columns_beyond_a_rows_end_are_not_read() -> None:
    """Rows of 400 are masked in tiles of 512: where reading is all that counts, that is a fifth."""
    product = GemmShape("linear_act_norm_fwd", 1024, 400, 4096, members=3)
    full = product._replace(n=512)
    tile = make_plan(16, 512, 1024, 400, 132, 2, HOPPER.shared)
    assert tile is not None
    ratio = plan.fused_time(tile, product, 132) / plan.fused_time(tile, full, 132)
    assert ratio == pytest.approx((16 + 400) / (16 + 512), rel=0.02)


def test_every_constant_says_where_it_is_from() -> None:
    for name, constant in cost.CONSTANTS.items():
        assert constant.value > 0, name
        assert constant.source in ("assumed", "literature", "other code"), name
    # Doubling the rate of products never slows a plan, whatever the precision.
    for rate, precision in (("16", "tf32"), ("tf32", "tf32"), ("ieee", "ieee")):
        product = FORWARD._replace(element=2 if rate == "16" else 4, input_precision=precision)
        assert product.rate == rate
        assert all(t > 0 for t in model(product, HOPPER).values())


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"n": 0}, "positive"),
        ({"rows": -3}, "positive"),
        ({"members": 0}, "members=0"),
        ({"kernel": "linear"}, "kernel must be one of linear_norm_act_fwd"),
        ({"element": 4, "input_precision": "tf64"}, "input_precision must be tf32 or ieee"),
    ],
)
def test_what_is_no_product(changed: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan.plan(FORWARD._replace(**changed), HOPPER)  # type: ignore[arg-type]


# --- tuned entries --------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", plan.TILES)
def test_tuned_entries_come_first(kernel: str) -> None:
    product = GemmShape(kernel, 300, 512, 512, members=3 if "act_norm" in kernel[7:] else 1)
    assert candidates(product, HOPPER)
    by_model = plan.plan(product, HOPPER)
    for p in candidates(product, HOPPER):
        entry = {"block_m": p.block_m, "block_n": p.block_n}
        assert plan.plan(product, HOPPER, {product.key: entry}) == p
        assert plan.plan(product._replace(rows=900), HOPPER, {product.key: entry}) != p
    assert plan.plan(product, HOPPER, {product.key: {"block_m": 0}}) is None
    assert plan.plan(product, HOPPER, {}) == by_model


def test_keys_say_precision_members_and_the_class_of_rows() -> None:
    assert FORWARD.key == "16 R512 N512 K512"
    assert FORWARD._replace(rows=513).key == "16 R1024 N512 K512"
    assert FORWARD._replace(element=4, members=3).key == "tf32 E3 R512 N512 K512"
    for product in (FORWARD._replace(rows=512), FORWARD._replace(rows=64, element=4, members=2)):
        assert plan.gemm_shape(product.kernel, product.key) == product
        tuning.check(product.kernel, product.key, {"block_m": 0})


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"block_n": 64}, "must have block_m, block_n"),
        ({"block_m": 16, "block_n": 64, "warps": 4}, "must have block_m, block_n"),
        ({"block_m": 48, "block_n": 64}, "no tile 48x64"),
        ({"block_m": 128, "block_n": 256}, "no tile 128x256"),
    ],
)
def test_tuned_entries_that_do_not_fit(entry: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan.plan(FORWARD, HOPPER, {FORWARD.key: entry})


def test_an_entry_for_more_shared_memory_than_there_is_names_file_and_entry(
    fresh: None, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    entry = {"block_m": 128, "block_n": 128}
    path = tuning.save("Small GPU", {FORWARD.kernel: {FORWARD.key: entry}})
    kept = tuning.load("Small GPU")[FORWARD.kernel]
    assert plan.plan(FORWARD, HOPPER, kept) is not None
    assert plan._chosen(FORWARD, "Small GPU", HOPPER) is not None
    small = Limits(132, 64 * 1024)
    with pytest.raises(ValueError, match="no tile 128x128 that fits") as error:
        plan._chosen(FORWARD._replace(n=256), "Small GPU", small)  # whatever is asked for
    for part in (str(path), FORWARD.kernel, FORWARD.key, "65536 bytes", "python -m bench.tune"):
        assert part in str(error.value)


def test_every_kernel_has_a_form_of_entries() -> None:
    assert set(plan.TILES) | {"rollout"} == set(tuning.FORMS)


# --- on a device ----------------------------------------------------------------------------------


def test_a_device_plan_is_chosen_once_and_launches_nothing(
    fresh: None, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.save(PROPERTIES.name, {FORWARD.kernel: {FORWARD.key: {"block_m": 16, "block_n": 64}}})
    chosen = []

    def counted(product: GemmShape, *args: object) -> plan.GemmPlan | None:
        chosen.append(product)
        return original(product, *args)  # type: ignore[arg-type]

    original = plan.plan
    monkeypatch.setattr(plan, "plan", counted)
    products = [GemmShape(k, 512, 400, 512, members=3) for k in plan.TILES] + [FORWARD]
    with FakeCuda() as cuda:
        first = [device_plan(p, DEVICE) for p in products]
        assert chosen == products
        assert [device_plan(p, DEVICE) for p in products] == first
        assert chosen == products, "chosen anew"
        assert cuda.total == 0
    assert first[-1] is not None and first[-1].name == "16x64"


def test_plans_come_from_sizes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same again, whatever was asked for between, and without a look at a device."""

    def touched(*args: object, **kwargs: object) -> None:
        raise AssertionError("a device was asked")

    for name in ("get_device_properties", "current_stream", "synchronize", "Event", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, touched)
    products = [GemmShape(k, r, 400, 512, members=3) for k in plan.TILES for r in (128, 4096)]
    first = [plan.plan(p, HOPPER) for p in products]
    assert [plan.plan(p, HOPPER) for p in reversed(products)] == first[::-1]
    assert [min(model(p, HOPPER).values()) for p in products] == [
        model(p, HOPPER)[chosen] for p, chosen in zip(products, first, strict=True)
    ]


def test_no_kernel_is_autotuned_and_nothing_of_the_package_measures() -> None:
    """Triton's autotuner times choices where a kernel is first launched: maybe in a capture."""
    code = """
import importlib, pkgutil, sys
import pwm_fast.agent, pwm_fast.kernels, pwm_fast.backends.triton
from triton.runtime.autotuner import Autotuner, Heuristics
for info in pkgutil.iter_modules(pwm_fast.kernels.__path__):
    module = importlib.import_module(f"pwm_fast.kernels.{info.name}")
    for name, value in vars(module).items():
        assert not isinstance(value, Autotuner | Heuristics), f"{info.name}.{name}"
assert not [m for m in sys.modules if m.split(".")[0] == "bench"]
"""
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_environment_turns_fused_products_off(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    found = device_plan(FORWARD, cpu)
    assert found is not None and not found.synced
    monkeypatch.setenv(plan.VARIABLE, "0")
    assert device_plan(FORWARD, cpu) is None
    monkeypatch.setenv(plan.VARIABLE, "yes")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
        device_plan(FORWARD, cpu)
