"""Measure the launch choices of the fused kernels on this GPU and keep those that pay.

python -m bench.tune                    # all problems, at most 480 s; the same command goes on
python -m bench.tune --only fwd --rows 128
python -m bench.tune --dry              # on any machine: what would be measured

Every choice that fits is run on random operands, compared with float64, and timed in a CUDA graph.
Where one is faster than the kernel's own heuristic by more than 3 %, it becomes an entry of
``kernels/tuned/<gpu>.json``, which the kernels read (``pwm_fast.kernels.tuning``); all times go to
``bench/results/tune_<gpu>.json``. Nothing is tuned while a program runs.

Exit status: 0 done or the time was over, 1 a choice was wrong or failed, 2 one line says why
nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import environment, results
from bench.session import say

Options = Mapping[str, int]
GAIN = 0.03  # less is noise, and the heuristic also serves sizes that nobody measured
ERROR = 2e-2  # of a result in 16 bit, relative to its largest entry; a wrong tile is off by more
ROWS = (64, 128, 512, 2048, 16384)
# Padded widths (columns of the result, summed over) of hidden layers and of first layers.
SHAPES = ((512, 512), (1792, 768), (1792, 1792), (4096, 1376), (4096, 4096))


class Wrong(Exception):
    """A choice computes something else."""


@dataclass(frozen=True)
class Problem:
    """One launch to choose for.

    Attributes:
        kernel: whose entries.
        key: of the entry.
        choices: options by name; ``unfused`` has ``block_m`` 0.
        heuristic: the name that the kernel chooses by itself.
        run: makes a choice's call, checked; raises :class:`Wrong`.
    """

    kernel: str
    key: str
    choices: Mapping[str, Options]
    heuristic: str
    run: Callable[[Options], Callable[[], Any]]

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.kernel} {self.key}"


Times = dict[str, Any]  # by name of a choice: microseconds, or what went wrong


def measure(problem: Problem, clock: Callable[[Callable[[], Any]], float]) -> Times:
    """Time every choice; one that fails or is wrong says so instead."""
    found: Times = {}
    for name, options in problem.choices.items():
        try:
            found[name] = float(f"{1e6 * clock(problem.run(options)):.4g}")
        except Exception as error:
            found[name] = say(error)
    return found


def entry(problem: Problem, times: Times) -> Options | None:
    """The options that pay; None where the heuristic is as good or nothing was measured."""
    measured = {name: t for name, t in times.items() if isinstance(t, float)}
    if not measured:
        return None
    best = min(measured, key=lambda name: measured[name])
    usual = measured.get(problem.heuristic)
    if best == problem.heuristic or (usual is not None and measured[best] > usual * (1.0 - GAIN)):
        return None
    return problem.choices[best]


class Log:
    """All times measured on a GPU, kept after every problem.

    Args:
        path: the file.
        facts: of :func:`bench.environment.describe`.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": results.SCHEMA, **facts, "times": {}}
        if path.exists():
            before = json.loads(path.read_text("utf-8"))
            if before.get("commit", {}).get("id") == facts["commit"]["id"]:
                self.data["times"] = before["times"]

    @property
    def times(self) -> dict[str, Times]:
        """By name of the problem."""
        found: dict[str, Times] = self.data["times"]
        return found

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n", "utf-8")


def tune(
    problems: Iterable[Problem],
    log: Log,
    clock: Callable[[Callable[[], Any]], float],
    over: Callable[[], bool],
    tell: Callable[[str], None] = print,
) -> tuple[dict[str, dict[str, Options]], bool]:
    """Measure what the log has not; entries of all that it has then, and whether all was right."""
    entries: dict[str, dict[str, Options]] = {}
    right = True
    for problem in problems:
        if problem.name not in log.times:
            if over():
                continue
            log.times[problem.name] = measure(problem, clock)
            log.save()
        times = log.times[problem.name]
        right &= all(isinstance(t, float) for t in times.values())
        chosen = entry(problem, times)
        entries.setdefault(problem.kernel, {})
        if chosen is not None:
            entries[problem.kernel][problem.key] = chosen
        tell(line(problem, times, chosen))
    return entries, right


def line(problem: Problem, times: Times, chosen: Options | None) -> str:
    """A problem's outcome in a line."""
    measured = {name: t for name, t in times.items() if isinstance(t, float)}
    if not measured:
        return f"{problem.name}: nothing ran: {next(iter(times.values()), 'no choice fits')}"
    best = min(measured, key=lambda name: measured[name])
    usual = measured.get(problem.heuristic)
    text = f"{problem.name}: best {best} {measured[best]:.4g} µs"
    text += f", heuristic {problem.heuristic} " + ("failed" if usual is None else f"{usual:.4g} µs")
    return text + (f"; kept {dict(chosen)}" if chosen is not None else "; the heuristic stays")


# --- the fused products --------------------------------------------------------------------------


def problems(
    device: torch.device | None, sms: int, shared: int, rows: Sequence[int] = ROWS
) -> Iterator[Problem]:
    """Everything that reads tuned entries.

    Args:
        device: to compute on; None makes problems that are only to be listed.
        sms: multiprocessors.
        shared: bytes of shared memory that a program may have.
        rows: of the results.

    Raises:
        ImportError: no kernel with launch choices is there, or Triton is not.
    """
    from pwm_fast.kernels import plan as planning

    for kernel in ("linear_norm_act_fwd", "linear_norm_act_bwd"):
        for n, k in SHAPES:
            for count in rows:
                limits = planning.Limits(sms, shared)
                product = planning.Product(kernel, count, n, k)
                plans = planning.candidates(product, limits)
                own = planning.plan(product, limits)
                choices: dict[str, Options] = {_name(p): _options(p) for p in plans}
                choices["unfused"] = {"block_m": 0}
                yield Problem(
                    kernel,
                    product.key,
                    choices,
                    "unfused" if own is None else _name(own),
                    partial(_fused_call, kernel, count, n, k, sms, shared, device),
                )


def _name(plan: Any) -> str:
    return f"{plan.block_m}x{plan.block_n}"


def _options(plan: Any) -> Options:
    return {"block_m": plan.block_m, "block_n": plan.block_n}


def _fused_call(
    kernel: str,
    rows: int,
    n: int,
    k: int,
    sms: int,
    shared: int,
    device: torch.device,
    options: Options,
) -> Callable[[], Any]:
    """The call of one choice on random operands, after its result was compared with float64."""
    from pwm_fast.kernels import linear_norm_act, norm_act, plan

    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g, device=device)

    gamma, beta = 1.0 + normal(n, scale=0.1), normal(n, scale=0.1)
    y = torch.full((rows, n), float("nan"), dtype=torch.float16, device=device)
    rstd = torch.rand(rows, generator=g, device=device) + 0.5
    common: dict[str, Any] = {"gamma": gamma, "beta": beta, "act": "mish", "width": n}
    chosen = None
    exchange = None
    if options["block_m"]:
        product = plan.Product(kernel, rows, n, k)
        chosen = plan.entry_plan(options, product, plan.Limits(sms, shared))
        if chosen.synced:
            exchange = plan.Exchange(chosen, rows, linear_norm_act.PLANES, device)

    if kernel.endswith("fwd"):
        x, hat = normal(rows, k).half(), torch.empty_like(y)
        weight = normal(n, k, scale=k**-0.5)
        weight = (weight - weight.mean(0)).half()
        extra = {**common, "group": 1, "eps": 1e-5}
        if chosen is not None:
            call = partial(
                linear_norm_act.linear_norm_act_fwd,
                x,
                weight,
                y,
                hat,
                rstd,
                plan=chosen,
                exchange=exchange,
                **extra,
            )
        else:
            h = torch.empty(rows, n, device=device)

            def call() -> None:
                _product(x, weight.t(), h)
                norm_act.norm_act_fwd(h, y, hat, rstd, **extra)

        h64 = x.double() @ weight.double().t()
        u = h64 * (h64.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gamma + beta
        wanted = torch.nn.functional.mish(u)
        found, factor = y, None
    else:
        dy, hat = normal(rows, k).half(), normal(rows, n).half()
        weight = normal(k, n, scale=k**-0.5).half()
        ones, factor = torch.ones(rows, device=device), torch.empty(rows, device=device)
        scales = {"dy_scale": ones, "dx_scale": factor}
        if chosen is not None:
            call = partial(
                linear_norm_act.linear_norm_act_bwd,
                dy,
                weight,
                y,
                hat,
                rstd,
                plan=chosen,
                exchange=exchange,
                **scales,
                **common,
            )
        else:
            dm = torch.empty(rows, n, device=device)

            def call() -> None:
                _product(dy, weight, dm)
                norm_act.norm_act_bwd(dm, y, hat, rstd, y=None, group=1, **scales, **common)

        hat64 = hat.double()
        u = (hat64 * gamma + beta).requires_grad_(True)
        (slope,) = torch.autograd.grad(torch.nn.functional.mish(u).sum(), u)
        gain = (dy.double() @ weight.double()) * slope * gamma
        wanted = rstd[:, None] * (gain - hat64 * (gain * hat64).mean(-1, keepdim=True))
        found = y
    call()
    result = found.double() if factor is None else found.double() * factor[:, None]
    error = float((result - wanted).abs().max() / wanted.abs().max())
    if not error <= ERROR:
        raise Wrong(f"relative error {error:.1e} exceeds {ERROR:.0e}")
    return call


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """In 16 bit with float32 sums and result; on a CPU, for tests, in float32."""
    if out.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(a.float() @ b.float())


# --- command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m bench.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--device", default="cuda")
    found.add_argument("--budget", type=float, default=480.0, metavar="S")
    found.add_argument("--only", default="", metavar="TEXT", help="problems with this in the name")
    found.add_argument("--rows", type=int, nargs="+", default=ROWS)
    found.add_argument("--dry", action="store_true", help="list what would be measured")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    options = parser().parse_args(argv)
    started = time.monotonic()
    try:
        if min(options.rows) < 1:
            raise ValueError(f"--rows must be positive, got {min(options.rows)}")
        device = None if options.dry else _device(options.device)
        sms, shared = 132, 227 * 1024  # of an H200, for a list
        if device is not None:
            properties = torch.cuda.get_device_properties(device)
            sms = properties.multi_processor_count
            shared = getattr(properties, "shared_memory_per_block_optin", 163 * 1024)
        found = [p for p in problems(device, sms, shared, options.rows) if options.only in p.name]
        if not found:
            raise ValueError(f"--only {options.only}: no problem has that in its name")
    except (ImportError, ValueError, RuntimeError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if device is None:
        for p in found:
            print(f"{p.name}: {', '.join(p.choices)}; heuristic {p.heuristic}")
        print(f"{len(found)} problems, {sum(len(p.choices) for p in found)} choices; not measured")
        return 0

    from bench.gpu import default_path
    from bench.micro import seconds
    from pwm_fast.kernels import tuning

    slug = default_path(device).stem.removeprefix("gpu_")
    log = Log(results.STORE / f"tune_{slug}.json", environment.describe(device))
    entries, right = tune(
        found,
        log,
        lambda call: seconds(call, device, 10),
        lambda: time.monotonic() - started > options.budget,
    )
    name = torch.cuda.get_device_name(device)
    path = tuning.save(name, merged(tuning.load(name), found, log.times, entries))
    done = sum(p.name in log.times for p in found)
    print(f"{done} of {len(found)} problems, {sum(map(len, entries.values()))} entries; {path}")
    return 0 if right else 1


def merged(
    before: Mapping[str, Mapping[str, Options]],
    found: Iterable[Problem],
    times: Mapping[str, Times],
    entries: Mapping[str, Mapping[str, Options]],
) -> dict[str, dict[str, Options]]:
    """The entries that were there, but for those that were measured anew."""
    new = {kernel: dict(options) for kernel, options in before.items()}
    for problem in found:
        if problem.name in times:
            new.setdefault(problem.kernel, {}).pop(problem.key, None)
    for kernel, options in entries.items():
        new.setdefault(kernel, {}).update(options)
    return {kernel: options for kernel, options in new.items() if options}


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type != "cuda":
        raise ValueError(f"--device must be cuda or cuda:N, got {name}; --dry needs none")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"--device={name}, but torch {torch.__version__} sees {count} GPUs here")
    return device


if __name__ == "__main__":
    raise SystemExit(main())
