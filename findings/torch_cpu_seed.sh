#!/usr/bin/env bash
# torch's CPU generator looks at the low 32 bits of a seed alone, although manual_seed takes 64.
#
# Expected: seeds that manual_seed accepts as different give different numbers. torch.manual_seed and
# Generator.manual_seed take anything in [-2^63, 2^64), and initial_seed() gives all of it back.
# Seen with torch 2.13.0 on a CPU: 0 and 2^32, 7 and 7 + 2^32 * 123, -1 and 2^32 - 1 give the same
# numbers, in every distribution. The engine is a Mersenne twister that is seeded with 32 bits. CUDA's
# generator (Philox) has a 64-bit key. So seeds that a hash or a SeedSequence gives with 64 bits
# collide on the CPU as if they had 32: among 100,000
# of them one pair is to be expected.
#
# What it means for pwm_fast: a seed is hashed before a generator of torch's takes it
# (pwm_fast/seeding.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__.split("+")[0])
same = []
for a, b in ((0, 2**32), (7, 7 + 2**32 * 123), (-1, 2**32 - 1), (0, 1)):
    first, second = torch.Generator().manual_seed(a), torch.Generator().manual_seed(b)
    told_apart = first.initial_seed() != second.initial_seed()
    equal = all(
        torch.equal(draw(first), draw(second))
        for draw in (
            lambda g: torch.rand(1000, generator=g),
            lambda g: torch.randn(1000, generator=g),
            lambda g: torch.randperm(1000, generator=g),
        )
    )
    print(f"seeds {a} and {b}: initial_seed differs {told_apart}, numbers equal {equal}")
    same.append((told_apart, equal))
assert same == [(True, True)] * 3 + [(True, False)], "the behaviour has changed"
PYTHON
echo "as described"
