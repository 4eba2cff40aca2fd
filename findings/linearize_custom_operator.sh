#!/usr/bin/env bash
# A custom operator that asks its input for a tangent works under torch.func.jvp, and fails with an internal
# assertion under torch.func.linearize, where its input does not depend on what is linearised.
#
# Expected: torch.func.linearize(f, x)[1](v) is torch.func.jvp(f, (x,), (v,))[1]. An operator without a
# forward-mode derivative that is not to drop one looks for it with forward_ad.unpack_dual, which answers
# None for a tensor that has no tangent.
# Seen with torch 2.13.0: in jvp, and in linearize outside of an operator, it does. Within an operator that
# is registered for CompositeExplicitAutograd, linearize (which traces f with make_fx at a dual level) raises
# RuntimeError: InferenceMode::is_enabled() && self.is_inference() INTERNAL ASSERT FAILED. A constant is what
# a world model's latents are while its rollout is linearised in the action.
#
# What it means for pwm_fast: while make_fx traces at a dual level its operations run on the plain PyTorch
# reference, which needs no such question (pwm_fast/backends/transforms.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$folder/linearize.py" <<'PYTHON'
import warnings

import torch
from torch.autograd import forward_ad

warnings.simplefilter("ignore")
library = torch.library.Library("finding", "FRAGMENT")
library.define("twice(Tensor x) -> Tensor")


def twice(x):
    assert forward_ad.unpack_dual(x).tangent is None, "it would be lost"
    return 2 * x


library.impl("twice", twice, "CompositeExplicitAutograd")
torch.library.register_fake("finding::twice", torch.empty_like, lib=library)

constant = torch.ones(2, 3)
x, v = torch.eye(3), torch.arange(9.0).reshape(3, 3)


def by_hand(u):
    return twice(constant) @ u


def by_operator(u):
    return torch.ops.finding.twice(constant) @ u


def of_jvp(f):
    return torch.func.jvp(f, (x,), (v,))[1]


def of_linearize(f):
    return torch.func.linearize(f, x)[1](v)


print("torch", torch.__version__)
expected = 2 * constant @ v
seen = {}
for way in (of_jvp, of_linearize):
    for f in (by_hand, by_operator):
        try:
            right = torch.equal(way(f), expected)
            seen[way, f] = "right" if right else "wrong"
        except RuntimeError as error:
            seen[way, f] = str(error).partition(" at ")[0]
        print(f"{way.__name__}, {f.__name__}: {seen[way, f]}")
assertion = "InferenceMode::is_enabled() && self.is_inference() INTERNAL ASSERT FAILED"
assert seen.pop((of_linearize, by_operator)) == assertion, "the behaviour has changed"
assert set(seen.values()) == {"right"}, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/linearize.py"
echo "as described"
