#!/usr/bin/env bash
# mujoco-warp: with room for no constraint rows (njmax=0) a model without constraints stands still.
#
# Expected: a model that can have no contact, joint limit, friction loss or equality has no constraint
# rows. So mujoco_warp.put_data or make_data with njmax=0 is room enough, and a step moves the bodies as
# MuJoCo does.
# Seen with mujoco-warp 4.0.0 (warp-lang 1.19.0, mujoco 3.17.0, Warp's CPU device): with njmax=0 every
# step leaves qacc and qvel at 0, whatever force acts, and raises nothing. With njmax=1 the same model
# moves as in MuJoCo. (google-deepmind/mujoco_warp pull request 380, open, is about the same place.)
#
# What it means for pwm_fast: it asks for one constraint row at least (pwm_fast/envs/mujoco_warp.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  mujoco-warp==4.0.0 warp-lang==1.19.0 mujoco==3.17.0 numpy
export WARP_CACHE_PATH="$folder/warp"
"$folder/venv/bin/python" - <<'PYTHON'
import mujoco
import mujoco_warp as mjw
import warp as wp

wp.config.quiet = True
MJCF = """
<mujoco>
  <option timestep="0.01"/>
  <worldbody>
    <body>
      <joint name="slide" type="slide" axis="1 0 0"/>
      <geom size="0.1" mass="1" contype="0" conaffinity="0"/>
    </body>
  </worldbody>
  <actuator><motor joint="slide"/></actuator>
</mujoco>
"""
model = mujoco.MjModel.from_xml_string(MJCF)


def velocity(njmax):
    """The cart's velocity after ten steps under a force of 1 N."""
    data = mujoco.MjData(model)
    data.ctrl[:] = 1.0
    with wp.ScopedDevice("cpu"):
        there, state = mjw.put_model(model), mjw.put_data(model, data, nworld=1, nconmax=1, njmax=njmax)
        for _ in range(10):
            mjw.step(there, state)
        return float(state.qvel.numpy()[0, 0])


truth = mujoco.MjData(model)
truth.ctrl[:] = 1.0
mujoco.mj_step(model, truth, nstep=10)
found = {njmax: velocity(njmax) for njmax in (0, 1)}
print(f"MuJoCo {truth.qvel[0]:.4f}; mujoco-warp with njmax=0 {found[0]:.4f}, with njmax=1 {found[1]:.4f}")
assert abs(truth.qvel[0] - 0.1) < 1e-9
assert found[0] == 0.0 and abs(found[1] - 0.1) < 1e-5
PYTHON
