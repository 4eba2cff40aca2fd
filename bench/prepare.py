"""Build before a visit to a GPU what the visit would spend its minutes on; no GPU is needed.

make gpu-kit                       # in a virtual environment with the Python of that machine
python -m bench.prepare            # with this Python and this Triton
python -m bench.prepare --only headline layouts --no-native

Every kernel that :mod:`bench.gpu` launches up to its stage ``esnr`` is compiled for an H100 by
launching it on a device that runs nothing (:mod:`bench.fake_cuda`), so that Triton's cache has it
where a process with a GPU looks it up; and the native extension is built, with its CUDA kernels
where there is an nvcc. With pytest and what builds the extension, for a machine that has none, they
are packed into ``build/gpu-kit`` (:mod:`bench.gpu_kit`).

Exit status: 0 done, 1 something was not compiled or built, 2 the kit cannot be made, 130 it was
interrupted; what there was of a kit before is left as it was then.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import environment, gpu_checks, gpu_kit, gpu_out, gpu_tests, matrix, pool, rollouts
from bench import esnr as gradients
from bench.providers import OURS, PRECISIONS, backend
from bench.session import say
from bench.sizes import ACTION, HORIZON, OBS, alg_config
from bench.stages import Deadline, terminable
from pwm_fast.run.installation import usable_cpus

ARCH = "sm_90"  # an H100 or H200
CUDA_ARCHS = "90a"  # of setup.py
LINKAGES = ("ELF", "")  # of platform.architecture() with and without the program `file`
BUILDING = 600.0  # seconds of the native extension, at most
TOOLS = (*gpu_tests.NEEDED, "pytest-benchmark", *gpu_checks.BUILD_TOOLS)


class Work(NamedTuple):
    """Something whose kernels are compiled.

    Attributes:
        stage: that launches them.
        name: unique.
        run: launches them, under a :class:`bench.fake_cuda.FakeCuda`.
    """

    stage: str
    name: str
    run: Callable[[Any], None]


def work() -> list[Work]:
    """All of it, in the order of the stages."""
    found = [_rollout("headline", "5M", 128, name) for name in OURS]
    found += [Work("layouts", f"layout {i}", partial(_layout, number=i)) for i in range(_count())]
    for substeps in (matrix.SUBSTEPS[0], 2):  # of the actor's update by itself, and of an epoch
        for name in OURS:
            title = f"updates 5M K{substeps} {name}"
            found.append(Work("epoch", title, partial(_updates, substeps=substeps, provider=name)))
    for name in OURS:
        found.append(Work("epoch", f"compared {name}", partial(_compared, provider=name)))
    found.append(Work("micro", "constants", _constants))
    for case in matrix.quick()[1:]:
        model = case.axes["model"].removesuffix("_flow")
        found += [_rollout("quick", model, case.axes["batch"], name) for name in OURS]
    for case in matrix.esnr():
        model, samples = case.axes["model"], case.axes["batch"]
        run = partial(_esnr, model=model, samples=samples)
        found.append(Work("esnr", case.name, run))
    return found


STAGES = ("headline", "layouts", "epoch", "micro", "quick", "esnr")


def _count() -> int:
    from bench.internals import rollout_kernels

    return len(rollout_kernels.LAYOUTS)


def _rollout(stage: str, model: str, batch: int, provider: str) -> Work:
    run = partial(_imagine, model=model, batch=batch, provider=provider)
    return Work(stage, f"rollout {model} b{batch} {provider}", run)


def _imagine(cuda: Any, model: str, batch: int, provider: str) -> None:
    from bench.fake_cuda import DEVICE
    from bench.internals import weight_cache
    from pwm_fast.agent import PWM

    alg = alg_config(f"{model}_flow", matrix.SUBSTEPS[0])
    with cuda, torch.device(DEVICE), backend(provider, DEVICE):
        agent = PWM(OBS, ACTION, alg, device=DEVICE, graphs=False)
        z = torch.randn(batch, agent.world_model.latent_dim)
        noise = torch.randn(HORIZON, batch, ACTION)
        rollouts.imagined(agent, z, noise, True)
        with weight_cache.capturing():  # as in a CUDA graph
            rollouts.imagined(agent, z, noise, True)


def _layout(cuda: Any, number: int) -> None:
    from bench import gpu_rollout
    from bench.fake_cuda import DEVICE

    with cuda:
        plans = gpu_rollout.layouts(DEVICE)
        if number < len(plans):  # the others do not fit
            forward, backward = gpu_rollout.workload(DEVICE, False).halves(plans[number])
            forward()
            backward()


def _updates(cuda: Any, substeps: int, provider: str) -> None:
    from bench import launches

    launches.count(alg_config("5M_flow", substeps), "auto", PRECISIONS[provider], cuda=cuda)


def _compared(cuda: Any, provider: str) -> None:
    """The updates that an epoch's check compares with float64 (:mod:`bench.agent`)."""
    from bench.fake_cuda import DEVICE
    from pwm_fast.agent import PWM
    from pwm_fast.ops import ImaginedRollout
    from pwm_fast.replay import Windows

    alg = alg_config("5M_flow")
    rows, batch = alg.model_learning.batch_size, alg.actor.batch_size
    alg.critic.passes = alg.critic.minibatches = 1
    with cuda, torch.device(DEVICE), backend(provider, DEVICE):
        precision = PRECISIONS[provider]
        agent = PWM(OBS, ACTION, alg, device=DEVICE, graphs=False, precision=precision)
        for optimizer in agent.optimizers.values():
            optimizer.keep_gradients = True
        obs, action = torch.randn(HORIZON + 1, rows, OBS), torch.randn(HORIZON, rows, ACTION)
        agent.update_world_model(Windows(obs, action, *torch.zeros(2, HORIZON, rows)))
        z = torch.randn(HORIZON + 1, batch, agent.world_model.latent_dim)
        agent._update_critic(ImaginedRollout(z, z.new_empty(0), torch.randn(HORIZON, batch)))


def _constants(cuda: Any) -> None:
    from bench.fake_cuda import DEVICE, PROPERTIES
    from bench.micro import kernels

    with cuda:
        kernels.start_all(DEVICE, PROPERTIES.multi_processor_count)


def _esnr(cuda: Any, model: str, samples: int) -> None:
    from bench.fake_cuda import DEVICE
    from pwm_fast.ops import esnr

    shapes = gradients.parameters(model)
    sizes = [shape.numel() for shape in shapes]
    with cuda, torch.device(DEVICE), backend("fast", DEVICE, "esnr"):
        flat = [torch.empty(sum(sizes)) for _ in range(samples)]
        esnr([[p.view(s) for p, s in zip(x.split(sizes), shapes, strict=True)] for x in flat])


# --- compiling ----------------------------------------------------------------------------------


def compile_one(name: str, cache: str) -> tuple[int, str | None]:
    """What a process does with a piece of work: the kernels compiled, and what went wrong."""
    os.environ["TRITON_CACHE_DIR"] = cache
    warnings.filterwarnings("ignore", message=".*midpoint.*")
    from bench.fake_cuda import FakeCuda

    cuda, reason = FakeCuda(compile=True), None
    with _both_linkages():
        try:
            {item.name: item for item in work()}[name].run(cuda)
        except Exception as error:
            reason = say(error)
    return cuda.compiled.total(), reason


def _both_linkages() -> Any:
    """Launchers are kept under the keys of machines with and without the program ``file``.

    Triton's key of a C launcher holds ``platform.architecture()``, which asks that program.
    """
    from triton.runtime import build
    from triton.runtime.cache import get_cache_manager

    real = build._build

    def both(name: str, source: str, *args: Any, **options: Any) -> Any:
        library = real(name, source, *args, **options)
        text = Path(source).read_text("utf-8")
        for linkage in LINKAGES:
            parts = (platform.machine(), platform.system(), platform.architecture()[0], linkage)
            key = hashlib.sha256((text + ",".join(parts)).encode()).hexdigest()
            file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
            get_cache_manager(key).put(Path(library).read_bytes(), file, binary=True)
        return library

    return mock.patch.object(build, "_build", both)


def compile_all(names: Sequence[str], cache: Path, jobs: int) -> list[str]:
    """Compile into ``cache`` in several processes; what went wrong, a line each."""
    wrong = []
    found = pool.each(partial(compile_one, cache=str(cache)), names, jobs)
    for count, (name, outcome) in enumerate(found, 1):
        compiled, reason = (0, str(outcome)) if isinstance(outcome, Exception) else outcome
        said = f"{compiled} compiled{'' if reason is None else f'; {reason}'}"
        print(f"  {count}/{len(names)} {name}: {said}", flush=True)
        if reason is not None:
            wrong.append(f"{name}: {reason}")
    return wrong


def native(folder: Path) -> tuple[list[Path], str]:
    """The extension's file, and what it holds or why there is none."""
    shutil.rmtree(folder, ignore_errors=True)
    cuda = {} if gpu_checks.find_program("nvcc") is None else {"PWM_FAST_CUDA_ARCHS": CUDA_ARCHS}
    left = Deadline(BUILDING)
    done = gpu_checks.compile_extension(left, "--build-lib", str(folder), "--force", **cuda)
    files = sorted((folder / "pwm_fast").glob("_C*")) if done.status == 0 else []
    if not files:
        return [], f"it did not build: {done.output.strip()[-300:]}"
    probe = "import sys; sys.path.insert(0, '.'); import _C; print(*sorted(dir(_C)))"
    command = [sys.executable, "-c", probe]
    found = gpu_checks.run_command(command, Deadline(60.0), cwd=folder / "pwm_fast")
    if found.status != 0:
        return [], f"it does not load: {found.output.strip()[-300:]}"
    kernels = "with" if "cuda_esnr " in f"{found.output} " else "without"
    return files, f"{files[0].name}, {kernels} CUDA kernels"


def tools(folder: Path) -> str | None:
    """Install what tests and builds need into a folder; what went wrong, or None."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    pins = ["-c", str(environment.ROOT / "constraints.txt")]
    wanted = ["--target", str(folder), "--only-binary", ":all:", *TOOLS]
    done = gpu_checks.run_command([*pip, *pins, *wanted], Deadline(BUILDING))
    return None if done.status == 0 else f"it was not installed: {done.output.strip()[-300:]}"


# --- the command --------------------------------------------------------------------------------


def instructions(manifest: dict[str, Any], kit: Path) -> str:
    """What to bring, and the command to run there."""
    size = sum(part["bytes"] for part in manifest["files"].values()) / 2**20
    root = environment.ROOT
    shown = kit.relative_to(root) if kit.is_relative_to(root) else kit
    commit = manifest["commit"]
    changed = f"NOTE: files differ from commit {commit}, under which their results would be stored."
    command = f"PWM_FAST_COMMIT={commit} python3 -m bench.gpu --kit {shown}"
    return (
        f"{f'{changed} Commit first, and make the kit anew.' * bool(manifest.get('dirty'))}\n"
        f"Bring the checkout at commit {commit} and, as git ignores it, beside it:\n"
        f"    {shown}    ({size:.1f} MiB)\n"
        f"Run there, in the checkout, with Python {manifest['python']} and Triton "
        f"{manifest['triton']}; {gpu_out.VARIABLE} names the folder of what is to be kept:\n"
        f"    {command}\n"
        f"and later, from the result that it left (put it into the checkout):\n"
        f"    {command} --resume bench/results/gpu_NAME.json"
    )


def why_not() -> str | None:
    """Why no kernel can be compiled here; None if they can."""
    try:
        from bench import fake_driver
    except ImportError as error:
        return f"{error}: the Triton of the machine with the GPU is needed (make gpu-kit)"
    return fake_driver.why_not()


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kit", type=Path, default=gpu_kit.KIT, help="the folder")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="kernels of these stages")
    parser.add_argument("--no-native", action="store_true", help="leave the extension out")
    parser.add_argument("--jobs", type=int, default=usable_cpus(), help="processes")
    options = parser.parse_args(argv)
    try:
        with terminable():
            wrong = _prepare(options)
    except (gpu_kit.KitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing new was packed", file=sys.stderr)
        return 130
    for line in wrong:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _prepare(options: argparse.Namespace) -> list[str]:
    """Make the kit, and return what is missing of it."""
    reason = why_not()
    if reason is not None:
        raise gpu_kit.KitError(reason)
    started = time.monotonic()
    options.kit.mkdir(parents=True, exist_ok=True)
    software, commit = environment.software(), environment.commit()
    names = [w.name for w in work() if w.stage in (options.only or STAGES)]
    jobs = max(options.jobs, 1)
    print(
        f"compiles what {len(names)} pieces of work launch on {ARCH}, with Triton "
        f"{software['triton']} on Python {software['python']}, in {jobs} processes: of all of it, "
        "some 5 minutes of one core; then the native extension, 2 more",
        flush=True,
    )
    scratch = environment.ROOT / "build" / "gpu-kit.work"
    cache = scratch / "triton"
    shutil.rmtree(cache, ignore_errors=True)  # the kit holds what is launched today
    cache.mkdir(parents=True)
    wrong = compile_all(names, cache, jobs)
    files: list[Path] = []
    if not options.no_native:
        files, said = native(scratch / "native")
        print(f"  native extension: {said}")
        wrong += [] if files else [f"native extension: {said}"]
    reason = tools(scratch / "tools")
    wrong += [] if reason is None else [f"{' and '.join(TOOLS)}: {reason}"]
    facts = {
        "commit": commit["id"],
        "dirty": commit["dirty"],
        "arch": ARCH,
        "libc": " ".join(platform.libc_ver()),
        **{name: software[name] for name in ("python", "torch", "triton")},
    }
    manifest = gpu_kit.pack(options.kit, cache, files, scratch / "tools", facts)
    print(f"{options.kit}: {time.monotonic() - started:.0f} s")
    print(instructions(manifest, options.kit))
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
