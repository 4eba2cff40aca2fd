"""What to know of this installation and of the machine it is on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import import_module, metadata
from typing import Any

import pwm_fast

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "mujoco",
    "mujoco-warp",
    "warp-lang",
    "gymnasium",
    "dm-control",
    "hydra-core",
    "omegaconf",
    "wandb",
    "tensorboard",
    "matplotlib",
)
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PWM_FAST_BACKEND",
    "PWM_FAST_GEMM",
    "PWM_FAST_PACKS",
    "PWM_FAST_PRECISION",
    "PWM_FAST_ISA",
    "SLURM_CPUS_PER_TASK",
)


def report() -> dict[str, str]:
    """What to know of this installation and machine, by name."""
    rows = {
        "pwm_fast": f"{pwm_fast.__version__} in {os.path.dirname(pwm_fast.__file__)}",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": f"{cpu_name()}, {usable_cpus()} usable",
    }
    rows.update({name: package_version(name) for name in PACKAGES})
    rows.update(_native())
    rows.update(_devices())
    rows.update(_operations())
    rows.update({name: os.environ[name] for name in VARIABLES if name in os.environ})
    return rows


def package_version(package: str) -> str:
    """Version of an installed distribution, or ``not installed``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def usable_cpus() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # what this process may use, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Model of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _native() -> dict[str, str]:
    """The native extension's build, or why there is none."""
    try:
        native = import_module("pwm_fast._C")
    except ImportError as error:
        reason = "not built" if isinstance(error, ModuleNotFoundError) else f"broken: {error}"
        return {"native extension": f"{reason}; pwm_fast runs without it"}
    try:
        state = f"loaded, instruction set {native.cpu_isa()}"
    except ValueError as error:
        state = f"loaded, but its operations fail: {error}"
    build = native.build_info()
    return {
        "native extension": state,
        "native build": f"{build['compiler']} {build['compiler_version']}, {build['cxx_standard']}",
        "native flags": str(build["flags"]),
        "native CUDA": _native_cuda(native, build),
    }


def _products() -> dict[str, str]:
    """What multiplies matrices on the CPU."""
    torch, gemm = import_module("torch"), import_module("pwm_fast.fused.gemm")
    try:
        fp32 = "oneDNN, prepacked" if gemm.prepacks(torch.zeros(1, 1, device="cpu")) else "torch"
    except ValueError as error:
        fp32 = f"fail: {error}"
    bf16 = "in hardware" if gemm.cpu_multiplies_bf16() else "rounded, multiplied in fp32"
    return {"GEMMs on the CPU": f"fp32: {fp32}; bf16: {bf16}"}


def _native_cuda(native: Any, build: Mapping[str, str | bool]) -> str:
    """The native extension's CUDA code and how many GPUs it can run on, or why there is none."""
    if not build["cuda"]:
        return f"no: {build['cuda_detail']}"
    count, reason = native.cuda_devices()
    return f"{build['cuda_detail']}; GPUs: {count or f'none, {reason}'}"


def native_isa() -> str | None:
    """The native extension's instruction set; None where it is not built or broken."""
    try:
        return str(import_module("pwm_fast._C").cpu_isa())
    except ImportError:
        return None


def _devices() -> dict[str, str]:
    """What torch computes on."""
    try:
        torch = import_module("torch")
    except Exception as error:  # a broken install is what this report is for
        return {"torch import": f"failed: {error}"}
    rows = {
        "torch": str(torch.__version__),  # with its build, which its metadata on PyPI lack
        "torch CPU": f"{torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
    }
    rows.update(_native_threads())
    rows.update(_products())
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "no usable GPU or driver" if built else "this torch is built for CPUs alone"
        return {**rows, "gpu": f"none: {why}"}
    rows["CUDA of torch"] = f"{torch.version.cuda}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows[f"gpu {index}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} SMs"
        )
    return rows


def _native_threads() -> dict[str, str]:
    """Whose threads the native kernels run on."""
    from pwm_fast.backends import native

    if native.why_missing() is not None:
        return {}
    runtime = native.openmp_runtime()
    if runtime is None:
        return {"native threads": "1: torch has loaded no OpenMP runtime that could be shared"}
    return {"native threads": f"torch's own, by {os.path.basename(runtime)}"}


def _operations() -> dict[str, str]:
    """Which backends run each operation on a float32 tensor, on the CPU and on the first GPU."""
    try:
        torch = import_module("torch")
        from pwm_fast import ops  # noqa: F401  declares its operations
        from pwm_fast.backends import select
    except Exception:  # said where the devices are listed
        return {}
    rows: dict[str, str] = {}
    reasons: list[str] = []
    names = [n for n in select.NAMES if n != "auto"]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        rows[f"on {device}, float32"] = _cells(names)
        call = select.Call([torch.zeros(1, device=device)])
        for operation in select.OPERATIONS:
            cells = dict.fromkeys(names, "-")
            taken = False
            for backend, reason in select.verdicts(operation, call):
                if reason is not None:
                    if reason not in reasons:
                        reasons.append(reason)
                    cells[backend.name] = f"no [{reasons.index(reason) + 1}]"
                elif backend.automatic and not taken:
                    cells[backend.name], taken = "auto", True
                else:
                    cells[backend.name] = "if asked"
            prefix = "" if device == "cpu" else f"{device} "
            rows[f"  {prefix}{operation}"] = _cells(list(cells.values()))
    rows.update({f"  [{i}]": reason for i, reason in enumerate(reasons, start=1)})
    return rows


def _cells(texts: list[str]) -> str:
    return " ".join(f"{text:10}" for text in texts).rstrip()
