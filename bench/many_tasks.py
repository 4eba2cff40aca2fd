"""What a world model of several tasks is worth: pretrained on data, with a policy for each task.

python -m bench.many_tasks data RUN [RUN ...] --out DIR    # data of trained agents' policies
python -m bench.many_tasks run --data DIR --out DIR         # models and policies, by the commands
python -m bench.many_tasks collect --data DIR --out DIR     # what they came to
python -m bench.many_tasks docs                             # the table in docs/pretraining.md

``data`` takes run directories of ``env=dmc`` and writes their policies' episodes in TD-MPC2's
format: all tasks in ``DIR/together``, and each in ``DIR/TASK``. Two of five episodes have random
actions.

``run`` pretrains the baseline and the flow on all tasks together, and on each apart with a third of
the updates (so that each task has as many), then learns a policy for each task in the frozen model.
It can be repeated: what is finished is left alone, what was stopped goes on.

Exit status: 0 done, 2 one line says what is missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from bench import environment, pages, results
from pwm_fast import seeding
from pwm_fast.config import ConfigError
from pwm_fast.data import describe, register
from pwm_fast.data.task_names import write_names
from pwm_fast.replay import Episode
from pwm_fast.run import build
from pwm_fast.run.acting import policy_of
from pwm_fast.run.collection import MixedPolicy, first_episodes
from pwm_fast.seeding import Purpose

OUT = results.STORE / "many_tasks.json"
ALGS = {"flow": "pwm_small_flow", "mlp": "pwm_small"}
EPISODES, RANDOM_SHARE = 40, 0.4  # of each task
EPOCHS = 150  # of the pretraining of all tasks together
POLICY_EPOCHS = 100
PRETRAIN = ("data.holdout=0.1", "eval.every=25", "threads=1")
POLICY = (
    "alg.model_learning.updates=0",
    "alg.random_epochs=1",
    "alg.keep_random=0.0",
    "env.num_envs=4",
    f"epochs={POLICY_EPOCHS}",
    "eval.every=20",
    "eval.episodes=4",
    "eval.final_episodes=8",
    "threads=1",
)


def record(runs: Sequence[Path], out: Path) -> dict[str, float]:
    """Write the data; the mean return of each task's episodes by its policy."""
    episodes: dict[str, list[Episode]] = {}
    returns = {}
    for number, run in enumerate(runs):
        path = run / "checkpoints" / "final.pt"
        config, content = build.load_run(path)
        options = config.env.options
        task = f"{options['domain']}-{options['task'].replace('_', '-')}"
        seed, device = seeding.stream(number, Purpose.EXPORT), torch.device("cpu")
        build.seed_everything(number, Purpose.EXPORT_AGENT)
        with closing(build.make_env(config, EPISODES, seed, device)) as env, policy_of(path):
            agent = build.restore_agent(path, config, content, env, device)
            act = MixedPolicy(
                agent,
                EPISODES,
                build.dims(env)[1],
                policy="stochastic",
                random_share=RANDOM_SHARE,
                random_hold=config.alg.random_hold,
            )
            episodes[task] = first_episodes(env, act, seed)
        own = [e for e, random in zip(episodes[task], act.random, strict=True) if not random]
        returns[task] = sum(float(e.reward.sum()) for e in own) / len(own)
    widest = [max(e[0][i].shape[1] for e in episodes.values()) for i in (0, 1)]
    chunks = []
    for number, (task, found) in enumerate(episodes.items()):
        _write(out / task, _chunk(found, 0, *(found[0][i].shape[1] for i in (0, 1))), {0: task})
        chunks.append(_chunk(found, number, *widest))
    together = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
    _write(out / "together", together, dict(enumerate(episodes)))
    (out / "returns.json").write_text(json.dumps(returns) + "\n", "utf-8")
    return returns


def _chunk(episodes: Sequence[Episode], task: int, obs: int, action: int) -> dict[str, Any]:
    """Episodes of one length as TD-MPC2 has them: a row's action and reward led to it."""
    count, steps = len(episodes), len(episodes[0].action)
    chunk = {
        "obs": torch.zeros(count, steps + 1, obs),
        "action": torch.zeros(count, steps + 1, action),
        "reward": torch.zeros(count, steps + 1),
        "task": torch.full((count, steps + 1), task, dtype=torch.int32),
    }
    for i, episode in enumerate(episodes):
        chunk["obs"][i, :, : episode.obs.shape[1]] = episode.obs
        chunk["action"][i, 1:, : episode.action.shape[1]] = episode.action
        chunk["reward"][i, 1:] = episode.reward
    chunk["action"][:, 0] = chunk["reward"][:, 0] = torch.nan
    return chunk


def _write(folder: Path, chunk: Mapping[str, Any], names: Mapping[int, str]) -> None:
    folder.mkdir(parents=True)
    torch.save(dict(chunk), folder / "chunk_0.pt")
    write_names(folder, names)
    register(folder)


def commands(data: Path, out: Path, kind: str) -> list[list[str]]:
    """The commands of one kind of dynamics, in their order, without the interpreter."""
    tasks = list(describe(data / "together").names)
    alg = f"alg={ALGS[kind]}"
    found = []
    for name in ("together", *tasks):
        model = out / kind / name / "model"
        epochs = EPOCHS if name == "together" else EPOCHS // len(tasks)
        own = [f"data.path={data / name}", alg, f"epochs={epochs}", f"run_dir={model}"]
        if name == "together":
            own.append("alg.world_model.task_dim=16")
        found.append(["pwm_fast.pretrain", *own, *PRETRAIN])
        for task in tasks if name == "together" else [name]:
            domain, _, what = task.partition("-")
            env = [f"task={task}"]
            if name != "together":
                env = ["env=dmc", f"env.domain={domain}", f"env.task={what.replace('-', '_')}"]
            init = f"init={model / 'checkpoints' / 'final.pt'}"
            where = [f"data.path={data / name}", f"run_dir={out / kind / name / task}"]
            found.append(["pwm_fast.train", init, *env, *where, *POLICY])
    return found


def run(data: Path, out: Path, kinds: Sequence[str]) -> int:
    """Run all commands; the first exit status that is not 0."""
    for kind in kinds:
        for command in commands(data, out, kind):
            status = subprocess.run([sys.executable, "-m", *command], check=False).returncode
            if status:
                return status
    return 0


def collect(data: Path, out: Path) -> dict[str, Any]:
    """The returns of all policies that are finished, and how well the models know their data.

    Raises:
        ConfigError: there are none.
    """
    tasks = list(describe(data / "together").names)
    rows = []
    for kind in ALGS:
        for name in ("together", *tasks):
            model = out / kind / name / "model" / "summary.json"
            for task in tasks if name == "together" else [name]:
                summary = out / kind / name / task / "summary.json"
                if not (model.is_file() and summary.is_file()):
                    continue
                known, found = (json.loads(p.read_text("utf-8")) for p in (model, summary))
                if "finished" not in (known["status"], found["status"]):
                    continue
                rows.append(
                    {
                        "kind": kind,
                        "data": "together" if name == "together" else "apart",
                        "task": task,
                        "return": found["evaluation"]["reward_mean"],
                        "return_std": found["evaluation"]["reward_std"],
                        "env_steps": found["env_steps"],
                        "seconds": round(found["wall_time"]),
                        "model_updates": known["updates"],
                        "model_seconds": round(known["wall_time"]),
                        "holdout": known["holdout"],
                    }
                )
    if not rows:
        raise ConfigError(f"{out} holds no finished policy")
    returns = json.loads((data / "returns.json").read_text("utf-8"))
    return {
        **environment.describe(torch.device("cpu")),
        "episodes": EPISODES,
        "random_share": RANDOM_SHARE,
        "returns_of_the_data": returns,
        "rows": rows,
    }


def table(result: Mapping[str, Any]) -> str:
    """Markdown: the returns, and what they were made with."""
    rows, returns = result["rows"], result["returns_of_the_data"]
    columns = [(kind, data) for kind in ALGS for data in ("together", "apart")]
    heads = ["task", "policy of the data", *(f"{kind}, {data}" for kind, data in columns)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for task, reward in returns.items():
        cells = [f"`{task}`", f"{reward:.0f}"]
        for kind, data in columns:
            own = [r for r in rows if (r["kind"], r["data"], r["task"]) == (kind, data, task)]
            cells.append(f"{own[0]['return']:.0f}" if own else "")
        lines.append(f"| {' | '.join(cells)} |")
    cells = ["R2 of the reward after 16 steps, held out", ""]
    for kind, data in columns:
        known = {
            r["task"]: r["holdout"].get("holdout_reward_r2")
            for r in rows
            if (r["kind"], r["data"]) == (kind, data)
        }
        shown = list(dict.fromkeys(f"{v:.2f}" for v in known.values() if v is not None))
        cells.append(", ".join(shown))
    lines.append(f"| {' | '.join(cells)} |")
    steps = max(r["env_steps"] for r in rows)
    commit = result["commit"]
    dirty = " with uncommitted changes" if commit["dirty"] else ""
    lines += [
        "",
        f"Returns of 8 episodes, one seed. {result['episodes']} episodes of each task, "
        f"{result['random_share']:.0%} of them with random actions. A policy took {steps:,} steps "
        "of its task, in the frozen model.",
        f"One thread of {result['machine']['cpu']}, torch {result['software']['torch']}, "
        f"{result['date'][:10]}, commit {commit['id'] or 'unknown'}{dirty}.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.many_tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("data", "run", "collect", "docs"))
    parser.add_argument("runs", nargs="*", type=Path, help="of data: run directories")
    parser.add_argument("--data", type=Path, help="of run and collect: what data wrote")
    parser.add_argument("--out", type=Path, help="where it goes")
    parser.add_argument("--kinds", nargs="+", choices=tuple(ALGS), default=list(ALGS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if args.command == "docs":
            stored = json.loads(OUT.read_text("utf-8"))
            pages.publish(table(stored), pages.PRETRAINING, "many_tasks")
            return 0
        needed = {"--out": args.out, **({} if args.command == "data" else {"--data": args.data})}
        for option, value in needed.items():
            if value is None:
                raise ConfigError(f"{args.command} needs {option}=DIR")
        if args.command == "data":
            print(record(args.runs, args.out))
        elif args.command == "run":
            return run(args.data, args.out, args.kinds)
        else:
            print(table(results.write(OUT, collect(args.data, args.out))))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
