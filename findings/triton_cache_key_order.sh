#!/bin/sh
# A Triton kernel has two keys in Triton's cache: which one depends on what the process hashed before.
#
# The key of a kernel holds its text, that of the functions it calls, and the values of the global
# constants that they read. A called function that has its own hash already brings its constants
# along; one that has none yet is hashed on the way, and its constants are left out of the caller's.
# So a process that launches another kernel with the same callee first, or this one after it, looks
# for another key, and a cache that was filled beforehand (in an image, by a job before) misses.
# Nothing tells: the kernel is compiled again. Hashing callees before their callers
# (function.cache_key) gives one key in every order. Triton 3.6.0 does the same
# (triton-lang/triton#10494).
#
# Makes a virtual environment in a temporary directory (needs Python 3.10 or newer on Linux, x86-64
# or aarch64, and a package index) and removes it. Exit status 0: it is as described; 1: it is not.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
"${PYTHON:-python3}" -m venv "$directory/venv"
"$directory/venv/bin/python" -m pip install --quiet triton==3.7.1
export TRITON_CACHE_DIR="$directory/cache"
cat > "$directory/kernels.py" <<'PYTHON'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SCALE = tl.constexpr(3.0)


@triton.jit
def scaled(x):
    return x * SCALE


@triton.jit
def first(p):
    tl.store(p, scaled(tl.load(p)))


@triton.jit
def second(p):
    tl.store(p, scaled(tl.load(p)) + 1.0)


for name in sys.argv[1].split():
    source = ASTSource(globals()[name], {"p": "*fp32"})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(name, compiled.hash)
PYTHON
run() {
  "$directory/venv/bin/python" "$directory/kernels.py" "$1" | sort
}
forward=$(run "first second")
reverse=$(run "second first")
"$directory/venv/bin/python" -c 'import triton; print("triton", triton.__version__)'
printf 'first, then second:\n%s\nsecond, then first:\n%s\n' "$forward" "$reverse"
if [ "$forward" = "$reverse" ] || [ "$(run "first second")" != "$forward" ]; then
  echo "it is not as described"
  exit 1
fi
echo "as described: the same kernels, for the same device, under other keys in another order"
