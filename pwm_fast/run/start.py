"""Beginning a training run, or going on with it where it was left."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pwm_fast import config as configuration
from pwm_fast import parallel, seeding
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.data import offline
from pwm_fast.data.offline import OfflineData
from pwm_fast.parallel import Followed, Ranks
from pwm_fast.run import build, provenance, video
from pwm_fast.run.evaluation import diverged_line
from pwm_fast.run.interrupt import Interrupt
from pwm_fast.run.logger import RunLogger, Unheard
from pwm_fast.run.rundir import RunDirectory, Source
from pwm_fast.run.supply import NothingToLearn
from pwm_fast.run.trainer import Trainer, TrainingDiverged
from pwm_fast.run.warm_start import warm_start
from pwm_fast.seeding import Purpose


def train(config: TrainConfig, kind: type[Trainer] = Trainer) -> tuple[dict[str, Any], int]:
    """Run one training run to its end, or on from where it was left.

    Args:
        config: of the run.
        kind: what an epoch of it does.

    Returns:
        What ``run_dir/summary.json`` holds, and the process's exit status.

    Raises:
        ConfigError: the configuration cannot be used; nothing in the run directory was changed.
        NothingToLearn: no episode was as long as a window; a checkpoint was written.
        CheckpointError: a checkpoint cannot be read, does not fit, or cannot be written.
        TrainingDiverged: too many updates in a row were not finite.
        OSError: a file cannot be written.
        RankLost: another process of the run is gone.
        Followed: another process of the run raised one of these, and reports it.
    """
    if kind is Trainer and config.data.holdout:
        raise ConfigError(
            f"data.holdout={config.data.holdout} is for python -m pwm_fast.pretrain; here it is 0"
        )
    together = parallel.started_together()
    if config.parallel == "data" and not together:
        raise ConfigError(
            "parallel=data is for several processes: start them with torchrun "
            "--nproc-per-node=N -m pwm_fast.train, or as a sweep (-m)"
        )
    if kind is not Trainer and together:
        raise ConfigError("python -m pwm_fast.pretrain is one process, torchrun started several")
    cuda = config.device != "cpu" and torch.cuda.is_available()
    with parallel.joined(cuda=cuda) as ranks, ExitStack() as stack:
        with ranks.together():
            begun = _begin(config, kind, ranks, stack)
        config, directory, trainer, source = begun[:4]
        if trainer is None:
            assert begun.finished is not None
            if ranks.first:
                print(
                    f"{config.run_dir} holds this run, finished after {config.epochs} epochs: "
                    "nothing to do. More epochs=, another seed= or another run_dir= starts work."
                )
                print_summary(begun.finished)
            return begun.finished, 0
        with ranks.together():
            _refuse_other_weights(trainer, ranks)
        save_start = None if source is None else trainer.saving_start(source)
        kept: list[str] = []

        def prepare() -> None:
            kept.extend(directory.keep(config, source))
            if save_start is not None:
                save_start()

        logger: RunLogger = Unheard()
        with ranks.together():
            if ranks.first:
                last_epoch = None if source is None else trainer.state.epoch
                logger = RunLogger(config, directory, last_epoch, prepare)
                directory.begin(config, begun.record, source)
        save_start = None  # it holds a copy of the replay
        for text in (*begun.said, *kept):
            logger.say(text)
        try:
            summary = trainer.run(logger, begun.stop)
        except (TrainingDiverged, NothingToLearn) as error:  # all ranks raise these
            ranks.highest(0)
            if ranks.first:
                raise
            raise Followed("rank 0 says why") from error
        ranks.highest(0)  # the first one has ended its log: who started us may end it with the rest
        if ranks.first:
            print_summary(summary)
        return summary, begun.stop.exit_status


def _refuse_other_weights(trainer: Trainer, ranks: Ranks) -> None:
    """Averaged gradients are of no use to networks that differ.

    Raises:
        ConfigError: they do.
    """
    if ranks.size == 1:
        return
    digest = hashlib.sha256()
    for values in trainer.state.agent.state_dict().values():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    if len(set(ranks.gather(digest.hexdigest()))) > 1:
        raise ConfigError(
            f"the {ranks.size} processes of this run begin with different networks: give all of "
            "them the same code, packages and files"
        )


class _Begun(NamedTuple):
    """What a rank makes of its part of a run before anything is written.

    Attributes:
        config: of the run.
        directory: of the run.
        trainer: of the run; None where it is finished.
        source: the checkpoint that it goes on from.
        stop: its signals.
        record: for ``provenance.json``.
        said: what it begins with, for people.
        finished: the summary of a run that needs nothing more.
    """

    config: TrainConfig
    directory: RunDirectory
    trainer: Trainer | None
    source: Source | None
    stop: Interrupt
    record: dict[str, Any]
    said: Sequence[str]
    finished: dict[str, Any] | None = None


def _begin(config: TrainConfig, kind: type[Trainer], ranks: Ranks, stack: ExitStack) -> _Begun:
    """Everything that can fail for the user's sake, which fails before a file is written.

    Args:
        config: of the run.
        kind: what an epoch of it does.
        ranks: processes that share it. Nothing here waits for another one.
        stack: takes what is to be closed at the run's end.
    """
    config = RunDirectory(Path(config.run_dir)).as_begun(config)
    device = build.device_of_rank(config.device, ranks)
    own = build.part_of(config, ranks)
    build.set_threads(config.threads, own.alg, device)
    build.seed_everything(config.seed)
    evaluated = config
    if config.eval.video_every and ranks.first:  # which alone films
        video.require_packages()
        evaluated = replace(config, env=video.visible(config.env))
    training, evaluation = (
        seeding.stream(config.seed, purpose, *ranks.numbers)
        for purpose in (Purpose.TRAINING, Purpose.EVALUATION)
    )
    stack.enter_context(build.deterministic(config.deterministic))
    env = stack.enter_context(closing(build.make_env(own, own.env_count, training, device)))
    build.check_evaluations(config, env, ranks)
    build.require_memory(own, env, device)
    if ranks.size > 1:  # an environment may have drawn from the generators, on each rank others
        build.seed_everything(config.seed)
    agent = build.make_agent(config, env, device, ranks)
    if not ranks.first:  # the same weights, but other noise and batches
        build.seed_everything(config.seed, Purpose.RANK, *ranks.numbers)
    replay = build.make_replay(own, env, device)
    directory = RunDirectory(Path(config.run_dir))
    if ranks.first:
        stack.enter_context(directory)
    stop = stack.enter_context(Interrupt(ranks))
    source = directory.source(config)
    finished = directory.finished(config, source)
    if finished is not None:
        return _Begun(config, directory, None, source, stop, {}, (), finished)
    configuration.check_trainable(config, begins=source is None)
    data = offline.load(config, env)
    trainer = kind(
        config,
        directory,
        env,
        agent,
        replay,
        lambda n: build.make_env(evaluated, n, evaluation, device),
        data,
        ranks,
    )
    record = provenance.describe(config, device)
    record["data"] = None if data is None else data.record()
    record["init"] = None
    record["processes"] = ranks.size
    if source is not None:
        trainer.restore(source)
    else:
        if config.init is not None:
            record["init"] = warm_start(agent, config)
        trainer.state.use_data()
    said = [describe(config, agent, device), *_beginning(config, data, source)]
    return _Begun(config, directory, trainer, source, stop, record, said)


def _beginning(
    config: TrainConfig, data: OfflineData | None, source: Source | None
) -> Iterator[str]:
    """What a run begins with, for people."""
    if data is not None:
        yield (
            f"data set {data.path}: {len(data.episodes)} episodes, {data.transitions:,} "
            f"transitions, as registered (manifest sha256 {data.manifest_sha256})"
        )
        if data.left_out:
            yield f"left out: {data.left_out:,} episodes of tasks that the environment has not"
    if source is None:
        if config.init is not None:
            yield f"starting with the networks of {config.init}"
        return
    new = ", with a new replay" if source.content["replay"] is None else ""
    yield f"continuing {source.path} after epoch {source.content['epoch']}{new}"
    if configuration.lacks_variant(source.content["config"]):
        yield (
            "this checkpoint is older than env.variant: it goes on with the physics that it began "
            f"with, env.variant={configuration.OLDEST_VARIANT}"
        )
    if source.content.get("seeding") != seeding.VERSION:
        yield (
            "this checkpoint is of a version that derived seeds in another way: its evaluations "
            "start from other states from here on"
        )


def describe(config: TrainConfig, agent: Any, device: torch.device) -> str:
    """A few lines on what is about to run."""
    counts = agent.world_model.num_parameters()
    shown = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    engine = build.physics(config, device)
    processes = "" if agent.ranks.size == 1 else f" in each of {agent.ranks.size} processes"
    return (
        f"{config.env.name} x {config.env_count}, {config.alg.full_name} on {device} "
        f"({torch.get_num_threads()} CPU threads{processes}), precision {config.precision}, "
        f"seed {config.seed}, {config.epochs} epochs\n"
        + ("" if engine is None else f"{engine.describe(config.env.threads)}\n")
        + f"world-model parameters: {shown}\n"
        f"run directory: {config.run_dir}"
    )


def print_summary(summary: dict[str, Any]) -> None:
    """Print the result for people."""
    print(
        f"{summary['status']}: {summary['epochs']} epochs, {summary['env_steps']:,} environment "
        f"steps, {summary['wall_time']:.0f} s"
        + ("; the same command goes on from here" if summary["status"] == "interrupted" else "")
    )
    result = summary.get("evaluation")
    if result:
        success = result["success"]
        print(
            f"final evaluation over {result['episodes']} episodes: reward "
            f"{result['reward_mean']:.1f} +- {result['reward_std']:.1f}, episode length "
            f"{result['episode_length_mean']:.0f}"
            + ("" if success is None else f", goal held to the end in {success:.0%}")
        )
        if result.get("diverged"):  # summaries of older versions do not say
            print(diverged_line(result))
