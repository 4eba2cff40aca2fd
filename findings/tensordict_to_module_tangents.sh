#!/usr/bin/env bash
# tensordict's to_module drops the tangents of forward-mode derivatives: they are zero, with no error.
#
# Expected: "with params.to_module(net)" calls net with other parameters, as torch.func.functional_call
# does. So derivatives with respect to params are the same, of either mode.
# Seen with tensordict 0.15.3 (torch 2.13.0, CPU): torch.func.jvp, jacfwd and linearize give zeros where
# the parameters come through to_module. Values, jacrev, grad and backward() are right, and so is a jvp of
# grad, where reverse mode tracks the parameters as well. So a Gauss-Newton or Fisher product, or a
# Jacobian by jacfwd, is zero in a program whose gradients are right.
# Since 0.14 to_module wraps a plain tensor in a new torch.nn.Parameter where the module has a parameter
# (preserve_module_state=True, the default; https://github.com/pytorch/tensordict/pull/1720). Its
# documentation excepts tensors that require gradients and those that vmap has batched, "so that gradients
# still reach them". A dual tensor is neither, and a new Parameter has no tangent.
# With 0.14.0 and 0.14.2 the exception was missing: grad and jacrev were zero as well, and an ensemble that
# vmap ran through to_module got no gradient at all. Where other terms of a loss have gradients, nothing
# says so: such critics stay as they were initialised while the rest learns. 0.13.0 is right; 0.14.3
# repaired reverse mode.
# preserve_module_state=False gives the right derivatives with all of them.
#
# What it means for pwm_fast: it needs no tensordict, and its ops take parameters as arguments. Ensembles
# that are called through to_module, accelerated or not (docs/ops.md), learn with tensordict to 0.13 and
# from 0.14.3 on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/derivatives.py" <<'PYTHON'
import tensordict
import torch
from tensordict import TensorDict, from_modules
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize

torch.manual_seed(0)
net = torch.nn.Linear(3, 1).double()
x, target = torch.randn(7, 3).double(), torch.randn(7, 1).double()
weights = {name: value.detach().clone() for name, value in net.named_parameters()}
ones = {name: torch.ones_like(value) for name, value in weights.items()}


def truth(weights):
    return (functional_call(net, weights, (x,)) - target).square().mean()


def through(preserve):
    keyword = {} if preserve is None else {"preserve_module_state": preserve}

    def loss(weights):
        with TensorDict(weights, []).to_module(net, **keyword):
            return (net(x) - target).square().mean()

    return loss


def derivatives(loss):
    return {
        "jvp": jvp(loss, (weights,), (ones,))[1],
        "linearize": linearize(loss, weights)[1](ones),
        "jacfwd": jacfwd(loss)(weights)["weight"],
        "jacrev": jacrev(loss)(weights)["weight"],
        "grad": grad(loss)(weights)["weight"],
        "jvp of grad": jvp(grad(loss), (weights,), (ones,))[1]["weight"],
    }


def ensemble():
    """The gradient of two regressions at once, beside a term that has one anyway."""
    both = from_modules(torch.nn.Linear(3, 1).double(), net, as_module=True)
    other = torch.nn.Parameter(torch.ones(()).double())

    def predict(params):
        with params.to_module(net):
            return net(x)

    ((torch.vmap(predict)(both) - target).square().mean() + other.square()).backward()
    return both["weight"].grad


version = tensordict.__version__
print("tensordict", version, "torch", torch.__version__.split("+")[0])
right, found = derivatives(truth), derivatives(through(None))
kept = derivatives(through(False)) if version >= "0.13" else found
zero, correct = set(), set()
for name, value in right.items():
    print(f"  {name}: {value.norm():.4f}, through to_module {found[name].norm():.4f}")
    assert value.norm() > 0.1 and torch.equal(kept[name], value), "the behaviour has changed"
    (correct if torch.equal(found[name], value) else zero).add(name)
    assert name in correct or not found[name].any(), "the behaviour has changed"
learns = ensemble() is not None
print(f"  an ensemble through vmap learns: {learns}")
forward = {"jvp", "linearize", "jacfwd"}
all_zero = version in ("0.14.0", "0.14.2")
expected = set(right) if all_zero else forward if version >= "0.14.3" else set()
assert zero == expected and learns != all_zero, "the behaviour has changed"
PYTHON
for version in 0.13.0 0.14.0 0.14.2 0.14.3 0.15.3; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
        "tensordict==$version" torch==2.13.0 numpy==2.2.6
    # 0.13 warns of what 0.14 will do, and linearize of its own graph.
    "$folder/venv/bin/python" -W ignore "$folder/derivatives.py"
done
echo "as described"
