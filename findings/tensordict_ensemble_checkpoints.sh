#!/usr/bin/env bash
# The same ensemble has other parameters and another state_dict() with each of three ranges of tensordict.
#
# Expected: a module's parameters and the names in its state_dict() follow from its code, so a checkpoint
# can be read by the program that wrote it after tensordict is upgraded.
# Seen with tensordict 0.11.0, 0.13.0 and 0.15.3 (torch 2.13.0, CPU), for an ensemble as TD-MPC2 has it:
# the members' parameters stacked by from_modules(..., as_module=True), and a copy of one member that is
# made while meta tensors stand in for its parameters, as the module that vmap calls.
#   - to 0.13 that copy has no parameters. Since 0.14 to_module makes parameters of the meta tensors
#     (preserve_module_state=True). They are in parameters() and state_dict(), .to("cpu") or "cuda" raises
#     "Cannot copy out of meta tensor", and a strict load_state_dict of an older file misses them;
#   - to 0.11 __batch_size and __device are stored beside the tensors. Since 0.12 they are in _metadata;
#     0.12 and newer read older files, and 0.11 reads no newer one, strict or not: a KeyError about
#     __batch_size.
# Each of the two changes is documented for tensordict's own classes
# (https://github.com/pytorch/tensordict/pull/1619 and 1720). Together a checkpoint moves up to 0.13, not
# beyond and not back. to_module(member, preserve_module_state=False) where the copy is made gives the
# older names with new releases too, and a module that .to() can move.
#
# What it means for pwm_fast: it reads TD-MPC2's checkpoints without tensordict, with and without these
# entries (pwm_fast/published/tdmpc2.py; docs/checkpoints.md).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/ensemble.py" <<'PYTHON'
import copy
import sys

import tensordict
import torch
from tensordict import from_modules

torch.manual_seed(0)


class Ensemble(torch.nn.Module):
    """Two linear models side by side; only ``stacked`` has values."""

    def __init__(self):
        super().__init__()
        members = [torch.nn.Linear(3, 1) for _ in range(2)]
        self.stacked = from_modules(*members, as_module=True)
        with self.stacked[0].data.to("meta").to_module(members[0]):
            self.called = copy.deepcopy(members[0])

    def forward(self, x):
        def one(params):
            with params.to_module(self.called):
                return self.called(x)

        return torch.vmap(one)(self.stacked)


def outcome(action):
    try:
        action()
    except (KeyError, NotImplementedError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if "Error(s)" not in line]
        print("   ", type(error).__name__, lines[0].strip()[:90])
        return type(error).__name__
    return "fine"


class Agent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.critics = Ensemble()


version, folder = tensordict.__version__, sys.argv[1]
new = version == "0.15.3"
agent = Agent()
entries = agent.state_dict()
print("tensordict", version, "torch", torch.__version__.split("+")[0])
print("  entries:", *(name.removeprefix("critics.") for name in entries))
assert any(name.endswith("__batch_size") for name in entries) == (version == "0.11.0")
devices = {name: p.device.type for name, p in agent.named_parameters()}
assert ("meta" in devices.values()) == new, "the behaviour has changed"
assert agent.critics(torch.randn(7, 3)).shape == (2, 7, 1)
print("  to the CPU:")
assert outcome(lambda: agent.to("cpu")) == ("NotImplementedError" if new else "fine")
torch.save(entries, f"{folder}/{version}.pt")
read = {
    "0.11.0": {"0.11.0": "fine", "0.13.0": "KeyError", "0.15.3": "KeyError"},
    "0.13.0": {"0.11.0": "fine", "0.13.0": "fine", "0.15.3": "RuntimeError"},
    "0.15.3": {"0.11.0": "RuntimeError", "0.13.0": "RuntimeError", "0.15.3": "fine"},
}[version]
if len(sys.argv) > 2:  # once there is a file of each
    for other, expected in read.items():
        print(f"  a checkpoint of {other}:")
        content = torch.load(f"{folder}/{other}.pt", weights_only=True)
        assert outcome(lambda: agent.load_state_dict(content)) == expected, "changed"
PYTHON
for version in 0.11.0 0.13.0 0.15.3; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --target "$folder/$version" \
        --no-deps "tensordict==$version"
done
# What these releases need, once for all three.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 \
    cloudpickle==3.1.3 importlib_metadata==8.7.0 orjson==3.11.4 packaging==25.0 pyvers==0.2.3
for step in write read; do
    for version in 0.11.0 0.13.0 0.15.3; do
        if [ $step = read ]; then again=read; else again=; fi
        PYTHONPATH="$folder/$version" "$folder/venv/bin/python" -W ignore::FutureWarning \
            "$folder/ensemble.py" "$folder" $again
    done
done
echo "as described"
