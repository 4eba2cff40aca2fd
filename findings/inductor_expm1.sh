#!/bin/sh
# torch.compile on a CPU makes expm1 of small numbers 0, or without a correct digit.
#
# Inductor's C++ backend writes expm1(x) as exp(x) - 1 in vectorised code (CppVecOverrides.expm1) and
# as std::expm1(x) in the scalar rest, so a result depends on where in the tensor its element lies. Eager is
# right in both. Same for both signs, float32 and float64. sinh is right, and with it
# expm1(x) = 2 sinh(x/2) exp(x/2), computed in float64. (pytorch#190533 mends it in a later version.)
#
# Makes a virtual environment in a temporary directory (needs Python 3.10 or newer, a C++ compiler and a
# package index) and removes it. Exit status 0: it is as described; 1: it is not.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
"${PYTHON:-python3}" -m venv "$directory/venv"
"$directory/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cat > "$directory/check.py" <<'PYTHON'
import torch

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
values = (1e-30, 1e-8, 3e-4)
# 64 equal numbers fill whole vectors; 1 is left to scalar code.
failed = []
for dtype in (torch.float32, torch.float64):
    for value in values:
        for sign in (1.0, -1.0):
            x = torch.full((64,), sign * value, dtype=dtype)
            torch._dynamo.reset()
            compiled = torch.compile(torch.expm1, dynamic=False)
            vector = compiled(x)[0].item()
            scalar = compiled(x[:1].clone()).item()
            eager = torch.expm1(x)[0].item()
            series = sign * value + value**2 / 2 + sign * value**3 / 6
            error = abs(vector - series) / value
            print(f"{dtype} expm1({sign * value:.0e}): eager {eager:.9e}, compiled: one number "
                  f"{scalar:.9e}, 64 numbers {vector:.9e} (relative error {error:.1e})")
            right = abs(eager - series) <= 2e-7 * value and abs(scalar - series) <= 2e-7 * value
            # exp(x) - 1: 0 below half the spacing of numbers near 1, then few digits.
            spacing = torch.finfo(dtype).eps
            wrong = vector == 0.0 if value < spacing / 4 else error > 3.0 * spacing
            if not (right and wrong):
                failed.append((dtype, sign * value))
            wide = x.double()
            torch._dynamo.reset()
            way = torch.compile(lambda x: (2.0 * torch.sinh(0.5 * x) * torch.exp(0.5 * x)))
            if abs(way(wide)[0].item() - series) > 2e-7 * value:
                failed.append(("sinh", dtype, sign * value))
if failed:
    raise SystemExit(f"it is not as described: {failed}")
print("as described: vectors are exp(x) - 1, single numbers and eager are right")
PYTHON
"$directory/venv/bin/python" "$directory/check.py"
