"""Builds the optional native extension ``pwm_fast._C``. The rest is in pyproject.toml.

PWM_FAST_BUILD=auto, the default, warns and installs pure Python if the extension does not build;
1 makes that an error; 0 does not try. CXX, CXXFLAGS and LDFLAGS are honoured.

PWM_FAST_CUDA=auto, the default, compiles the CUDA sources into it where there are an nvcc (NVCC,
or the one on PATH, or CUDA_HOME's) and an NVIDIA driver, and leaves them out where there is none or
they do not build; 1 asks for no driver, and makes it an error if they cannot be built; 0 leaves
them out. PWM_FAST_CUDA_ARCHS names other architectures than "80 90a 90+PTX", of which those are
taken that nvcc knows; naming them takes the place of the driver.
"""

import glob
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

X86 = platform.machine().lower() in ("x86_64", "amd64")
TARGETS = {"generic": []}  # what csrc/cpu/*.cpp are compiled for -> the flags that it takes
if X86:
    TARGETS["avx2"] = ["-mavx2", "-mfma"]
    TARGETS["avx512"] = [*TARGETS["avx2"], "-mprefer-vector-width=512"]
    TARGETS["avx512"] += [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
# Fused multiply-adds where there are any, and no branches for errno or traps in the loops.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

SOURCES = {  # object -> its source and compiler flags of its own
    f"{name}.o": (f"csrc/{name}.cpp", [f"-DPWM_FAST_X86={int(X86)}"])
    for name in (
        *("module", "bind_cpu", "bind_program", "bind_cuda", "arguments", "checks"),
        *("cpu_features", "esnr_plan", "parallel"),
    )
}
# No fused multiply-adds but those that are written: its results are a GPU's to the bit.
SOURCES["esnr_emulation.o"] = ("csrc/esnr_emulation.cpp", ["-ffp-contract=off"])
SOURCES |= {
    f"{Path(source).stem}.{target}.o": (
        source,
        [*KERNEL_FLAGS, f"-DPWM_FAST_TARGET={target}", f"-DPWM_FAST_X86={int(X86)}", *flags],
    )
    for source in sorted(glob.glob("csrc/cpu/*.cpp"))
    for target, flags in TARGETS.items()
}
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CUDA_SOURCES = {f"{Path(source).stem}.cuda.o": source for source in glob.glob("csrc/cuda/*.cu")}
CUDA_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fmad=false"]  # see esnr_emulation
CUDA_ARCHS = "80 90a 90+PTX"  # machine code of A100 and H100, and what later GPUs compile
# One of these is there where an NVIDIA driver is: Linux (two), Tegra, WSL. Also in the Makefile.
DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg")
LINK_FLAGS = {"darwin": ["-bundle", "-undefined", "dynamic_lookup"]}.get(
    sys.platform, ["-shared", "-s"]
)


class NinjaBuildExt(build_ext):
    """Builds the extension with ninja, and lets a failure pass unless PWM_FAST_BUILD=1."""

    def build_extension(self, ext):
        """Compile and link `ext`, or warn that the package goes without it or without CUDA."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.build_with_cuda(target)
        except (CompileError, ImportError) as error:
            if BUILD == "1" or CUDA == "1":
                raise
            for stale in glob.glob("pwm_fast/_C.*.so"):  # of an earlier editable install
                os.remove(stale)
            self.warn(
                f"pwm_fast will be pure Python: its native extension did not build with {CXX} "
                f"({main_line(str(error))}). PWM_FAST_BUILD=1 shows the whole log."
            )

    def build_with_cuda(self, target):
        """Build with the CUDA sources where that is wanted and works, else without them."""
        try:
            nvcc, reason = None, "PWM_FAST_CUDA=0"
            if CUDA != "0":
                nvcc, reason = Nvcc.found(), why_no_use()
            self.run_ninja(target, None if reason else nvcc, reason)
        except CudaError as error:
            if CUDA == "1":
                raise
            self.run_ninja(target, None, str(error))
        except CompileError as error:
            if reason or CUDA == "1":
                raise
            reason = f"its CUDA sources did not build: {main_line(str(error))}"
            self.run_ninja(target, None, reason)
            self.warn(f"pwm_fast's native extension is without CUDA: {reason}")

    def run_ninja(self, target, nvcc, no_cuda):
        """Write build.ninja for `target` and run it; without `nvcc`, for the reason `no_cuda`."""
        # Not at the top: PWM_FAST_BUILD=0 needs neither.
        import pybind11
        from ninja import ninja_syntax

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        private = [f"-DPWM_FAST_FLAGS={json.dumps(shlex.join(flags))}"]  # a C string literal
        private += [f"-isystem{path}" for path in includes]
        link_flags = LINK_FLAGS + shlex.split(os.environ.get("LDFLAGS", ""))
        with open(build / "build.ninja", "w") as file:
            ninja = ninja_syntax.Writer(file, width=10**6)
            ninja.variable("cxx", CXX)
            ninja.variable("flags", ninja_syntax.escape(shlex.join(flags + private)))
            ninja.variable("link_flags", ninja_syntax.escape(shlex.join(link_flags)))
            ninja.rule(
                "cxx",
                "$cxx $flags $own_flags -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
            ninja.rule("link", "$cxx $in $link_flags -o $out")
            sources, link = dict(SOURCES), "link"
            if nvcc is None:
                no_cuda_flags = [f"-DPWM_FAST_NO_CUDA={json.dumps(no_cuda)}"]
                sources["no_cuda.o"] = ("csrc/no_cuda.cpp", no_cuda_flags)
            objects = []
            for name, (source, own_flags) in sources.items():
                objects += ninja.build(
                    name,
                    "cxx",
                    os.path.abspath(source),
                    variables={"own_flags": ninja_syntax.escape(shlex.join(own_flags))},
                )
            if nvcc is not None:
                link = "cuda_link"
                objects += nvcc.write(ninja, flags, link_flags)
            ninja.build(str(target), link, objects)
        run = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", build],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if run.returncode:
            raise CompileError(run.stdout)
        print(run.stdout)


class CudaError(CompileError):
    """There is no nvcc, or none that serves."""


class Nvcc:
    """The CUDA compiler, which links as well: it knows where CUDA's libraries are."""

    def __init__(self, program, archs):
        self.program, self.archs = program, archs

    @classmethod
    def found(cls):
        """Find nvcc and the architectures that it is to compile for."""
        named = os.environ.get("NVCC")
        home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
        program = named or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
        if program is None:
            raise CudaError("nvcc was not found when it was built")
        try:
            listed = subprocess.run(
                [program, "--list-gpu-code"], capture_output=True, text=True, check=True
            ).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise CudaError(f"{program} --list-gpu-code failed: {error}") from error
        return cls(program, cuda_archs({code.removeprefix("sm_") for code in listed}))

    def gencode(self):
        """Flags for the architectures: `90a` is machine code, `90+PTX` what later GPUs compile."""
        for arch in self.archs:
            number = arch.removesuffix("+PTX")
            kind = "compute" if arch.endswith("+PTX") else "sm"
            yield f"-gencode=arch=compute_{number},code={kind}_{number}"

    def write(self, ninja, flags, link_flags):
        """Add the rules and objects of the CUDA sources to build.ninja; return the objects."""
        from ninja import ninja_syntax

        host = ["-ccbin", shlex.split(CXX)[-1]]
        # Those that change how code is generated, as -fPIC and a sanitizer do.
        host += for_host(flag for flag in flags if flag.startswith(("-f", "-g", "-m")))
        archs = [f"-DPWM_FAST_CUDA_ARCHS={json.dumps(', '.join(self.archs))}", *self.gencode()]
        ninja.variable("nvcc", ninja_syntax.escape(shlex.quote(self.program)))
        ninja.variable("nvcc_flags", ninja_syntax.escape(shlex.join([*CUDA_FLAGS, *host, *archs])))
        # CUDA's static runtime stays invisible to the one that torch may bring along.
        link = ["-shared", "-cudart=static", "-nodlink", "-Xlinker=--exclude-libs=ALL", *host]
        link += for_host(flag for flag in link_flags if flag != "-shared")
        ninja.variable("nvcc_link_flags", ninja_syntax.escape(shlex.join(link)))
        ninja.rule(
            "nvcc",
            "$nvcc $nvcc_flags --threads 0 -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
        )
        ninja.rule("cuda_link", "$nvcc $in $nvcc_link_flags -o $out")
        objects = []
        for name, source in sorted(CUDA_SOURCES.items()):
            objects += ninja.build(name, "nvcc", os.path.abspath(source))
        return objects


def why_no_use():
    """Why nobody would use CUDA code built here; None where somebody may, or says so.

    It takes minutes to compile. torch, which knows best, is not there while a package is built.
    """
    if CUDA == "1" or os.environ.get("PWM_FAST_CUDA_ARCHS") or shutil.which("nvidia-smi"):
        return None
    if any(os.path.exists(file) for file in DRIVER_FILES):
        return None
    return "no NVIDIA driver was found when it was built; PWM_FAST_CUDA=1 builds without one"


def for_host(flags):
    """Flags that nvcc passes on to the C++ compiler; commas separate them there."""
    return ["-Xcompiler=" + flag.replace(",", "\\,") for flag in flags]


def cuda_archs(known):
    """The architectures to compile for, of those that nvcc knows by number: `known`."""

    def knows(arch):
        return re.sub(r"[af]?(\+PTX)?$", "", arch) in known

    asked = os.environ.get("PWM_FAST_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
    for arch in asked:
        if not re.fullmatch(r"\d+[af]?(\+PTX)?", arch):
            raise SystemExit(
                f"PWM_FAST_CUDA_ARCHS names {arch}, which is no architecture: "
                'it is a list such as "80 90a 90+PTX"'
            )
        if not knows(arch):
            raise CudaError(f"PWM_FAST_CUDA_ARCHS names {arch}, which this nvcc does not know")
    if asked:
        return asked
    archs = [arch for arch in CUDA_ARCHS.split() if knows(arch)]
    if not archs:
        raise CudaError(f"this nvcc knows none of the architectures {CUDA_ARCHS}")
    if not archs[-1].endswith("+PTX"):  # an older one: later GPUs compile what it has
        archs.append(re.sub(r"[af]$", "", archs[-1]) + "+PTX")
    return archs


def main_line(log):
    """Return the line of a failed build's log that tells most."""
    lines = [line.strip() for line in log.splitlines()]
    return next((line for line in lines if re.search(r"error:|not found", line)), lines[-1])


CXX = os.environ.get("CXX") or "c++"
BUILD = os.environ.get("PWM_FAST_BUILD") or "auto"
if BUILD not in ("auto", "0", "1"):
    raise SystemExit(f"PWM_FAST_BUILD={BUILD} is unknown: use auto, 0 or 1")

CUDA = os.environ.get("PWM_FAST_CUDA") or "auto"
if CUDA not in ("auto", "0", "1"):
    raise SystemExit(f"PWM_FAST_CUDA={CUDA} is unknown: use auto, 0 or 1")

extension = Extension(
    "pwm_fast._C",
    sorted({source for source, _ in SOURCES.values()}),
    depends=[
        "csrc/no_cuda.cpp",
        *(
            file
            for kind in ("h", "def", "cu", "cuh")
            for file in glob.glob(f"csrc/**/*.{kind}", recursive=True)
        ),
    ],
    optional=BUILD != "1" and CUDA != "1",
)
setup(
    ext_modules=[] if BUILD == "0" else [extension],
    cmdclass={"build_ext": NinjaBuildExt},
)
