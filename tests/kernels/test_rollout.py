"""The persistent rollout against float64: results, every gradient, exchange, layouts, checks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast.kernels import cost
from pwm_fast.kernels import rollout as module
from pwm_fast.kernels.rollout import (
    RolloutLayout,
    Scheme,
    Workspace,
    choose_layout,
    rollout_backward,
    rollout_forward,
    why_not,
)
from pwm_fast.kernels.rollout_plan import EXCHANGES, modelled_time
from tests.kernels import rollout_truth as truth
from tests.kernels.harness import gpu, on_devices

both_exchanges = pytest.mark.parametrize("exchange", EXCHANGES)
H100 = (132, 227 * 1024)  # multiprocessors, bytes of shared memory


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """torch.empty is filled with NaN."""
    # Only a warning, as cuBLAS wants a variable of the environment for the truth's products.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.interpreted
@both_exchanges
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("method", "substeps", "steps", "batch", "rows"),
    [
        ("heun", 1, 1, 5, 4),
        ("heun", 2, 3, 9, 8),
        ("heun", 3, 1, 19, 16),
        ("euler", 1, 3, 9, 8),
        ("euler", 2, 1, 1, 8),
        ("euler", 3, 1, 17, 16),
    ],
)
def test_results_and_gradients(
    method: str,
    substeps: int,
    steps: int,
    batch: int,
    rows: int,
    dtype: torch.dtype,
    exchange: str,
) -> None:
    scheme = Scheme(method, substeps, 50, 1e-5, 1e-4, tf32=False)
    problem = truth.problem(scheme, batch, steps)
    results = truth.run(problem, 64, dtype, RolloutLayout(rows, 64, 4, 2, exchange))
    truth.check(problem, results, dtype)


@pytest.mark.interpreted
def test_tiny_gradients_do_not_vanish() -> None:
    """Gradients of 1e-7, below what fp16 holds, come out as accurately as those of 1."""
    scheme = Scheme("heun", 2, 33, tf32=False)
    large = truth.problem(scheme, 6, 2)
    small = large._replace(g=large.g * 2.0**-23, lp=large.lp * 2.0**-23)
    layout = RolloutLayout(8, 64, 4, 2)
    expected = truth.run(large, 64, torch.float16, layout)
    results = truth.run(small, 64, torch.float16, layout)
    for name in ("d_p", "d_c", "d_w2", "d_w13", "d_gamma1"):
        assert torch.equal(results[name] * 2.0**23, expected[name]), name


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_both_exchanges_give_the_same_bits(dtype: torch.dtype) -> None:
    problem = truth.problem(Scheme("heun", 2, 50, tf32=False), 11, 2)
    flags, words = (truth.run(problem, 64, dtype, RolloutLayout(8, 64, 4, 2, e)) for e in EXCHANGES)
    assert flags.keys() == words.keys()
    assert all(torch.equal(flags[name], words[name]) for name in flags)


@pytest.mark.interpreted
@both_exchanges
def test_steps_one_by_one_are_the_whole_rollout(exchange: str) -> None:
    """T launches of one macro step, as imagination makes them, give the same bits."""
    scheme = Scheme("heun", 2, 50, tf32=False)
    problem = truth.problem(scheme, 5, 3)
    layout = RolloutLayout(4, 64, 4, 2, exchange)
    net = truth.network(problem, 64, torch.float16)
    p, c = truth.pad(problem.p, 64).float(), truth.pad(problem.c, 64).float()
    whole = rollout_forward(p, c, net, scheme, layout)
    work = Workspace(layout, 5, 64, torch.float16, p.device)
    for t in range(3):
        one = c[t : t + 1].contiguous()
        step = rollout_forward(p, one, net, scheme, layout, workspace=work)
        assert torch.equal(step.total[0], whole.total[t])
        p = step.p
    assert torch.equal(p, whole.p)


# --- programs that wait for each other ----------------------------------------------------------


def _in_processes(missing: Sequence[int] = (), last: Sequence[int] = ()) -> Any:
    """What launches a kernel with every program in a process of its own, tensors in shared memory.

    Those that are missing never run, the last ones when the others have ended.

    Triton's interpreter runs programs one after another; so the device code itself, with all its
    exchanges, runs at the same time here. What this does not show: a GPU's weaker memory order,
    for which there are the release, the acquire and the barriers of the compiled code.
    """
    from triton.runtime import interpreter

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        for x in args:
            if isinstance(x, Tensor):
                x.share_memory_()
        names = {n: v for n, v in constants.items() if n in kernel.arg_names}

        def program(number: int) -> None:
            builder = interpreter.interpreter_builder
            builder.set_grid_idx = lambda x, y, z: setattr(builder, "grid_idx", (number, 0, 0))
            # It would copy every tensor onto itself, over what others have written since.
            interpreter.GridExecutor._restore_args_dev = lambda *args: None
            kernel[(1,)](*args, **names)

        fork = multiprocessing.get_context("fork")
        there = [i for i in range(grid[0]) if i not in missing]
        for batch in ([i for i in there if i not in last], last):
            processes = [fork.Process(target=program, args=(i,)) for i in batch]
            for process in processes:
                process.start()
            for process in processes:
                process.join(120)
            hung = [p for p in processes if p.is_alive()]
            for process in hung:
                process.kill()
            assert not hung and not any(p.exitcode for p in processes)

    return launch


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("width", "padded", "features", "batch", "rows", "dtype"),
    [
        (50, 64, 32, 5, 4, torch.float16),  # 2 programs in each of 2 groups
        (50, 64, 8, 3, 8, torch.float32),  # 8 in one
        # 3: neither they nor the features are a power of two
        (150, 192, 64, 9, 16, torch.float32),
        (150, 192, 64, 3, 8, torch.float16),
    ],
)
def test_programs_exchange(
    width: int,
    padded: int,
    features: int,
    batch: int,
    rows: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "launch", _in_processes())
    monkeypatch.setattr(module, "LIMIT", 1 << 20)
    scheme = Scheme("heun", 1, width, tf32=False)
    problem = truth.problem(scheme, batch, 1)
    flags, words = (
        truth.run(problem, padded, dtype, RolloutLayout(rows, features, 4, 2, exchange))
        for exchange in EXCHANGES
    )
    truth.check(problem, flags, dtype)
    assert all(torch.equal(flags[name], words[name]) for name in flags)


@pytest.mark.interpreted
@both_exchanges
def test_programs_exchange_in_one_launch_after_another(
    exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through memory that is cleared once, and holds what earlier launches have left."""
    scheme = Scheme("euler", 1, 50, tf32=False)
    problem = truth.problem(scheme, 4, 3)
    net = truth.network(problem, 64, torch.float16)
    p, c = truth.pad(problem.p, 64).float(), truth.pad(problem.c, 64).float()
    layout = RolloutLayout(4, 32, 4, 2, exchange)
    monkeypatch.setattr(module, "LIMIT", 1 << 20)
    monkeypatch.setattr(module, "launch", _in_processes())
    whole = rollout_forward(p, c, net, scheme, layout)
    work = Workspace(layout, 4, 64, torch.float16, p.device)
    for t in range(3):
        one = c[t : t + 1].contiguous()
        step = rollout_forward(p, one, net, scheme, layout, workspace=work)
        assert torch.equal(step.total[0], whole.total[t])
        p = step.p


@pytest.mark.interpreted
@both_exchanges
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_program_that_never_comes(
    direction: str, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its group gives up with NaN instead of hanging; the other group's rows are right."""
    scheme = Scheme("euler", 1, 50, tf32=False)
    problem = truth.problem(scheme, 8, 2)
    net = truth.network(problem, 64, torch.float32)
    p, c, g, lp = (truth.pad(x, 64).float() for x in problem[2:])
    layout = RolloutLayout(4, 32, 4, 2, exchange)
    saved, _ = truth.buffers(problem, 64, torch.float32)
    monkeypatch.setattr(module, "LIMIT", 1 << 20)
    monkeypatch.setattr(module, "launch", _in_processes())
    forward = rollout_forward(p, c, net, scheme, layout, saved=saved)

    def run() -> tuple[Tensor, Tensor]:
        """By macro step, and in the end."""
        if direction == "fwd":
            return rollout_forward(p, c, net, scheme, layout)[:2]
        return rollout_backward(g, lp, net, scheme, layout, saved)[:2]

    whole = forward[:2] if direction == "fwd" else run()
    # Most of a second of a core: what the other group computes between meetings takes less.
    monkeypatch.setattr(module, "LIMIT", 2000)
    monkeypatch.setattr(module, "launch", _in_processes(missing=[2]))
    broken = run()
    for found, right in zip(broken, whole, strict=True):
        # Only what program 3 writes: 2 never ran.
        assert found[..., 4:, 32:].isnan().all()
        assert torch.equal(found[..., :4, :], right[..., :4, :])
        assert not right.isnan().any()


@pytest.mark.interpreted
@both_exchanges
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_program_that_comes_too_late(
    direction: str, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others publish after they gave up is NaN: so its own rows are, and not wrong."""
    monkeypatch.setattr(module, "LIMIT", 1 << 20)
    monkeypatch.setattr(module, "launch", _in_processes())
    scheme = Scheme("euler", 1, 50, tf32=False)
    problem = truth.problem(scheme, 4, 1)
    net = truth.network(problem, 64, torch.float32)
    p, c, g, lp = (truth.pad(x, 64).float() for x in problem[2:])
    layout = RolloutLayout(4, 32, 4, 2, exchange)
    saved, _ = truth.buffers(problem, 64, torch.float32)
    rollout_forward(p, c, net, scheme, layout, saved=saved)
    monkeypatch.setattr(module, "LIMIT", 2000)
    monkeypatch.setattr(module, "launch", _in_processes(last=[1]))
    if direction == "fwd":
        found = rollout_forward(p, c, net, scheme, layout)[:2]
    else:
        found = rollout_backward(g, lp, net, scheme, layout, saved)[:2]
    assert all(x.isnan().all() for x in found)


@pytest.mark.interpreted
@both_exchanges
@pytest.mark.parametrize("late", [0, 1])
def test_what_weights_get_when_a_program_comes_too_late(
    late: int, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gradient with its row scale is right or NaN: who gave up knows no common scale."""
    monkeypatch.setattr(module, "LIMIT", 1 << 20)
    monkeypatch.setattr(module, "launch", _in_processes())
    scheme = Scheme("euler", 1, 50, tf32=False)
    problem = truth.problem(scheme, 4, 1)
    net = truth.network(problem, 64, torch.float16)
    p, c, g, lp = (truth.pad(x, 64).float() for x in problem[2:])
    layout = RolloutLayout(4, 32, 4, 2, exchange)
    saved, _ = truth.buffers(problem, 64, torch.float16)
    rollout_forward(p, c, net, scheme, layout, saved=saved)

    def gradients() -> list[Tensor]:
        _, rows = truth.buffers(problem, 64, torch.float16)
        rollout_backward(g, 300 * lp, net, scheme, layout, saved, grads=rows)
        dh2, dh2_scale, dq, dq_scale = rows
        assert dh2_scale is not None and dq_scale is not None
        return [dh2.float() * dh2_scale[..., None], dq.float() * dq_scale[..., None]]

    right = gradients()
    monkeypatch.setattr(module, "LIMIT", 2000)
    monkeypatch.setattr(module, "launch", _in_processes(last=[late]))
    for found, expected in zip(gradients(), right, strict=True):
        assert found.isnan().any() and not expected.isnan().any()
        assert ((found == expected) | found.isnan()).all()


# --- layouts and checks -------------------------------------------------------------------------


def test_plans_of_a_5m_class_net_on_an_h100() -> None:
    f16 = torch.float16
    assert choose_layout(1, 512, f16, *H100) == RolloutLayout(8, 64, 4, 4)
    assert choose_layout(128, 512, f16, *H100) == RolloutLayout(8, 64, 4, 4)
    assert choose_layout(256, 512, f16, *H100) == RolloutLayout(16, 64, 8, 4)
    assert choose_layout(512, 512, f16, *H100) == RolloutLayout(32, 64, 8, 2)
    assert choose_layout(64, 1024, f16, *H100) == RolloutLayout(16, 32, 4, 4)
    assert choose_layout(64, 512, torch.float32, *H100) == RolloutLayout(8, 32, 4, 4)


def test_the_order_of_layouts_is_the_models() -> None:
    """Of the same tile, exchanged by flags: words come last, whatever the model makes of them."""
    for tile in {(layout.bm, layout.bn) for layout in module.LAYOUTS}:
        same = [p for p in module.LAYOUTS if (p.bm, p.bn) == tile and p.exchange == "flags"]
        times = [modelled_time(layout, 512, 2) for layout in same]
        assert times == sorted(times)
    four, eight, words = (
        modelled_time(layout, 512, 2)
        for layout in (
            RolloutLayout(8, 64, 4, 4),
            RolloutLayout(8, 64, 8, 4),
            RolloutLayout(8, 64, 4, 4, "words"),
        )
    )
    assert words < four < eight
    # Without the other half of what 8 warps read twice: 96 KB, of two products.
    read = cost.CONSTANTS["shared"].value * cost.CONSTANTS["clock"].value * 1e3
    assert eight - four == pytest.approx(2 * 96 * 1024 / read)


def test_what_does_not_fit_says_why() -> None:
    f16 = torch.float16
    assert "multiprocessors" in str(choose_layout(1024, 512, f16, *H100))
    assert "shared memory" in str(choose_layout(8, 1792, f16, *H100))
    assert "shared memory" in str(choose_layout(8, 512, f16, 132, 99 * 1024 - 40000))
    assert "no multiple" in str(why_not(RolloutLayout(8, 64, 8, 4), 8, 510, 2, *H100))
    assert "no rows" in str(choose_layout(0, 512, f16, *H100))


def test_a_measured_layout_comes_first() -> None:
    f16 = torch.float16
    key = module.tuning_key(128, 512, f16)
    assert key == "float16 B128 U512"
    measured = RolloutLayout(16, 32, 8, 4)
    assert choose_layout(128, 512, f16, *H100, {key: measured._asdict()}) == measured
    assert choose_layout(64, 512, f16, *H100, {key: measured._asdict()}) == RolloutLayout(
        8, 64, 4, 4
    )
    words = RolloutLayout(8, 64, 4, 4, "words")
    assert choose_layout(128, 512, f16, *H100, {key: words._asdict()}) == words
    earlier = {"bm": 8, "bn": 64, "warps": 8, "chunks": 4}  # before there were words
    assert choose_layout(128, 512, f16, *H100, {key: earlier}) == RolloutLayout(
        8, 64, 8, 4, "flags"
    )
    assert "faster" in str(choose_layout(128, 512, f16, *H100, {key: {"bm": 0}}))
    for wrong, match in (
        ({"bm": 8}, "has bm, bn"),
        (
            RolloutLayout(8, 32, 4, 2)._asdict(),
            r"must be one of \(8, 64, 4, 4, 'flags'\), .*, got \(8, 32, 4, 2, 'flags'\)",
        ),
        (RolloutLayout(32, 64, 8, 2, "words")._asdict(), "must be one of"),
        (RolloutLayout(8, 32, 8, 4)._asdict(), "not fit"),
    ):
        with pytest.raises(ValueError, match=match):
            choose_layout(128, 512, f16, *H100, {key: wrong})
        with pytest.raises(ValueError, match=match):
            module.check_tuned(key, wrong, *H100)
    module.check_tuned(key, measured._asdict(), *H100)


def test_words_are_only_taken_where_they_were_measured() -> None:
    names = [layout.name for layout in module.LAYOUTS]
    assert len(set(names)) == len(names) and "8x64 w4 words" in names
    for batch in range(1, 600, 37):
        found = choose_layout(batch, 512, torch.float16, *H100)
        assert isinstance(found, str) or found.exchange == "flags"


def test_every_plan_keeps_the_programs_resident() -> None:
    for batch in range(1, 700, 13):
        for padded in (64, 512, 832, 1024, 1792):
            for sms in (60, 108, 132):
                found = choose_layout(batch, padded, torch.float16, sms, 227 * 1024)
                if isinstance(found, RolloutLayout):
                    assert -(-batch // found.bm) * (padded // found.bn) <= sms
                    assert padded % found.bn == 0


def test_wrong_arguments_are_named() -> None:
    scheme = Scheme("heun", 1, 50)
    problem = truth.problem(scheme, 3, 2)
    net = truth.network(problem, 64, torch.float16)
    saved, gradients = truth.buffers(problem, 64, torch.float16)
    layout = RolloutLayout(8, 64, 4, 2)
    p, c = truth.pad(problem.p, 64).float(), truth.pad(problem.c, 64).float()

    def forward(**changed: Any) -> None:
        values = {"p": p, "c": c, "network": net, "scheme": scheme, "plan": layout} | changed
        rollout_forward(**values)

    for match, changed in (
        ("c must be", {"c": c[0]}),
        ("p must be a contiguous", {"p": p.double()}),
        ("c must be a contiguous", {"c": c.transpose(0, 1).contiguous().transpose(0, 1)}),
        ("heun or euler", {"scheme": scheme._replace(method="map")}),
        ("scheme.width", {"scheme": scheme._replace(width=65)}),
        ("at least one row", {"p": p[:0], "c": c[:, :0]}),
        ("multiple of the plan", {"plan": RolloutLayout(8, 48, 4, 2)}),
        ("b2 must be", {"network": net._replace(b2=net.b2.half())}),
        ("w13 must be", {"network": net._replace(w13=net.w13.float())}),
        ("w2 must be float16", {"network": net._replace(w2=net.w2.double(), w13=net.w13.double())}),
        ("xhat2 must be", {"saved": saved._replace(xhat2=saved.xhat2.float())}),
        ("rstd1 must be", {"saved": saved._replace(rstd1=saved.rstd1[1:])}),
        ("y1 and y2", {"saved": saved._replace(y1=None)}),
    ):
        with pytest.raises(ValueError, match=match):
            forward(**changed)
    work = Workspace(layout, 9, 64, torch.float16, p.device)
    with pytest.raises(ValueError, match="workspace must be for"):
        forward(workspace=work)
    work.begin((1 << 31) - 1)
    with pytest.raises(ValueError, match="too many to count"):
        work.begin(1)
    with pytest.raises(ValueError, match="dq_scale must be given"):
        rollout_backward(c, p, net, scheme, layout, saved, grads=gradients._replace(dq_scale=None))
    with pytest.raises(ValueError, match="g must be"):
        rollout_backward(c[0], p, net, scheme, layout, saved)


# --- on a GPU -----------------------------------------------------------------------------------


def _real_problem(
    device: str, batch: int, substeps: int, steps: int, exchange: str
) -> tuple[truth.Problem, int, RolloutLayout]:
    """510 features and the layout that a GPU has for them."""
    width, padded = 510, 512
    limits = H100
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        limits = found.multi_processor_count, found.shared_memory_per_block_optin
    layout = choose_layout(batch, padded, torch.float16, *limits)
    if isinstance(layout, str):
        pytest.skip(layout)
    layout = layout._replace(exchange=exchange)
    if device == "cuda" and layout not in module.LAYOUTS:
        pytest.skip(f"there is no layout {layout.name}")
    problem = truth.problem(Scheme("heun", substeps, width), batch, steps, device=device)
    return problem, padded, layout


@both_exchanges
@pytest.mark.parametrize(
    ("device", "batch", "substeps", "steps"),
    on_devices([(3, 1, 1)], [(batch, 4, 4) for batch in (1, 64, 100, 128, 199, 512)]),
)
def test_results_and_gradients_of_a_real_net(
    device: str,
    batch: int,
    substeps: int,
    steps: int,
    exchange: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "cpu":
        monkeypatch.setattr(module, "launch", _in_processes())
        monkeypatch.setattr(module, "LIMIT", 1 << 20)
    problem, padded, layout = _real_problem(device, batch, substeps, steps, exchange)
    truth.check(problem, truth.run(problem, padded, torch.float16, layout), torch.float16)


@gpu
@both_exchanges
@pytest.mark.parametrize("batch", [128, 256, 512])
def test_gpu_repetitions_are_bitwise_equal(batch: int, exchange: str) -> None:
    problem, padded, layout = _real_problem("cuda", batch, 4, 4, exchange)
    first = truth.run(problem, padded, torch.float16, layout)
    for _ in range(200):
        again = truth.run(problem, padded, torch.float16, layout)
        assert all(torch.equal(first[name], again[name]) for name in first)


@gpu
@both_exchanges
def test_gpu_graph_replays_with_changed_inputs(exchange: str) -> None:
    problem, padded, layout = _real_problem("cuda", 128, 4, 4, exchange)
    net = truth.network(problem, padded, torch.float16)
    saved, _ = truth.buffers(problem, padded, torch.float16)
    p, c = truth.pad(problem.p, padded).float(), truth.pad(problem.c, padded).float()
    g, lp = torch.randn_like(c), torch.randn_like(p)

    def both() -> tuple[Tensor, ...]:
        f = rollout_forward(p, c, net, problem.scheme, layout, saved=saved)
        b = rollout_backward(g, lp, net, problem.scheme, layout, saved)
        return f.total, f.p, b.dc, b.lp

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiled before, and on a stream that is not the default
        expected = [x.clone() for x in both()]
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(x, y) for x, y in zip(both(), expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for seed in range(3):
        torch.manual_seed(seed)
        for x in (p, c, g, lp):
            x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(torch.equal(x, y) for x, y in zip(replayed, both(), strict=True))
