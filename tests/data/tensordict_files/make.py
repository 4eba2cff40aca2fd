"""How the files beside this one were made, by releases of tensordict: ``python make.py``.

Each is named after the release that wrote it, with torch 2.13.
"""

from __future__ import annotations

from pathlib import Path

import torch

EPISODES, ROWS, OBS, ACTION = 3, 5, 4, 2


def values() -> dict[str, torch.Tensor]:
    """A chunk in TD-MPC2's form: row 0 of action and reward is NaN, episode e is of task 2 - e."""
    obs = torch.arange(EPISODES * ROWS * OBS, dtype=torch.float32).view(EPISODES, ROWS, OBS)
    action = torch.linspace(-1, 1, EPISODES * ROWS * ACTION).view(EPISODES, ROWS, ACTION)
    reward = torch.arange(EPISODES * ROWS, dtype=torch.float32).view(EPISODES, ROWS) / 10
    action[:, 0] = reward[:, 0] = float("nan")
    task = torch.tensor([2, 1, 0], dtype=torch.int32)[:, None].repeat(1, ROWS)
    return {"obs": obs, "action": action, "reward": reward, "task": task}


if __name__ == "__main__":
    import tensordict

    data = tensordict.TensorDict(values(), [EPISODES, ROWS], device="cpu")
    torch.save(data, Path(__file__).with_name(f"{tensordict.__version__}.pt"))
