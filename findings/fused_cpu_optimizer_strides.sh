#!/usr/bin/env bash
# torch's fused optimisers on the CPU walk through a gradient in the order of its memory.
#
# Expected: what fused=True and fused=False do to a parameter is the same but for rounding, or an
# error. A gradient is a tensor; how it lies in memory says nothing about which entry is which. On
# CUDA fused Adam refuses a gradient whose strides are not its parameter's
# (https://github.com/pytorch/pytorch/issues/106951).
# Seen with torch 2.14.1 and 2.13.0 on a CPU: SGD, Adam, AdamW and Adagrad with fused=True read such
# a gradient as if it were contiguous, and step each entry by another one's gradient. There is no
# error and no warning; losses and gradient norms are those of the right gradient. With fused=False
# all four are right.
# Such gradients are ordinary: for a stack of linear layers, x @ weight.transpose(1, 2) with a
# weight (models, outputs, inputs), torch.autograd.grad and torch.func.grad give strides
# (outputs * inputs, 1, outputs). loss.backward() copies them into the parameter's layout, so code
# that assigns .grad itself meets this: ensembles, functional training loops, gradient surgery. The
# last lines of the output are three linear regressions at once: plain SGD finds their minimum, and
# the fused one diverges.
#
# What it means for pwm_fast: its optimisers lay every gradient out as its parameter before a fused
# step (pwm_fast/agent/optim.py; tests/agent/test_optim.py). Without that, stacked critics learned
# from scrambled gradients, and nothing said so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.2.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__.split("+")[0])


def after_five_steps(optimiser, fused, transposed):
    draws = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(3, 40, dtype=torch.float64))
    steps = optimiser([weight], lr=0.1, fused=fused)
    for _ in range(5):
        gradient = torch.randn(3, 40, generator=draws, dtype=torch.float64)
        weight.grad = gradient.t().contiguous().t() if transposed else gradient
        steps.step()
    return weight.detach()


for name in ("SGD", "Adam", "AdamW", "Adagrad"):
    optimiser = getattr(torch.optim, name)
    truth = after_five_steps(optimiser, fused=False, transposed=False)
    off = {
        (fused, transposed): (after_five_steps(optimiser, fused, transposed) - truth).abs().max()
        for fused in (False, True)
        for transposed in (False, True)
    }
    wrong = off.pop((True, True))
    rest = max(off.values())
    print(f"{name}: fused, transposed gradient off by {wrong:.2g}; the rest by {rest:.0e}")
    assert wrong > 0.1 and rest < 1e-12, "the behaviour has changed"


def ensemble(fused):
    draws = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(3, 5, 4))
    x, target = (torch.randn(3, 7, n, generator=draws) for n in (4, 5))
    descent = torch.optim.SGD([weight], lr=1.0, fused=fused)

    def loss():
        return (x @ weight.transpose(1, 2) - target).square().mean()

    for _ in range(200):
        (weight.grad,) = torch.autograd.grad(loss(), [weight])
        descent.step()
    return loss().item(), weight.stride(), weight.grad.stride()


right, wrong = ensemble(fused=False), ensemble(fused=True)
print("strides of weight and gradient:", *wrong[1:])
print(f"loss after 200 steps: {right[0]:.3f}, fused {wrong[0]:.3f}")
assert wrong[1] != wrong[2], "the gradient has the parameter's strides"
assert not wrong[0] < 1.5 * right[0], "the behaviour has changed"
PYTHON
echo "as described"
