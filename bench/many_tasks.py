"""What a world model of several tasks is worth: pretrained on data, with a policy for each task.

python -m bench.many_tasks data RUN [RUN ...] --out DIR    # data: what those runs have seen
python -m bench.many_tasks run --data DIR --out DIR         # models and policies, by the commands
python -m bench.many_tasks collect --data DIR --out DIR     # what they came to
python -m bench.many_tasks docs                             # the table in docs/pretraining.md

``data`` takes run directories of ``env=dmc``, each of another task, and writes the whole episodes
of their replays in TD-MPC2's format: all tasks in ``DIR/together``, and each in ``DIR/TASK``. So
were TD-MPC2's own data made: of all that agents saw while they learned.

``run`` pretrains the baseline and the flow on all tasks together, and on each apart with a third of
the updates (so that each task has as many), then learns a policy for each task in the frozen model
and in one that learns on, and, without any of them, one from nothing in as many steps. It can be
repeated: what is finished is left alone, what was stopped goes on.

Exit status: 0 done, 2 one line says what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench import environment, pages, results
from pwm_fast.config import ConfigError
from pwm_fast.data import describe, register
from pwm_fast.data.task_names import write_names
from pwm_fast.envs.many_tasks import domain_and_task
from pwm_fast.replay import Episode
from pwm_fast.run import build
from pwm_fast.run.checkpoint import CheckpointError

OUT = results.STORE / "many_tasks.json"
ALGS = {"flow": "pwm_small_flow", "mlp": "pwm_small"}
EPOCHS = 900  # of the pretraining of all tasks together
PRETRAIN = ("data.holdout=0.1", "eval.every=100", "threads=1")
POLICY = (
    "alg.actor.entropy_coef=0.02",  # as in docs/results.md
    "epochs=100",
    "eval.every=20",
    "eval.episodes=8",
    "eval.final_episodes=16",
    "esnr.every=0",
    "threads=1",
)
KEEPING = ("alg.random_epochs=1", "alg.keep_random=0.0")  # the data have random actions
FROZEN = (*KEEPING, "alg.model_learning.updates=0")
TOGETHER, APART, NOTHING = "together", "apart", "nothing"
# How a policy learns: in which models, and what its command says besides.
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "frozen": ((TOGETHER, APART), FROZEN),
    "new": ((NOTHING,), ("alg.random_epochs=20",)),
    "joint": ((TOGETHER,), (*FROZEN, "alg.actor.batch_size=384")),  # 128 a task
    "tuned": ((TOGETHER, APART), KEEPING),
}
JOINT = "joint"  # one policy for all tasks


def record(runs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the data; the returns of each task's episodes.

    Raises:
        ConfigError: a run is not of ``env=dmc``, or of a task that another is of, or has no whole
            episode; or what is to be written is there.
        CheckpointError: a run has no checkpoint that can be read.
    """
    if out.exists():
        raise ConfigError(f"--out={out} is there already")
    episodes: dict[str, list[Episode]] = {}
    for run in runs:
        task, found = _seen(run)
        if task in episodes:
            raise ConfigError(f"{run} is of {task}, as a run before it is: give one of each task")
        episodes[task] = found
    chunks, returns = [], {}
    for number, (task, found) in enumerate(episodes.items()):
        chunk = _chunk(found)
        _write(out / task, chunk, {0: task})
        chunks.append({**chunk, "task": torch.full_like(chunk["task"], number)})
        own = sorted(float(e.reward.sum()) for e in found)
        returns[task] = {
            "episodes": len(own),
            "steps": len(found[0].action),
            "mean": statistics.fmean(own),
            "best": own[-1],
        }
    for key in ("obs", "action"):
        widest = max(chunk[key].shape[-1] for chunk in chunks)
        for chunk in chunks:
            chunk[key] = functional.pad(chunk[key], (0, widest - chunk[key].shape[-1]))
    together = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
    together["action"][:, 0] = torch.nan
    _write(out / TOGETHER, together, dict(enumerate(episodes)))
    (out / "returns.json").write_text(json.dumps(returns, indent=1) + "\n", "utf-8")
    return returns


def _seen(run: Path) -> tuple[str, list[Episode]]:
    """A run's task, and the whole episodes in its replay."""
    path = run / "checkpoints" / "latest.pt"
    config, content = build.load_run(path)
    options, device = config.env.options, torch.device("cpu")
    if config.env.name != "dmc":
        raise ConfigError(f"{run} must be a run of env=dmc, got env={config.env.name}")
    if content.get("replay") is None:
        raise ConfigError(f"{path} holds no replay, which a finished run's latest.pt does")
    with closing(build.make_env(config, config.env_count, 0, device)) as env:
        replay = build.make_replay(config, env, device)
        steps = env.max_episode_steps
    replay.load_state_dict(content["replay"])
    found = [e for e in replay.episodes() if len(e.action) == steps]
    if not found:
        raise ConfigError(f"{path} holds no whole episode of {steps} steps")
    return f"{options['domain']}-{options['task'].replace('_', '-')}", found


def _chunk(episodes: Sequence[Episode]) -> dict[str, Tensor]:
    """Episodes of one length as TD-MPC2 has them: a row's action and reward led to it."""
    obs, action, reward = (torch.stack([e[i] for e in episodes]) for i in range(3))
    return {
        "obs": obs,
        "action": functional.pad(action, (0, 0, 1, 0), value=torch.nan),
        "reward": functional.pad(reward, (1, 0), value=torch.nan),
        "task": torch.zeros(obs.shape[:2], dtype=torch.int32),
    }


def _write(folder: Path, chunk: Mapping[str, Any], names: Mapping[int, str]) -> None:
    folder.mkdir(parents=True)
    torch.save(dict(chunk), folder / "chunk_0.pt")
    write_names(folder, names)
    register(folder)


def commands(data: Path, out: Path, kind: str) -> list[list[str]]:
    """The commands of one kind of dynamics, in their order, without the interpreter."""
    tasks = list(describe(data / TOGETHER).names)
    found = []
    for name in (TOGETHER, *tasks):
        several = name == TOGETHER
        own = [f"data.path={data / name}", f"alg={ALGS[kind]}"]
        own += [f"epochs={EPOCHS if several else EPOCHS // len(tasks)}"]
        own += ["alg.world_model.task_dim=16"] if several else []
        where = f"run_dir={_model(out, kind, name)}"
        found.append(["pwm_fast.pretrain", *own, where, *PRETRAIN])
    for way, which, task in _policies(tasks):
        env = _env(task, tasks)
        if which == NOTHING:
            begins = [f"alg={ALGS[kind]}", *env]
        else:
            name = task if which == APART else TOGETHER
            model = _model(out, kind, name) / "checkpoints" / "final.pt"
            begins = [f"init={model}", f"data.path={data / name}"]
            alone = which == TOGETHER and task != JOINT
            begins += [f"task={task}", "env.num_envs=8"] if alone else env
        where = f"run_dir={_policy(out, kind, way, which, task)}"
        found.append(["pwm_fast.train", *begins, where, *POLICY, *WAYS[way][1]])
    return found


def _env(task: str, tasks: Sequence[str]) -> list[str]:
    """What makes the environment of a task, or the one of all; 8 or 12 envs."""
    if task == JOINT:
        return ["env=dmc_tasks", f"env.tasks=[{','.join(tasks)}]"]
    domain, name = domain_and_task(task)
    return ["env=dmc", f"env.domain={domain}", f"env.task={name}"]


def _policies(tasks: Sequence[str]) -> list[tuple[str, str, str]]:
    """All policies: how each learns, in which model, and its task."""
    return [
        (way, which, task)
        for way, (models, _) in WAYS.items()
        for task in ([JOINT] if way == JOINT else tasks)
        for which in models
    ]


def _model(out: Path, kind: str, name: str) -> Path:
    return out / kind / "models" / name


def _policy(out: Path, kind: str, way: str, which: str, task: str) -> Path:
    return out / kind / f"{way}_{which}" / task


def run(data: Path, out: Path, kinds: Sequence[str]) -> int:
    """Run all commands; the first exit status that is not 0."""
    for kind in kinds:
        for command in commands(data, out, kind):
            status = subprocess.run([sys.executable, "-m", *command], check=False).returncode
            if status:
                return status
    return 0


def collect(data: Path, out: Path) -> dict[str, Any]:
    """What the models that are finished know of held-out data, and the policies' returns.

    Raises:
        ConfigError: no policy is finished.
    """
    returns = json.loads((data / "returns.json").read_text("utf-8"))
    models, policies = [], []
    for kind in ALGS:
        for name in (TOGETHER, *returns):
            found = _finished(_model(out, kind, name))
            if found is not None:
                measured = {k: found[k] for k in ("updates", "holdout")}
                seconds = round(found["wall_time"])
                models.append({"kind": kind, "data": name, "seconds": seconds, **measured})
        for way, which, task in _policies(list(returns)):
            found = _finished(_policy(out, kind, way, which, task))
            if found is None:
                continue
            seen, best = found["evaluation"], found["best"]["reward"]
            own = seen["tasks"] if task == JOINT else {task: seen}
            policies += [
                {
                    "kind": kind,
                    "way": way,
                    "data": which,
                    "task": name,
                    "return": evaluation["reward_mean"],
                    "return_std": evaluation["reward_std"],
                    "best": None if task == JOINT else best,  # which is of the tasks' mean
                    "env_steps": found["env_steps"],
                    "seconds": round(found["wall_time"]),
                }
                for name, evaluation in own.items()
            ]
    if not policies:
        raise ConfigError(f"{out} holds no finished policy")
    about = environment.describe(torch.device("cpu"))
    return {**about, "data": returns, "models": models, "policies": policies}


def _finished(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "summary.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found if found.get("status") == "finished" else None


def table(result: Mapping[str, Any]) -> str:
    """Markdown: what the models know, and the policies' returns."""
    data = result["data"]
    models = [
        [
            m["kind"],
            m["data"] if m["data"] == TOGETHER else f"`{m['data']}`",
            f"{m['updates']:,}",
            f"{m['seconds']:,}",
            f"{m['holdout']['holdout_latent_error']:.2f}",
            f"{m['holdout']['holdout_reward_r2']:.3f}",
        ]
        for m in result["models"]
    ]
    columns = [(way, which) for way, (several, _) in WAYS.items() for which in several]
    rows = []
    for task, seen in data.items():
        for kind in ALGS:
            cells = [f"`{task}`", f"{seen['mean']:.0f}", f"{seen['best']:.0f}", kind]
            for column in columns:
                wanted = (kind, *column, task)
                own = [
                    f"{p['return']:.0f}" + ("" if p["best"] is None else f" ({p['best']:.0f})")
                    for p in result["policies"]
                    if (p["kind"], p["way"], p["data"], p["task"]) == wanted
                ]
                cells.append(own[0] if own else "")
            rows.append(cells)
    seconds = sorted({p["seconds"] for p in result["policies"]})
    return "\n".join(
        [
            pages.markdown(
                ["model", "data", "updates", "seconds", "error of a step", "reward R2, step 16"],
                models,
            ),
            "",
            pages.markdown(
                ["task", "mean of the data", "best", "model", *(_heading(*c) for c in columns)],
                rows,
            ),
            "",
            f"Mean returns of 16 episodes (of the joint policy: {16 // len(data)} or one more of a "
            "task) and, in brackets, of the best evaluation on the way (8 episodes every 20 "
            f"epochs); one seed. A policy took {seconds[0]} to {seconds[-1]:,} seconds.",
            f"One thread of {result['machine']['cpu']}, torch {result['software']['torch']}, "
            f"{environment.made(result)}.",
        ]
    )


def _heading(way: str, which: str) -> str:
    return {"new": "no model before", "joint": "one policy, frozen"}.get(way, f"{way}, {which}")


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
        if args.command == "data" and not args.runs:
            raise ConfigError("data needs run directories")
        needed = {"--out": args.out, **({} if args.command == "data" else {"--data": args.data})}
        for option, value in needed.items():
            if value is None:
                raise ConfigError(f"{args.command} needs {option}=DIR")
        if args.command == "data":
            print(json.dumps(record(args.runs, args.out), indent=1))
        elif args.command == "run":
            return run(args.data, args.out, args.kinds)
        else:
            print(table(results.write(OUT, collect(args.data, args.out))))
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
