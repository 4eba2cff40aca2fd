#!/usr/bin/env bash
# MuJoCo's warning counts do not rise when a simulation diverges a second time.
#
# Expected: data.warning[kind].number, "how many times was warning raised" (mjdata.h), rises with each
# step that finds a bad state, so that a program that compares it before and after a step sees every
# divergence. Where the flag autoreset is disabled, it does.
# Seen with mujoco 3.17.0: where mj_step finds a bad position, velocity or acceleration
# (mjWARN_BADQPOS, mjWARN_BADQVEL, mjWARN_BADQACC: not finite, or beyond 1e10) it resets the data, which
# is the default, and then adds one to the count. The reset clears all of data.warning. So
#   - the count is 1 after the first divergence and after each later one;
#   - the counts of other kinds are lost, also that of mjWARN_BADCTRL, which resets nothing;
#   - time is one timestep afterwards. It goes back if it was more than one timestep before. If it was
#     one timestep (the step after an ordinary first step, or after a divergence), it stands still. If
#     it was 0 it goes on to one timestep, as in any first step.
# So in an episode's first step the time tells nothing, and the count rises only if it was 0: after
# mj_resetData, but not where a program sets time and state to those of a start itself.
#
# What it means for pwm_fast: it sets the counts to zero before each step of another library's MuJoCo
# world and looks whether any is above zero afterwards (pwm_fast/envs/_divergence.py); in its own robots
# autoreset is disabled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mujoco==3.17.0 numpy==2.2.6
cd "$folder" # MuJoCo writes its warnings to MUJOCO_LOG.TXT in the working folder
"$folder/venv/bin/python" - <<'PYTHON'
import mujoco

MJCF = """
<mujoco>
  <option timestep="0.01"><flag autoreset="{autoreset}"/></option>
  <worldbody>
    <body>
      <joint name="slide" type="slide" axis="1 0 0"/>
      <geom size="0.1"/>
    </body>
  </worldbody>
  <actuator><motor joint="slide"/></actuator>
</mujoco>
"""
KINDS = ("BADQPOS", "BADQVEL", "BADQACC", "BADCTRL")
messages = []
mujoco.set_mju_user_warning(messages.append)


def new(autoreset="enable"):
    model = mujoco.MjModel.from_xml_string(MJCF.format(autoreset=autoreset))
    return model, mujoco.MjData(model)


def counts(data):
    numbers = data.warning.number.tolist()
    return {kind: numbers[int(getattr(mujoco.mjtWarning, f"mjWARN_{kind}"))] for kind in KINDS}


def diverge(model, data, kind):
    """One step with a number beyond MuJoCo's bound of 1e10: time before and after, count."""
    arrays = {
        "BADQPOS": data.qpos,
        "BADQVEL": data.qvel,
        "BADQACC": data.qfrc_applied,  # a force, of which an acceleration comes
        "BADCTRL": data.ctrl,
    }
    arrays[kind][0] = 1e13
    before = round(data.time, 6)
    mujoco.mj_step(model, data)
    after = round(data.time, 6)
    for array in arrays.values():
        array[0] = 0.0
    return before, after, counts(data)[kind]


def expect(condition):
    assert condition, "the behaviour has changed"


print("mujoco", mujoco.__version__)
for kind in ("BADQPOS", "BADQVEL", "BADQACC"):
    for autoreset, expected in (
        ("enable", [(0.03, 0.01, 1), (0.04, 0.01, 1), (0.04, 0.01, 1)]),
        ("disable", [(0.03, 0.04, 1), (0.07, 0.08, 2), (0.11, 0.12, 3)]),
    ):
        model, data = new(autoreset)
        messages.clear()
        print(f"{kind}, autoreset {autoreset}d, three times after three sound steps:")
        seen = []
        for _ in range(3):
            for _ in range(3):
                mujoco.mj_step(model, data)
            seen.append(diverge(model, data, kind))
            print("  time {} -> {}, count {}".format(*seen[-1]))
        print(f"  messages: {len(messages)}")
        expect(seen == expected and len(messages) == 1)

print("BADQVEL where time cannot go back:")
model, data = new()
line = "  {}: time {} -> {}, count {} -> {}"
first = diverge(model, data, "BADQVEL")
print(line.format("in a first step", *first[:2], 0, first[2]))
again = diverge(model, data, "BADQVEL")
print(line.format("in the next step", *again[:2], first[2], again[2]))
data.time = 0.0
start = diverge(model, data, "BADQVEL")
print(line.format("in the next step, time set to 0", *start[:2], again[2], start[2]))
mujoco.mj_resetData(model, data)
cleared = counts(data)["BADQVEL"]
reset = diverge(model, data, "BADQVEL")
print(line.format("in the first step after mj_resetData", *reset[:2], cleared, reset[2]))
expect(first == (0.0, 0.01, 1) and again == (0.01, 0.01, 1))
expect(start == (0.0, 0.01, 1) and cleared == 0 and reset == (0.0, 0.01, 1))

print("counts of other kinds:")
model, data = new()
for _ in range(3):
    diverge(model, data, "BADCTRL")
before = counts(data)
diverge(model, data, "BADQVEL")
after = counts(data)
print(f"  after three bad controls: {before}")
print(f"  then a BADQVEL: {after}")
expect(before == {"BADQPOS": 0, "BADQVEL": 0, "BADQACC": 0, "BADCTRL": 3})
expect(after == {"BADQPOS": 0, "BADQVEL": 1, "BADQACC": 0, "BADCTRL": 0})
PYTHON
echo "as described"
