"""The cases of ``python -m bench.gpu`` by stage, and the order in which they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from bench import agent, micro, rollouts
from bench import esnr as gradients
from bench.cases import Case, Workload
from bench.measure import Effort
from bench.providers import GRAPH, LABELS, OURS
from bench.sizes import alg_config

MODELS = ("5M", "48M", "317M")
BATCHES = (64, 128, 512, 2048, 16384)
SUBSTEPS = (4, 1)
MODES = ("backward", "forward")
_ORDER = tuple(LABELS)
SAMPLES = (4, 16, 64)

# Providers in passes: all cases take the first before any takes the second, because compiling costs
# more time than everything else together.
EAGER = ("published", "tf32", "autocast")
FLOORS = ("floor", "floor_tf32", "floor_bf16")
JAX = ("jax", "jax_bf16", "diffrax")
PASSES = (
    (*EAGER, *OURS, *(name + GRAPH for name in OURS), *FLOORS),
    ("compile_bf16",),  # what the aims are multiples of
    ("compile_tf32",),
    JAX,
    ("compile_max",),
)
# The one rollout that is measured before all else: this project's, then what it is compared with.
HEADLINE = (
    ("fast_fp16_graph",),
    ("published",),
    ("compile_bf16",),
    ("compile",),
    ("fast_bf16_graph", "fast_fp16"),
)
# Enough to see a few percent: a GPU's time varies less than a CPU's.
EFFORT = Effort(seconds=0.6, min_rounds=5, max_rounds=40, sample=0.02)


def rollout(
    model: str,
    batch: int,
    substeps: int,
    mode: str,
    passes: Sequence[Sequence[str]] = PASSES,
) -> Case:
    """An imagined rollout of ``pwm_<model>_flow``, with all providers of ``passes``."""
    return Case(
        f"rollout-{model}_flow-b{batch}-K{substeps}-{mode}",
        {
            "work": rollouts.TITLE,
            "model": f"{model}_flow",
            "batch": batch,
            "K": substeps,
            "mode": mode,
        },
        partial(rollouts.build, alg_config(f"{model}_flow", substeps), batch, mode),
        tuple(sorted((name for names in passes for name in names), key=_ORDER.index)),
        effort=EFFORT,
    )


def headline() -> list[Case]:
    """Loss and gradient of the actor of ``pwm_5M_flow``: batch 128, K = 4, 16 steps."""
    return [rollout("5M", 128, 4, "backward", HEADLINE)]


def quick() -> list[Case]:
    """The set that is measured first: K = 4, forward and backward."""
    sizes = [(model, batch) for batch in (128, 512, 16384) for model in ("5M", "48M")]
    return [rollout(model, batch, 4, "backward") for model, batch in sizes]


def full() -> list[Case]:
    """Every model, batch, K and mode; the quick ones too."""
    return [
        rollout(model, batch, substeps, mode)
        for model in MODELS
        for substeps in SUBSTEPS
        for mode in MODES
        for batch in BATCHES
    ]


def esnr() -> list[Case]:
    """M gradient samples of the world model's 1.5, 18.7 and 150 million parameters."""
    return [
        Case(
            f"esnr-{model}-M{samples}",
            {"work": gradients.TITLE.format(samples), "model": model, "batch": samples},
            partial(gradients.build, gradients.parameters(model), samples=samples),
            ("published", "reference", "fast", "fast_graph", "floor"),
            effort=EFFORT,
        )
        for model in MODELS
        for samples in SAMPLES
    ]


def epoch() -> list[Case]:
    """A training epoch's updates, and then with the physics of 128 Ants."""
    # Of two Heun steps, which the aims are about.
    names = ("updates-5M", "epoch-5M")
    found = [case for case in agent.epochs(torch.device("cuda")) if case.name in names]
    first = ("published_baseline", "published", "fast_fp16_graph", "fast_bf16_graph")
    return [
        replace(
            case,
            providers=(*first, *(name for name in case.providers if name not in first)),
            effort=Effort(seconds=1.0, min_rounds=3, max_rounds=20),
        )
        for case in sorted(found, key=lambda case: "updates" not in case.name)
    ]


def dry_cases(kind: str) -> list[Case]:
    """Stand-ins of a stage, small enough for a run that only shows that everything runs."""
    if kind == "headline":
        cases = [rollout("tiny", 7, 1, "backward", HEADLINE)]
    elif kind in ("quick", "matrix"):
        size = ("tiny", 7, 1, "backward") if kind == "quick" else ("tiny", 9, 2, "forward")
        cases = [rollout(*size)]
    elif kind == "esnr":
        shapes = (torch.Size((50, 7)), torch.Size((9,)))
        cases = [
            replace(case, name="esnr-tiny-M4", build=partial(gradients.build, shapes, samples=4))
            for case in esnr()[:1]
        ]
    else:
        cases = [
            replace(
                case,
                name=case.name.replace("5M", "tiny"),
                build=partial(_small_epoch, case.build),
            )
            for case in epoch()
        ]
    effort = Effort(seconds=0.2, min_rounds=2, max_rounds=3, sample=0.0)
    return [replace(case, effort=effort) for case in cases]


def _small_epoch(build: partial[Workload], device: torch.device) -> Workload:
    small = alg_config("tiny_flow"), alg_config("tiny")
    for alg in small:
        alg.model_learning.updates, alg.steps_per_epoch = 2, 4
        alg.actor.updates, alg.critic.passes, alg.critic.minibatches = 1, 1, 2
        alg.actor.batch_size, alg.model_learning.batch_size = 100, 20
    return build.func(*small, device, num_envs=4, horizon=4, **build.keywords)


# --- in which order -----------------------------------------------------------------------------


class Job(NamedTuple):
    """What a measuring process is asked for.

    Attributes:
        kind: ``case`` or ``micro``.
        stage: that names the case.
        name: of the case or of the microbenchmark.
        providers: of the case.
        dry: the small stand-in.
    """

    kind: str
    stage: str
    name: str
    providers: tuple[str, ...] = ()
    dry: bool = False


MEASURED = ("headline", "epoch", "quick", "esnr", "matrix")
READ = tuple(micro.STAGES)  # stages of microbenchmarks
_TAKEN = {"headline": HEADLINE, "quick": PASSES, "matrix": PASSES}


def cases(stage: str, dry: bool) -> list[Case]:
    """The cases of a stage, or small stand-ins."""
    if dry:
        return dry_cases(stage)
    made = {
        "headline": headline,
        "epoch": epoch,
        "quick": quick,
        "esnr": esnr,
        "matrix": full,
    }
    return made[stage]()


def jobs(stage: str, found: Sequence[Case], dry: bool) -> Iterator[Job]:
    """All jobs of a stage, in order.

    Rollouts in passes: all over their cheap providers, then over those that take compiling.
    """
    if stage in READ:
        yield from (Job("micro", stage, name, dry=dry) for name in micro.STAGES[stage])
        return
    taken: dict[str, set[str]] = {case.name: set() for case in found}
    rest = tuple(dict.fromkeys(p for case in found for p in case.providers))
    for names in (*_TAKEN.get(stage, ()), rest):
        for case in found:
            chosen = tuple(p for p in case.providers if p in names and p not in taken[case.name])
            taken[case.name].update(chosen)
            if chosen:
                yield Job("case", stage, case.name, chosen, dry)
