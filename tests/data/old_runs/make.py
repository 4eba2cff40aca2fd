"""How the runs beside this file were made; start it in a checkout of the version to keep.

``python make.py OUT`` trains a flow and an MLP model in ``OUT`` and stops them in the middle. It
keeps what a continuation needs in ``OUT/KIND``, continues a copy to its end, and writes that end
into ``OUT/KIND.npz`` and ``OUT/KIND.json``. A ``KIND`` that is there already is only continued.
``python make.py`` prints :func:`rounding`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mujoco
import numpy as np
import torch

OVERRIDES = [
    "env=cartpole",
    "env.max_episode_steps=12",
    "env.threads=1",
    "num_envs=2",
    "epochs=6",
    "device=cpu",
    "threads=1",
    "seed=7",
    "eval.every=2",
    "eval.episodes=2",
    "eval.final_episodes=2",
    "esnr.every=2",
    "esnr.samples=2",
    "checkpoint.every=2",
    "alg.horizon=3",
    "alg.steps_per_epoch=4",
    "alg.random_epochs=2",
    "alg.random_hold=3",
    "alg.replay_capacity=64",
    "alg.world_model.latent_dim=8",
    "alg.world_model.units=[8]",
    "alg.world_model.encoder_units=[8]",
    "alg.world_model.reward_units=[8]",
    "alg.world_model.num_bins=11",
    "alg.model_learning.updates=2",
    "alg.model_learning.bootstrap_updates=5",
    "alg.model_learning.batch_size=8",
    "alg.actor.units=[8]",
    "alg.actor.batch_size=8",
    "alg.critic.units=[8]",
    "alg.critic.passes=1",
]
# Libraries round alike on x86 processors with AVX2, as far as they can be told to.
SAME_ROUNDING = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "avx2",
    "PWM_FAST_ISA": "avx2",
    "PWM_FAST_BACKEND": "native",
    "OMP_NUM_THREADS": "1",
}
COMPARED = ("agent", "rng", "obs", "env")  # parts of a checkpoint
KINDS = {"flow": "pwm_tiny_flow", "mlp": "pwm_tiny"}

PENDULUM = """<mujoco><worldbody><body>
<joint type="slide" axis="1 0 0" damping="0.1"/><geom size="0.1"/>
<body><joint type="hinge" axis="0 1 0"/>
<geom type="capsule" fromto="0 0 0 0 0 1" size="0.05"/></body>
</body></worldbody></mujoco>"""

STOP = """
import os, signal, sys
from pwm_fast import train, trainer
from pwm_fast.agent import PWM
trainer.plot_run = lambda *_: []
update, calls = PWM.update_policy, 0
def stopping(self, *args, **kwargs):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGTERM)
    return update(self, *args, **kwargs)
PWM.update_policy = stopping
train.main()
"""


def train(folder: Path, arguments: list[str], at: int) -> None:
    """A run in ``folder`` that stops itself in the given call of an update; 0 is never."""
    subprocess.run(
        [sys.executable, "-c", STOP.format(at=at), *arguments],
        cwd=folder,
        env={**os.environ, **SAME_ROUNDING, "PYTHONPATH": os.getcwd()},
        check=at == 0,
    )


def rounding() -> str:
    """A hash of what torch and MuJoCo alone compute: where it is the same, they round alike."""
    g = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    for rows, n, k in ((8, 8, 5), (8, 11, 8), (24, 8, 10), (32, 64, 17)):
        x, w = torch.randn(rows, k, generator=g), torch.randn(n, k, generator=g)
        x.requires_grad_(), w.requires_grad_()
        h = torch.nn.functional.layer_norm(torch.nn.functional.linear(x, w), (n,))
        y = torch.nn.functional.mish(h).softmax(-1) + h.tanh() * h.exp() + h.square().log1p()
        y.square().mean().backward()
        assert x.grad is not None and w.grad is not None
        for part in (y.detach(), x.grad, w.grad, y.detach().sum(0), y.detach().norm()):
            digest.update(part.numpy().tobytes())
    model = mujoco.MjModel.from_xml_string(PENDULUM)
    data = mujoco.MjData(model)
    data.qvel[:] = 1.0, -2.0
    mujoco.mj_step(model, data, 200)
    digest.update(data.qpos.tobytes())
    return digest.hexdigest()


def tensors(value: object, name: str = "") -> dict[str, np.ndarray]:
    """All tensors in nested containers, by dotted names."""
    if isinstance(value, torch.Tensor):
        return {name: value.numpy()}
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
    found: dict[str, np.ndarray] = {}
    for key, part in items:
        found |= tensors(part, f"{name}.{key}" if name else str(key))
    return found


def make(kind: str, out: Path) -> None:
    """Train, stop, keep, continue, and write down the end."""
    arguments = [*OVERRIDES, f"alg={KINDS[kind]}", f"run_dir={kind}"]
    work = out / "work"
    work.mkdir(parents=True)
    kept = out / kind
    if not kept.exists():
        train(work, arguments, at=6)
        (kept / "checkpoints").mkdir(parents=True)
        for name in ("metrics.jsonl", "checkpoints/latest.pt"):
            shutil.copy(work / kind / name, kept / name)
        shutil.rmtree(work / kind)
    shutil.copytree(kept, work / kind)
    train(work, arguments, at=0)
    final = torch.load(work / kind / "checkpoints/final.pt", weights_only=True)
    np.savez_compressed(out / f"{kind}.npz", **tensors({k: final[k] for k in COMPARED}))
    rows = [json.loads(x) for x in (work / kind / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((work / kind / "provenance.json").read_text())["history"][0]
    end = {
        "overrides": arguments,
        "commit": record["git"]["commit"],
        "versions": {k: record["versions"][k] for k in ("torch", "numpy", "mujoco")},
        "cpu": record["machine"]["cpu"],
        "cpu_capability": record["machine"]["cpu_capability"],
        "native_extension": record["versions"]["native_extension"],
        "rounding": subprocess.run(
            [sys.executable, __file__],
            env={**os.environ, **SAME_ROUNDING},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip(),
        "rows": rows,
        "best": final["best"],
    }
    (out / f"{kind}.json").write_text(json.dumps(end, indent=1) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(rounding())
    else:
        for each in KINDS:
            make(each, Path(sys.argv[1]).resolve())
