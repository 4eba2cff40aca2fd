"""The training loop: collect, learn, evaluate, log, save."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from pwm_fast import seeding
from pwm_fast.agent import PWM
from pwm_fast.config import TrainConfig
from pwm_fast.data.offline import OfflineData
from pwm_fast.envs import VectorEnv, tasks_of
from pwm_fast.parallel import ALONE, RankLost, Ranks
from pwm_fast.replay import Replay
from pwm_fast.run import checkpoint, metrics, video
from pwm_fast.run.acting import PolicyNotFinite, acting
from pwm_fast.run.charts import plot_run
from pwm_fast.run.evaluation import Evaluation, evaluate, joined
from pwm_fast.run.interrupt import Interrupt, Interrupted
from pwm_fast.run.logger import RunLogger
from pwm_fast.run.open_loop import Held
from pwm_fast.run.progress import EpochProgress
from pwm_fast.run.rundir import RunDirectory, Source
from pwm_fast.run.state import RunState
from pwm_fast.run.supply import NothingToLearn, outlook, shortage
from pwm_fast.run.wandb import run_name
from pwm_fast.seeding import Purpose

LOOK_EVERY = 10  # updates between looks at how the bootstrap goes


class TrainingDiverged(RuntimeError):
    """Too many updates in a row were not finite, or the policy's actions are not."""


class Trainer:
    """Runs the epochs of one run.

    Args:
        config: of the run.
        directory: where it is written.
        env: envs to collect in.
        agent: learns.
        replay: what it learns from.
        make_eval_env: makes that many envs for an evaluation.
        data: offline data, which :meth:`RunState.use_data` or :meth:`restore` put into the replay.
        ranks: processes that share the run: ``env`` and ``replay`` are this one's part of it.
    """

    KEEPS_REPLAY: ClassVar[bool] = True  # in `latest`

    _logger: RunLogger
    _stop: Interrupt

    def __init__(
        self,
        config: TrainConfig,
        directory: RunDirectory,
        env: VectorEnv,
        agent: PWM,
        replay: Replay,
        make_eval_env: Callable[[int], VectorEnv],
        data: OfflineData | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.directory = directory
        self.ranks = ranks
        self.state = RunState(config, env, agent, replay, data, ranks)
        self.make_eval_env = make_eval_env
        self._warned_of_shortage = False
        self._eval_env: VectorEnv | None = None
        self._films = config.eval.video_every > 0 and ranks.first  # until one cannot be made
        self._filmed: Path | None = None  # and not yet logged
        self._clock = time.monotonic()

    def run(self, logger: RunLogger, stop: Interrupt) -> dict[str, Any]:
        """Train to ``config.epochs``, or until ``stop`` triggers; return what ``summary.json`` has.

        Raises:
            TrainingDiverged: after ``alg.max_skipped_updates`` non-finite updates in a row, or
                where the policy's actions are not finite; a checkpoint was written.
            NothingToLearn: no episode has ``alg.horizon`` steps; a checkpoint was written.
            CheckpointError: a checkpoint could not be written; the last one is untouched.
            OSError: another file could not be written; it names the file.
            RankLost: another process of the run is gone; the last checkpoint is as it was.
            Followed: another one raised any of these but the first two, which all raise.
            Exception: what an environment raises; a checkpoint was written.
        """
        self._logger, self._stop = logger, stop
        self._clock = time.monotonic()
        if logger.takes_gradients:
            for optimizer in self.state.agent.optimizers.values():
                optimizer.keep_gradients = True
        for text in outlook(self.config):
            logger.say(f"warning: {text}")
        ok = False
        try:
            try:
                self._train()
                result = self._final_evaluation()
            except Interrupted:
                stop.agree()  # that all end with its status
                self.save("latest")
                return self._wrap_up("interrupted")
            except PolicyNotFinite as error:
                self._end_as_diverged()
                raise TrainingDiverged(
                    f"{error}, {self._whereabouts(self.state.epoch + 1)}"
                ) from error
            except TrainingDiverged:
                self._end_as_diverged()
                raise
            except NothingToLearn:
                self.save("latest")
                self._wrap_up("nothing to learn")
                raise
            except Exception:
                if self.state.torn is not None:
                    self._save_after_fault()
                raise
            if self.state.epoch > 0 and not self.state.bootstrapped:
                logger.say(
                    f"nothing was learned: alg.random_epochs={self.config.alg.random_epochs} were "
                    f"not over, or no episode had alg.horizon={self.config.alg.horizon} steps"
                )
            summary = self._wrap_up("finished", result)
            ok = True
            return summary
        finally:
            try:
                if self._eval_env is not None:
                    self._eval_env.close()
            finally:
                self._eval_env = None
                logger.close(ok=ok)

    def _train(self) -> None:
        self._begin()
        every = self.config.checkpoint.every
        while self.state.epoch < self.config.epochs:
            self._epoch()
            if every and self.state.epoch % every == 0 and self.state.epoch < self.config.epochs:
                self.save("latest")
        self.save("latest")

    def _begin(self) -> None:
        """Look at the untrained policy, unless an evaluation was made before."""
        if not self.state.latest_eval:
            row: metrics.Row = {"epoch": 0, "env_steps": 0}
            self._log(row, self._evaluate(0))

    # --- one epoch ------------------------------------------------------------------------------

    def _epoch(self) -> None:
        """Run the next epoch, or what is left of it after a resume."""
        started = time.monotonic()
        rates = self.state.agent.set_progress(self.state.epoch / self.config.epochs)
        with self.state.agent.keeping():
            self._collect()
            if self._ready():
                self._learn()
                self.state.bootstrapped = True
        elapsed = max(time.monotonic() - started, 1e-9)
        # Evaluation comes before anything that draws random numbers: it can be interrupted.
        evaluation = self._evaluate(self.state.epoch + 1) if self._evaluation_due() else None

        row: metrics.Row = {"epoch": self.state.epoch + 1}
        self.state.progress = self.state.progress.of_all(self.ranks)
        found = {**self.state.progress.means(), **self.state.agent.normalizer_metrics()}
        row.update(metrics.to_numbers(found))
        # ESNR is each rank's own, of a whole batch of its replay; that of one process is one's.
        row.update(metrics.mean_over(self.ranks, metrics.to_numbers(self._esnr())))
        row.update(self._skips())
        row.update(rates)
        row["replay_size"] = sum(self.ranks.gather(len(self.state.replay)))
        share = {"random_share": self.state.replay.random_share()}
        row.update(metrics.mean_over(self.ranks, share))
        row["steps_per_second"] = self.config.alg.steps_per_epoch * self.config.env_count / elapsed
        self.state.epoch += 1
        row["env_steps"] = self.state.env_steps
        self.state.ended = self.state.ended_so_far()
        diverged = row.get("diverged", 0) > 0
        self.state.progress = EpochProgress()
        self._log(row, evaluation)
        self._guard()
        if diverged:  # not every environment looks at actions
            with self.ranks.together(alike=(TrainingDiverged,)):
                why = self.state.agent.why_not_finite(self.state.obs, self.state.task)
                if why is not None:
                    raise TrainingDiverged(
                        f"{PolicyNotFinite(why)}, {self._whereabouts(self.state.epoch)}"
                    )

    def _collect(self) -> None:
        config = self.config.alg
        for _ in self.state.progress.remaining("steps", config.steps_per_epoch, self._stop.check):
            obs, random = self.state.obs, self.state.epoch < config.random_epochs
            task = self.state.task
            action = self.state.random_action() if random else self.state.agent.act(obs, task=task)
            self.state.obs, reward, terminated, truncated, info = self._step(obs, action)
            done = terminated | truncated
            self.state.replay.add(
                obs,
                action,
                reward,
                terminated,
                done,
                info["final_obs"],
                random=random,
                task=task,
            )
            self.state.progress.add_step("action_saturation", metrics.saturation(action))
            self.state.agent.observe(obs, reward, task)
            self.state.progress.add_episodes(info["episode"], self.state.tasks)
            self.state.progress.add_total("train_terminated", terminated.sum())
            self.state.progress.add_total("train_truncated", (truncated & ~terminated).sum())
            if "diverged" in info:
                self.state.progress.add_total("diverged", info["diverged"].sum())

    def _step(self, obs: Tensor, action: Tensor) -> tuple[Any, ...]:
        found = None
        try:
            with (
                self.ranks.together(alike=(PolicyNotFinite,)),
                acting(self.state.agent, obs, self.state.task),
            ):
                found = self.state.env.step(action.to(self.state.env.device))
        except RankLost:
            raise
        except PolicyNotFinite:
            if found is not None:  # of another rank: this one's envs have made the step
                self.state.torn = True
            raise
        except Exception:
            self.state.torn = True
            raise
        return found

    def _ready(self) -> bool:
        """Random actions were taken as long as configured, and replay holds windows."""
        if self.state.epoch + 1 < self.config.alg.random_epochs:
            return False
        there = self.state.replay.num_windows()
        found = None
        if there == 0:
            ended = self.state.ended_so_far() or {}
            why = getattr(self.state.env, "divergence", None)
            found = shortage(self.config, self.state.replay, self.state.epoch, **ended, why=why)
        ranks = self.ranks.gather((there, found))
        if all(there > 0 for there, _ in ranks):
            return True
        # All wait as long as one of them may still get a window.
        short = [found for there, found in ranks if there == 0]
        found = None if None in short else short[0]
        last = self.state.epoch + 1 == self.config.epochs and not self.state.bootstrapped
        if found is not None and (found.hopeless or last):
            raise NothingToLearn(f"{found.text}; the state is in {self.directory.latest}")
        if found is not None and not self._warned_of_shortage:
            self._warned_of_shortage = True
            self._logger.say(f"warning: after epoch {self.state.epoch + 1} {found.text}")
        return False

    def _learn(self) -> None:
        config = self.config.alg
        check = self._stop.check
        bootstrap = not self.state.bootstrapped
        updates = self.bootstrap_updates() if bootstrap else config.model_learning.updates
        if bootstrap and updates:
            there = sum(self.ranks.gather(self.state.replay.num_windows()))
            batch = config.model_learning.batch_size
            few = "" if there >= batch else f"; these are few, a batch has {batch}"
            self._logger.say(f"bootstrap: {updates} world-model updates on {there:,} windows{few}")
        for i in self.state.progress.remaining("model_updates", updates, check):
            if bootstrap and i % LOOK_EVERY == 0:
                self._guard()
                self._logger.status(f"bootstrap: {i} of {updates} world-model updates")
            self._update_model(i)
        if bootstrap:
            self._logger.status("")
        for _ in self.state.progress.remaining("policy_updates", config.actor.updates, check):
            starts = self.state.replay.sample_starts(self.ranks.part(config.actor.batch_size))
            self.state.progress.add(self.state.agent.update_policy(*starts))

    def _update_model(self, i: int) -> None:
        """The world-model update with number ``i``, counted from 0 in its epoch or bootstrap."""
        learning = self.config.alg.model_learning
        windows = self.state.replay.sample(self.ranks.part(learning.batch_size))
        if i % max(1, learning.updates) == 0:
            self.state.agent.measure_start_spread(windows)
        self.state.progress.add(self.state.agent.update_world_model(windows))

    def bootstrap_updates(self) -> int:
        """World-model updates before the first policy update.

        One episode's length by default, but no more than the whole run's updates: a short trial run
        should not consist of its bootstrap.
        """
        config = self.config.alg.model_learning
        if config.updates == 0:  # the model stays as it is
            return 0
        if config.bootstrap_updates is not None:
            return config.bootstrap_updates
        return min(self.state.env.max_episode_steps, config.updates * self.config.epochs)

    def _esnr(self) -> dict[str, Tensor]:
        config = self.config.esnr
        if not (
            self.state.bootstrapped and config.every and (self.state.epoch + 1) % config.every == 0
        ):
            return {}
        obs, task = self.state.replay.sample_starts(self.config.alg.actor.batch_size)
        return self.state.agent.actor_esnr(obs, config.samples, task=task)

    def _skips(self) -> metrics.Row:
        """Skipped updates; whether the run goes on in a wider precision, which this may decide."""
        skips = metrics.to_numbers(self.state.agent.skipped_updates())
        self._mind_overflow(skips)
        return {**skips, "fell_back": int(self.state.fallen_back is not None)}

    def _mind_overflow(self, skips: metrics.Row) -> bool:
        """Go on in a wider precision if updates were skipped since the last look; True if so."""
        new, self.state.skips_seen = (
            skips["skipped_updates"] - self.state.skips_seen,
            skips["skipped_updates"],
        )
        precision = self.state.agent.fall_back() if new > 0 else None
        if precision is None:
            return False
        self.state.fallen_back = precision
        self._logger.say(
            f"{new} updates had a non-finite loss or gradient in fp16 and were skipped, in epoch "
            f"{self.state.epoch + 1}: from here on GEMMs run in precision={precision}"
        )
        return True

    def _guard(self) -> None:
        """Stop if too many updates in a row were not finite."""
        limit = self.config.alg.max_skipped_updates
        skips = metrics.to_numbers(self.state.agent.skipped_updates())
        in_a_row = skips["skipped_in_a_row"]
        if not self._mind_overflow(skips) and in_a_row >= limit:
            raise TrainingDiverged(
                f"{in_a_row} updates in a row had a non-finite loss or gradient and were skipped "
                f"(alg.max_skipped_updates={limit}), {self._whereabouts(self.state.epoch)}"
            )

    def _whereabouts(self, epoch: int) -> str:
        return f"in epoch {epoch}; the state is in {self.directory.latest}"

    def _end_as_diverged(self) -> None:
        self.save("latest")
        self._wrap_up("diverged")

    def _save_after_fault(self) -> None:
        """Save what there is as an environment fails; that is told by its own exception."""
        try:
            self.save("latest")
        except Exception as error:
            self._logger.say(f"an environment failed, and no checkpoint could be written: {error}")
            return
        anew = ", from there with new episodes" if self.state.torn else ""
        self._logger.say(
            f"an environment failed in epoch {self.state.epoch + 1}: the state before is in "
            f"{self.directory.latest}; the same command goes on{anew}"
        )

    # --- evaluation and logging -----------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        every, epoch = self.config.eval.every, self.state.epoch + 1
        return every > 0 and (epoch % every == 0 or epoch == self.config.epochs)

    def _evaluate(self, epoch: int) -> Evaluation:
        config = self.config.eval
        if self._eval_env is None:
            self._eval_env = self.make_eval_env(self.ranks.part(config.episodes))
        held = Held(tasks_of(self._eval_env))
        due = epoch % max(1, config.every * config.video_every) == 0
        film = f"epoch_{epoch}" if due else None
        found = self._evaluated(self._eval_env, Purpose.EVALUATION, held, film)
        model = metrics.to_numbers(held.metrics(self.state.agent))
        return replace(found, model=metrics.mean_over(self.ranks, model))

    def _final_evaluation(self) -> Evaluation | None:
        with closing(self.make_eval_env(self.ranks.part(self.config.eval.final_episodes))) as env:
            result = self._evaluated(env, Purpose.FINAL_EVALUATION, film="final")
        self._log_film("final_video")
        self.save("final")
        return result

    def _evaluated(
        self, env: VectorEnv, purpose: Purpose, held: Held | None = None, film: str | None = None
    ) -> Evaluation:
        seed = seeding.stream(self.config.seed, purpose, *self.ranks.numbers)
        agent, check = self.state.agent, self._stop.check_alone
        with ExitStack() as stack:
            filming = None
            if self._films and film is not None:
                path = self.directory.videos / f"{film}.mp4"
                filming = video.TrainingFilm(env, path, video.TRAINING, self._end_films)
                stack.enter_context(closing(filming))
            try:
                with self.ranks.together(alike=(Interrupted, PolicyNotFinite)):
                    found = evaluate(agent, env, seed, check=check, record=held, film=filming)
                found = joined(self.ranks.gather(found.on_cpu()))
            except (Interrupted, PolicyNotFinite, RankLost):
                raise
            except Exception:
                self.state.torn = False  # an evaluation leaves the training's own state alone
                raise
            if filming is not None and filming.finish():
                self._filmed = path
        return found

    def _end_films(self, error: Exception) -> None:
        self._films = False
        self._logger.say(f"warning: no evaluation is filmed from here on: {error}")

    def _log_film(self, key: str) -> None:
        if self._filmed is not None:
            self._logger.log_video(key, self._filmed)
            self._filmed = None

    def _log(self, row: metrics.Row, evaluation: Evaluation | None) -> None:
        """Log a row; the newest evaluation stands in each, so that `reward` is of real episodes."""
        self._tick()
        better = False
        if evaluation is not None:
            row.update(evaluation.row())
            self.state.latest_eval = {
                "reward": row["eval_reward"],
                "episode_length": row["eval_episode_length"],
            }
            found = {"reward": row["eval_reward"], "diverged": row["eval_diverged"]}
            ranks = [
                metrics.rank(e.get("diverged"), e.get("reward")) for e in (found, self.state.best)
            ]
            better = not self.state.best or ranks[0] > ranks[1]
        self._logger.write({**row, **self.state.latest_eval, "wall_time": self.state.wall_time})
        self._log_film("eval_video")
        if better:
            self.state.best = {
                **found,
                "epoch": self.state.epoch,
                "env_steps": self.state.env_steps,
            }
            self.save("best")
            self._logger.summarize({f"best_{k}": v for k, v in self.state.best.items()})
        if evaluation is not None and self._logger.takes_gradients:
            self._logger.log_gradients(self.state.agent.gradients())

    def _tick(self) -> None:
        now = time.monotonic()
        self.state.wall_time += now - self._clock
        self._clock = now

    def _wrap_up(self, status: str, result: Evaluation | None = None) -> dict[str, Any]:
        """Draw the plots and write ``summary.json``; the other ranks wait for that."""
        with self.ranks.together():
            return self._wrapped_up(status, result)

    def _wrapped_up(self, status: str, result: Evaluation | None) -> dict[str, Any]:
        try:
            if self.ranks.first:
                plot_run(self.directory.path, run_name(self.config))
        except ImportError as error:
            self._logger.say(f"no plots were drawn: {error}")
        self._tick()
        summary: dict[str, Any] = {
            "status": status,
            "env": self.config.env.name,
            "alg": self.config.alg.full_name,
            "seed": self.config.seed,
            "epochs": self.state.epoch,
            "env_steps": self.state.env_steps,
            "wall_time": self.state.wall_time,
            "best": self.state.best,
            "parameters": self.state.agent.world_model.num_parameters(),
            **self._beside(),
        }
        if result is not None:
            summary["evaluation"] = result.summary()
            self._logger.summarize({"final_reward": summary["evaluation"]["reward_mean"]})
        if self.ranks.first:
            self.directory.write_summary(summary)
        return summary

    def _beside(self) -> dict[str, Any]:
        """What else a summary says."""
        return {}

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self, name: str) -> None:
        """Write ``checkpoints/<name>.pt``; ``latest`` also has the replay and keeps its forerunner.

        Raises:
            CheckpointError: it could not be written; what was there before is untouched.
        """
        self._tick()
        content = self._content(name)
        with self.ranks.together():
            if self.ranks.first:
                # What is logged may be behind a checkpoint, never missing before it.
                self._logger.sync()
                self._write(name, content, keep_previous=name == "latest")

    def saving_start(self, source: Source) -> Callable[[], None]:
        """What makes the named checkpoint that the run goes on from the latest of its directory.

        Else a run that is killed soon would go on from another one, or anew. To be called before
        the metrics file is changed.
        """
        latest = self.directory.latest
        if self.config.resume == "auto" or (latest.exists() and latest.samefile(source.path)):
            return lambda: None
        keep = source.path.resolve() != checkpoint.previous_of(latest).resolve()
        content = self._content("latest")
        return lambda: self._write("latest", content, keep_previous=keep)

    def restore(self, source: Source) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: it is of another architecture or environment.
            ConfigError: its replay was filled with other offline data than this run's.
        """
        # A best checkpoint that lies in another run's directory is not ours to point to.
        self.state.restore(source, own_best=(self.directory.checkpoints / "best.pt").exists())

    def _content(self, name: str) -> dict[str, Any]:
        return self.state.content(with_replay=name == "latest" and self.KEEPS_REPLAY)

    def _write(self, name: str, content: dict[str, Any], *, keep_previous: bool) -> None:
        path = self.directory.checkpoints / f"{name}.pt"
        checkpoint.save(path, content, keep_previous=keep_previous)
        if name == "latest":
            self.directory.saved()
