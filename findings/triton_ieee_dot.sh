#!/bin/sh
# A float32 tl.dot of 128 columns in Triton keeps 5 KB a thread in memory; two of 64 keep nothing.
#
# tl.dot with input_precision="ieee" has no tensor core and becomes multiply-adds, unrolled over the
# whole summed width. Compiled for [16, K] x [K, 128] on 4 warps (16 accumulators a thread), sm_90:
# with K = 64 it takes some 80 registers and no local memory. With K = 128 the assembler gives a
# thread 32 registers of the 255 that it may have, and 5 KB of local memory. The same sum of 128 in
# two steps of 64 takes what one of 64 takes, and tf32 is fine in one step: so the cure is a smaller
# BLOCK_K. Nothing warns. No GPU is needed to see it, and none was used. Triton 3.6.0 does the same.
# (triton#5572, open, is about smaller spills of such products.)
#
# Makes a virtual environment in a temporary directory (needs Python 3.10 or newer on Linux, x86-64
# or aarch64, and a package index) and removes it. Exit status 0: it is as described; 1: it is not.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
"${PYTHON:-python3}" -m venv "$directory/venv"
"$directory/venv/bin/python" -m pip install --quiet triton==3.7.1
export TRITON_CACHE_DIR="$directory/cache"
cat > "$directory/check.py" <<'PYTHON'
import os
import re
import subprocess
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

M, N, K, WARPS = 16, 128, 128, 4


@triton.jit
def kernel(x, w, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
           PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, STEP)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, K, STEP):
        a = tl.load(x + m * K + start + k[None, :])
        b = tl.load(w + n * K + start + k[:, None])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(out + m * N + n, total)


def usage(step, precision):
    constants = {"M": M, "N": N, "K": K, "STEP": step, "PRECISION": precision}
    signature = {**dict.fromkeys(("x", "w", "out"), "*fp32"), **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    path = os.path.join(os.path.dirname(sys.argv[0]), "kernel.cubin")
    with open(path, "wb") as file:
        file.write(compiled.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    told = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", told).groups())
    print(f"triton {triton.__version__}, [{M}, {K}] x [{K}, {N}] {precision}, {step} at a time: "
          f"{registers} registers, {stack + local} bytes of local memory a thread")
    return registers, stack + local


whole, halves, tf32 = usage(128, "ieee"), usage(64, "ieee"), usage(128, "tf32")
if not (whole[0] <= 40 and whole[1] >= 4000 and halves[1] == 0 and tf32[1] == 0):
    raise SystemExit("it is not as described")
print("as described: 128 at a time take kilobytes of local memory, 64 at a time none")
PYTHON
"$directory/venv/bin/python" "$directory/check.py"
