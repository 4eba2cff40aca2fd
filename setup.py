"""Builds the optional native extension ``pwm_fast._C``. The rest is in pyproject.toml.

PWM_FAST_BUILD=auto, the default, warns and installs pure Python if the extension does not build;
1 makes that an error; 0 does not try. CXX, CXXFLAGS and LDFLAGS are honoured.
"""

import glob
import json
import os
import platform
import re
import shlex
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
    for name in ("module", "bind_cpu", "cpu_features", "parallel")
}
SOURCES |= {
    f"{Path(source).stem}.{target}.o": (
        source,
        [*KERNEL_FLAGS, f"-DPWM_FAST_TARGET={target}", f"-DPWM_FAST_X86={int(X86)}", *flags],
    )
    for source in sorted(glob.glob("csrc/cpu/*.cpp"))
    for target, flags in TARGETS.items()
}
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
LINK_FLAGS = {"darwin": ["-bundle", "-undefined", "dynamic_lookup"]}.get(
    sys.platform, ["-shared", "-s"]
)


class NinjaBuildExt(build_ext):
    """Builds the extension with ninja, and lets a failure pass unless PWM_FAST_BUILD=1."""

    def build_extension(self, ext):
        """Compile and link `ext`, or warn that the package goes without it."""
        try:
            self.run_ninja(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (CompileError, ImportError) as error:
            if BUILD == "1":
                raise
            for stale in glob.glob("pwm_fast/_C.*.so"):  # of an earlier editable install
                os.remove(stale)
            self.warn(
                f"pwm_fast will be pure Python: its native extension did not build with {CXX} "
                f"({main_line(str(error))}). PWM_FAST_BUILD=1 shows the whole log."
            )

    def run_ninja(self, target):
        """Write build.ninja for `target` and run it."""
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
            objects = []
            for name, (source, own_flags) in SOURCES.items():
                objects += ninja.build(
                    name,
                    "cxx",
                    os.path.abspath(source),
                    variables={"own_flags": ninja_syntax.escape(shlex.join(own_flags))},
                )
            ninja.build(str(target), "link", objects)
        run = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", build],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if run.returncode:
            raise CompileError(run.stdout)
        print(run.stdout)


def main_line(log):
    """Return the line of a failed build's log that tells most."""
    lines = [line.strip() for line in log.splitlines()]
    return next((line for line in lines if re.search(r"error:|not found", line)), lines[-1])


CXX = os.environ.get("CXX") or "c++"
BUILD = os.environ.get("PWM_FAST_BUILD") or "auto"
if BUILD not in ("auto", "0", "1"):
    raise SystemExit(f"PWM_FAST_BUILD={BUILD} is unknown: use auto, 0 or 1")

extension = Extension(
    "pwm_fast._C",
    sorted({source for source, _ in SOURCES.values()}),
    depends=glob.glob("csrc/**/*.h", recursive=True),
    optional=BUILD != "1",
)
setup(
    ext_modules=[] if BUILD == "0" else [extension],
    cmdclass={"build_ext": NinjaBuildExt},
)
