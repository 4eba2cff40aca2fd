"""Train the same world model with both velocity heads on cart-pole and draw their losses.

python docs/figures/simnorm_head.py          # train (a minute on one core), then draw
python docs/figures/simnorm_head.py --draw   # draw from the stored simnorm_head.json alone
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from pwm_fast.agent import PWM
from pwm_fast.config import AlgConfig, ModelLearningConfig, WorldModelConfig
from pwm_fast.envs import make
from pwm_fast.replay import Replay, Windows

HERE = Path(__file__).resolve().parent
HORIZON, GAMMA, UPDATES, BATCH, NUM_ENVS, STEPS, SEED = 16, 0.99, 600, 32, 32, 240, 0
FLOOR = sum(GAMMA**t * ((t + 1) / 8) ** 2 for t in range(HORIZON)) / HORIZON
HEADS = ("simnorm", "linear")


def collect(seed: int) -> Replay:
    """One episode of uniform random actions in each env."""
    env = make("cartpole", NUM_ENVS, seed=seed)
    replay = Replay(NUM_ENVS * (STEPS + HORIZON), NUM_ENVS, 5, 1, HORIZON)
    obs, _ = env.reset()
    for _ in range(STEPS):
        action = torch.rand(NUM_ENVS, 1) * 2.0 - 1.0
        following, reward, terminated, truncated, info = env.step(action)
        done = terminated | truncated
        replay.add(obs, action, reward, terminated, done, info["final_obs"])
        obs = following
    env.close()
    return replay


def train(head: str, replay: Replay, unseen: Replay) -> dict[str, Any]:
    """Losses of every update, and what the model then knows; both heads see the same windows."""
    torch.manual_seed(SEED)
    config = AlgConfig(
        world_model=WorldModelConfig(
            latent_dim=64, units=[64, 64], encoder_units=[64], reward_units=[32, 32], head=head
        ),
        model_learning=ModelLearningConfig(lr=1e-3),
        horizon=HORIZON,
        gamma=GAMMA,
    )
    agent = PWM(5, 1, config)
    generator = torch.Generator().manual_seed(SEED)
    losses: list[float] = []
    for _ in range(UPDATES):
        metrics = agent.update_world_model(replay.sample(BATCH, generator))
        losses.append(float(f"{metrics['dynamics_loss'].item():.6g}"))
    return {
        "dynamics_loss": losses,
        "latent_std": metrics["latent_std"].item(),
        "reward_r2": reward_r2(agent, unseen.sample(512, generator)),
    }


@torch.no_grad()
def reward_r2(agent: PWM, windows: Windows) -> float:
    """Share of the rewards' variance that rollouts over unseen windows explain, all 16 steps."""
    model = agent.world_model
    z, rewards = model.encode(windows.obs[0]), []
    for action in windows.action:
        rewards.append(model.decode_reward(model.reward(z, action)))
        z = model.next(z, action)
    error = (torch.stack(rewards) - windows.reward).square().mean()
    return 1.0 - (error / windows.reward.var()).item()


def measure() -> dict[str, Any]:
    """Both runs, and what they ran on."""
    torch.manual_seed(SEED)
    started = time.monotonic()
    replay, unseen = collect(SEED), collect(SEED + 1)
    heads = {head: train(head, replay, unseen) for head in HEADS}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "command": "python docs/figures/simnorm_head.py",
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "seed": SEED,
        "seconds": round(time.monotonic() - started, 1),
        "floor": FLOOR,
        "heads": heads,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Dynamics losses on a logarithmic axis, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.0, 4.0), layout="constrained")
    for head, colour in zip(HEADS, ("tab:red", "tab:blue"), strict=True):
        losses = result["heads"][head]["dynamics_loss"]
        axes.plot(range(1, len(losses) + 1), losses, color=colour, label=f"{head} head")
    floor = result["floor"]
    axes.axhline(floor, color="black", linestyle="--", linewidth=1, label=f"floor {floor:.5f}")
    axes.set(
        yscale="log",
        xlabel="world-model updates",
        ylabel="flow-matching loss",
        title="Two velocity heads, the same cart-pole transitions",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draw", action="store_true", help="draw the stored result again")
    arguments = parser.parse_args()
    stored = HERE / "simnorm_head.json"
    if not arguments.draw:
        torch.set_num_threads(1)
        result = measure()
        stored.write_text(json.dumps(result, indent=None, separators=(",", ":")) + "\n", "utf-8")
    result = json.loads(stored.read_text("utf-8"))
    draw(result, HERE / "simnorm_head.png")
    for head, run in result["heads"].items():
        losses = run["dynamics_loss"]
        last = sum(losses[-20:]) / 20
        print(
            f"{head}: loss {losses[0]:.4f} at the first update, {last:.5f} over the last 20, "
            f"least {min(losses):.5f}; latent std {run['latent_std']:.4f}, "
            f"reward R2 {run['reward_r2']:.3f}"
        )
    print(f"floor {result['floor']:.5f}, {result['seconds']} s")


if __name__ == "__main__":
    main()
