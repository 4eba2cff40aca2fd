"""``launch=slurm``: the runs of a sweep as jobs of a Slurm cluster."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn

from pwm_fast.config import ConfigError
from pwm_fast.launch import JobFailed, local, options, plan, queue, sweep
from pwm_fast.launch.slurm_job import SlurmJob

# Keys of Hydra's submitit launcher that are set here, from `launch`.
OURS = {
    "submitit_folder",
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "max_num_timeout",
    "additional_parameters",
}


class SlurmSweep:
    """Hydra launcher: submits a sweep in job arrays, ``launch.runs_per_job`` runs to a job.

    It lies over hydra-submitit-launcher's and has its options. Unlike that one it checks the whole
    sweep first, puts several runs into one job, gives a job the exit status of its runs, and needs
    no accounting database to see that a job has ended.
    """

    params: dict[str, Any]
    config: Any
    hydra_context: Any

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submit the runs and, unless told not to, wait for them.

        Raises:
            ConfigError: a run's configuration cannot be used, there is no Slurm here, or Slurm
                does not take the job.
            JobFailed: a run did not finish; which, why and where its log is was printed.
        """
        with local.before_the_start(self.config, initial_job_idx):
            given = options.read(options.SlurmOptions, self.config.launch)
            loader = self.hydra_context.config_loader
            runs, _ = plan.plan(loader, self.config, job_overrides, initial_job_idx)
            size = 1 if runs[0].parallel else given.runs_per_job
            groups = [runs[i : i + size] for i in range(0, len(runs), size)]
            if runs[0].parallel and given.runs_per_job == 1:
                raise ConfigError(
                    "parallel=data wants several processes, as many as launch.runs_per_job: give "
                    "launch=slurm_4gpu, or launch.runs_per_job=N of a node with N GPUs"
                )
            directory = Path(str(self.config.hydra.sweep.dir))
            several = "s" if len(groups) > 1 else ""
            if given.dry_run:
                print(f"{len(runs)} runs in {len(groups)} Slurm job{several}")
                self._show(groups, given)
                local.forget(self.config)
                return local.returns(runs)
            jobs = self._submit(groups, given)
        print(f"{len(runs)} runs in {len(groups)} Slurm job{several}")
        sweep.write(directory, runs, jobs)
        for job, indices in jobs.items():
            labels = ", ".join(run.label for run in runs if run.index in indices)
            print(f"  job {job}: {labels}")
        print(
            f"logs in {directory}; python -m pwm_fast.submit status {directory} shows how they do",
            flush=True,
        )
        if given.wait:
            queue.wait(list(jobs))
            statuses, notes = queue.ends(runs, jobs)
            text = sweep.failures(runs, statuses, notes)
            if text:
                print(text, file=sys.stderr)
                raise JobFailed(sweep.exit_status(statuses) or 1)
            print("all runs finished")
        return local.returns(runs)

    def _submit(
        self, groups: Sequence[list[sweep.Run]], given: options.SlurmOptions
    ) -> dict[str, list[int]]:
        """Submit a job array for each size of group; indices of the runs by the job's id."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        for program in ("sbatch", "srun"):
            if shutil.which(program) is None:
                raise ConfigError(
                    f"launch=slurm needs Slurm, but there is no {program} here: run this on a "
                    "login node of the cluster, or use launch=local; launch.dry_run=true works "
                    "anywhere"
                )
        jobs: dict[str, list[int]] = {}
        for same in _by_size(groups):
            places = _places(same[0], given)
            executor = self._executor(places, given)
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # what the error below says
                    submitted = executor.map_array(SlurmJob(places), same)
            except (FailedJobError, FailedSubmissionError) as error:
                done = f" (submitted before that: {', '.join(jobs)})" if jobs else ""
                raise ConfigError(f"sbatch refused the job: {queue.reason(error)}{done}") from error
            for job, group in zip(submitted, same, strict=True):
                jobs[job.job_id] = [run.index for run in group]
        return jobs

    def _show(self, groups: Sequence[list[sweep.Run]], given: options.SlurmOptions) -> None:
        """Print what would be submitted."""
        print("nothing is submitted; these are the jobs:")
        for same in _by_size(groups):
            for group in same:
                places = _places(group, given)
                each = f" in {places} processes" if group[0].parallel else ""
                print(f"job of {len(group)} run{'s' if len(group) > 1 else ''}{each}")
                local.print_runs(group)
            executor = self._executor(_places(same[0], given), given)
            if len(same) > 1:
                executor.parameters["map_count"] = len(same)
            text = executor._make_submission_file_text(executor._submitit_command_str, "")
            print(f"\nsbatch gets{' for this job array' if len(same) > 1 else ''}:")
            print("\n".join(f"    {line}" for line in text.splitlines()))

    def _executor(self, size: int, given: options.SlurmOptions) -> Any:
        """Submitit's executor for jobs of ``size`` places, each of one run or process."""
        from submitit.slurm.slurm import SlurmExecutor

        class Executor(SlurmExecutor):
            @classmethod
            def affinity(cls) -> int:  # a dry run needs no Slurm; whether there is one is checked
                return 2

        own = {k: v for k, v in self.params.items() if v is not None and k not in OURS}
        values: dict[str, Any] = {
            **own,
            "job_name": self.params["name"],
            "wckey": None,  # submitit's default is an error where the cluster keeps such keys
            "time": given.minutes,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": given.cpus * size,
            # Slurm 22.05 and later do not hand the job's CPUs on to its steps by themselves.
            "srun_args": [f"--cpus-per-task={given.cpus * size}"],
            "additional_parameters": {
                "requeue": True,
                **self.params.get("additional_parameters", {}),
            },
        }
        if given.gpus and "gres" not in own:
            count = given.gpus * size
            values["gpus_per_node"] = f"{given.gpu_type}:{count}" if given.gpu_type else count
        if given.mem_gb and not {"mem_per_gpu", "mem_per_cpu"} & own.keys():
            values["mem"] = f"{given.mem_gb * size}GB"
        executor = Executor(
            folder=self.params["submitit_folder"], max_num_timeout=self.params["max_num_timeout"]
        )
        try:
            executor.update_parameters(**values)
        except ValueError as error:
            raise ConfigError(f"hydra.launcher: {str(error).splitlines()[0]}") from error
        return executor


def _places(group: Sequence[sweep.Run], given: options.SlurmOptions) -> int:
    """Shares of a job with those runs: one for each, or all for one that is parallel."""
    return given.runs_per_job if group[0].parallel else len(group)


def _by_size(groups: Sequence[list[sweep.Run]]) -> list[list[list[sweep.Run]]]:
    """Groups of one size together: jobs of an array all have the same resources."""
    sizes = sorted({len(group) for group in groups}, reverse=True)
    return [[group for group in groups if len(group) == size] for size in sizes]
