"""Files of the published codes are read with the values that these compute, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pwm_fast import load_published
from pwm_fast.models import make_actor, make_critic, make_world_model
from pwm_fast.published import Published, PublishedError, discount, of_tasks, task_numbers
from tests.published import codes
from tests.published.codes import TDMPC2, PWMFile, World, pwm_file

F64 = torch.float64
ROWS = 7
TASKS, WIDTH = 4, 6  # of a file of several tasks
ACTION_DIMS = (3, 1, 2, 3)


def double(module: Any) -> Any:
    return copy.deepcopy(module).double()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape)))


def loaded(module: nn.Module, state: dict[str, Tensor]) -> Any:
    module = module.double()
    module.load_state_dict({k: v.double() for k, v in state.items()})
    return module


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def world_of(found: Published) -> Any:
    return loaded(
        make_world_model(found.obs_dim, found.action_dim, found.alg.world_model), found.world_model
    )


def actor_of(found: Published) -> Any:
    width = found.alg.world_model.latent_dim
    return loaded(make_actor(width, found.action_dim, found.alg), found.actor)


def critic_of(found: Published) -> Any:
    width = found.alg.world_model.latent_dim
    return loaded(make_critic(width, found.action_dim, found.alg), found.critic)


@torch.no_grad()
def compare_worlds(found: Published, theirs: Any, task: int | None, **step: Any) -> None:
    ours, theirs = world_of(found), double(theirs)
    obs = normal(ROWS, found.obs_dim)
    a = normal(ROWS, found.action_dim).tanh()
    number = None if task is None else torch.tensor(task)
    z = theirs.encode(obs, task)
    same(ours.encode(obs, number), z)
    same(ours.next(z, a, number), theirs.next(z, a, task, **step))
    same(ours.reward(z, a, number), theirs.reward(z, a, task))


@torch.no_grad()
def compare_agents(found: Published, file: PWMFile) -> None:
    z = normal(ROWS, found.alg.world_model.latent_dim)
    actor = actor_of(found)
    same(actor(z), double(file.actor)(z).tanh())
    same(actor.logstd, file.actor.logstd.double())  # type: ignore[union-attr,operator]
    same(critic_of(found).values(z), double(file.critic)(z)[..., 0])


# --- PWM ------------------------------------------------------------------------------------------


def test_pwm_of_one_task(tmp_path: Path) -> None:
    file = pwm_file(obs=5, normalised=("obs_rms", "rew_rms", "ret_rms"))
    found = load_published(file.save(tmp_path / "best.pt"))
    assert (found.family, found.obs_dim, found.action_dim, found.action_dims) == ("pwm", 5, 3, None)
    alg, model = found.alg, found.alg.world_model
    assert (model.kind, model.latent_dim, model.units, model.encoder_units) == (
        *("mlp", 16, [12, 10], [11]),
    )
    assert (model.reward_units, model.num_bins, model.task_dim, model.num_tasks) == (
        *([12, 10], 1, 0, 1),
    )
    assert (alg.actor.units, alg.critic.units, alg.critic.members) == ([9, 8, 7], [9, 6], 3)
    assert alg.normalize_obs and alg.normalize_rewards and alg.normalize_returns
    assert alg.value_delay == 1 and alg.obs_clip == 5.0 and alg.centre_rewards, "alg=pwm"
    compare_worlds(found, file.world, None)
    compare_agents(found, file)
    for key, sign in (("obs_rms", 1), ("rew_rms", 1), ("ret_rms", -1)):
        theirs, ours = file.rms[key], getattr(found, key)
        shape = (5,) if key == "obs_rms" else ()
        same(ours["mean"], sign * theirs.mean.double().reshape(shape))
        same(ours["var"], theirs.var.double().reshape(shape))
        assert float(ours["count"]) == 1234.0001
        assert all(v.dtype == F64 for v in ours.values())


@torch.no_grad()
@pytest.mark.parametrize(("substeps", "integrator"), [(2, "heun"), (3, "euler")])
def test_flow_policies(substeps: int, integrator: str, tmp_path: Path) -> None:
    """Drawn and deterministic actions, also where the noise is below its least deviation."""
    file = pwm_file(flow_policy=True, bins=21, flow=True, package="flow_mbpo_pwm")
    actor: Any = file.actor
    actor.init_logstd[0] = -11.0
    found = load_published(
        file.save(tmp_path / "x.pt"), policy_substeps=substeps, policy_integrator=integrator
    )
    alg, z, eps = found.alg, normal(ROWS, 16), normal(ROWS, 3)
    assert (alg.actor.kind, alg.actor.form, alg.actor.units) == ("flow", "ode", [9, 8, 7])
    assert (alg.world_model.substeps, alg.world_model.integrator) == (2, "heun")
    assert any("[z, x, tau] to [x, z, tau]" in note for note in found.notes)
    assert f"kind flow, [9, 8, 7], {integrator} K={substeps}" in found.describe()
    ours, theirs = actor_of(found), double(actor)
    for noise in (eps, 1e4 * eps):
        same(ours(z, noise), theirs(z, noise, substeps, integrator).tanh())
    same(ours(z), theirs(z, torch.zeros_like(eps), substeps, integrator).tanh())
    compare_worlds(found, file.world, None, k=2, heun=True)


def test_flow_policies_of_several_tasks(tmp_path: Path) -> None:
    file = pwm_file(flow_policy=True, bins=21, task_dim=WIDTH, tasks=TASKS)
    found = load_published(file.save(tmp_path / "x.pt"))
    kept = of_tasks(found, [1], found.obs_dim, found.action_dim)
    assert all(torch.equal(kept.actor[k], v) for k, v in found.actor.items())
    with pytest.raises(PublishedError, match=r"has 3 actions, the environment has 2.*policy=new"):
        of_tasks(found, [1], found.obs_dim, 2)


def test_statistics_that_the_file_lacks(tmp_path: Path) -> None:
    found = load_published(pwm_file(normalised=()).save(tmp_path / "x.pt"))
    assert (found.obs_rms, found.rew_rms, found.ret_rms) == (None, None, None)
    alg = found.alg
    assert not (alg.normalize_obs or alg.normalize_rewards or alg.normalize_returns)


@pytest.mark.parametrize("task", range(TASKS))
def test_pwm_of_several_tasks(task: int, tmp_path: Path) -> None:
    file = pwm_file(bins=21, tasks=TASKS, task_dim=WIDTH, normalised=("ret_rms",))
    found = load_published(file.save(tmp_path / "final.pt"))
    assert (found.obs_dim, found.action_dim, found.num_tasks) == (5, 3, TASKS)
    assert (found.alg.actor.task_input, found.alg.critic.task_input) == (False, False)
    assert found.alg.symlog_rewards and not found.alg.normalize_rewards
    compare_worlds(found, file.world, task)
    compare_agents(found, file)


# --- Flow-MBPO-PWM --------------------------------------------------------------------------------


def flow_file(**changes: Any) -> PWMFile:
    return pwm_file(
        **{"bins": 21, "package": "flow_mbpo_pwm", "normalised": ("ret_rms",), **changes}
    )


def test_baseline_of_flow_mbpo_pwm(tmp_path: Path) -> None:
    file = flow_file()
    found = load_published(file.save(tmp_path / "best_policy.pt"))
    assert (found.family, found.title) == ("flow_mbpo_pwm", "Flow-MBPO-PWM")
    assert found.alg.world_model.kind == "mlp"
    compare_worlds(found, file.world, None)
    compare_agents(found, file)


@pytest.mark.parametrize(("k", "integrator"), [(2, "heun"), (4, "heun"), (8, "euler")])
@pytest.mark.parametrize("task_dim", [0, codes.ZERO_FED])
def test_flow_of_one_task(task_dim: int, k: int, integrator: str, tmp_path: Path) -> None:
    file = flow_file(flow=True, task_dim=task_dim)
    found = load_published(file.save(tmp_path / "x.pt"), substeps=k, integrator=integrator)
    model = found.alg.world_model
    assert (model.kind, model.head, model.task_dim) == ("flow", "simnorm", 0)
    assert (found.obs_dim, model.substeps, model.integrator) == (5, k, integrator)
    assert any("dropped" in note for note in found.notes) == bool(task_dim)
    compare_worlds(found, file.world, None, k=k, heun=integrator == "heun")
    compare_agents(found, file)


@pytest.mark.parametrize("task", [0, 3])
def test_flow_of_several_tasks(task: int, tmp_path: Path) -> None:
    """Its reward sees [z, a, task], ours [z, task, a]."""
    file = flow_file(flow=True, tasks=TASKS, task_dim=WIDTH)
    found = load_published(file.save(tmp_path / "x.pt"))
    assert any("reordered" in note for note in found.notes)
    compare_worlds(found, file.world, task)
    with torch.no_grad():
        z, a = normal(ROWS, 16), normal(ROWS, 3)
        as_is = {**found.world_model, "_reward.0.weight": file.world._reward[0].weight}  # type: ignore[dict-item]
        wrong = loaded(make_world_model(5, 3, found.alg.world_model), as_is)
        assert not torch.allclose(
            wrong.reward(z, a, torch.tensor(task)), double(file.world).reward(z, a, task)
        )


def test_a_linear_velocity(tmp_path: Path) -> None:
    file = flow_file(flow=True, linear_head=True)
    found = load_published(file.save(tmp_path / "x.pt"))
    assert found.alg.world_model.head == "linear"
    assert not any("simnorm_head" in note for note in found.notes)
    compare_worlds(found, file.world, None)


# --- TD-MPC2 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("several", [False, True], ids=["one_task", "several"])
def test_tdmpc2(several: bool, old: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = TDMPC2(action_dims=ACTION_DIMS, task_dim=WIDTH) if several else TDMPC2()
    path = theirs.save(tmp_path / "x.pt", old=old)
    entries = len(torch.load(path, weights_only=True)["model"])
    expected = {(False, False): 78, (True, False): 80, (False, True): 60, (True, True): 61}
    assert entries == expected[several, old], "as many as the published code saves"
    found = load_published(path)
    alg = found.alg
    assert (found.family, found.obs_dim, found.action_dim) == ("tdmpc2", 5, 3)
    assert found.action_dims == (ACTION_DIMS if several and not old else None)
    assert (alg.actor.kind, alg.actor.units, alg.actor.task_input) == (
        *("tdmpc2", [12, 12], True if several else None),
    )
    assert (alg.actor.min_logstd, alg.actor.max_logstd) == (-10.0, 2.0)
    assert (alg.critic.kind, alg.critic.units, alg.critic.members) == ("tdmpc2", [12, 12], 5)
    assert not (alg.symlog_rewards or alg.normalize_obs or alg.normalize_rewards)
    tasks: Sequence[int | None] = range(TASKS) if several else [None]
    for task in tasks:
        compare_worlds(found, theirs, task)
        compare_tdmpc2_agents(found, theirs, task)


@torch.no_grad()
def compare_tdmpc2_agents(found: Published, theirs: TDMPC2, task: int | None) -> None:
    z, a = normal(ROWS, found.alg.world_model.latent_dim), normal(ROWS, found.action_dim)
    embedding = None if task is None else world_of(found).embed(torch.tensor(task), z)[0]
    mask = None if task is None else theirs.masks()[task].double().expand_as(a)
    actor, reference = actor_of(found), double(theirs)
    mu, log_std = reference.pi(z, task)
    same(actor(z, task=embedding, mask=mask), mu.tanh())
    masked = 1.0 if mask is None else mask
    same(actor.std(z, embedding).log() * masked, log_std)
    logits = critic_of(found)(z, a, embedding)
    same(logits, reference.q_logits(z, a, task))
    targets = double(theirs.target)(reference.joined(z, task, a))
    assert not torch.allclose(logits, targets), "the online ones"


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ("1M", {"latent": 128, "units": 384, "encoder_units": [256], "members": 2}),
        ("5M", {"latent": 512, "units": 512, "encoder_units": [256]}),
        ("19M", {"latent": 768, "units": 1024, "encoder_units": [1024, 1024]}),
    ],
)
def test_sizes_of_tdmpc2(size: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Also those that no configuration here has."""
    theirs = TDMPC2(obs=24, action=6, bins=101, **sizes)
    found = load_published(theirs.save(tmp_path / f"{size}.pt"))
    model = found.alg.world_model
    assert (model.latent_dim, model.units[0]) == (sizes["latent"], sizes["units"])
    assert model.encoder_units == sizes["encoder_units"]
    assert found.alg.critic.members == sizes.get("members", 5)
    with torch.device("meta"):
        own = make_world_model(24, 6, model).state_dict()
    assert {k: v.shape for k, v in own.items()} == {
        k: v.shape for k, v in found.world_model.items()
    }
    compare_worlds(found, theirs, None)


def test_a_termination_head_is_left_out(tmp_path: Path) -> None:
    theirs = TDMPC2(episodic=True)
    found = load_published(theirs.save(tmp_path / "x.pt"))
    assert any(note.startswith("_termination: left out") for note in found.notes)
    compare_worlds(found, theirs, None)


def test_shapes_without_values(tmp_path: Path) -> None:
    """Since TensorDict 0.14 the module that its Q functions are called through is registered."""
    theirs = TDMPC2()
    empty = torch.empty(12, 19, device="meta")
    named = ("_Qs.module.0.weight", "_detach_Qs.module.0.weight", "_target_Qs.module.0.weight")
    found = load_published(theirs.save(tmp_path / "x.pt", **dict.fromkeys(named, empty)))
    compare_tdmpc2_agents(found, theirs, None)


def test_a_state_dict_alone(tmp_path: Path) -> None:
    """TD-MPC2 itself reads it with and without a dict around."""
    theirs = TDMPC2()
    content = torch.load(theirs.save(tmp_path / "x.pt"), weights_only=True)
    torch.save(content["model"], tmp_path / "bare.pt")
    compare_worlds(load_published(tmp_path / "bare.pt"), theirs, None)


@pytest.mark.parametrize(("steps", "expected"), [(500, 0.99), (100, 0.95), (1000, 0.995)])
def test_discount(steps: int, expected: float) -> None:
    assert discount(steps) == pytest.approx(expected, abs=1e-15)


# --- some of the tasks ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_some_tasks_of_tdmpc2(old: bool, tmp_path: Path) -> None:
    """With narrower observations and actions: theirs are fed zeros in the rest."""
    torch.manual_seed(0)
    theirs = TDMPC2(action_dims=ACTION_DIMS, task_dim=WIDTH)
    whole = load_published(theirs.save(tmp_path / "x.pt", old=old))
    found = of_tasks(whole, [2, 1], obs_dim=4, action_dim=2)
    assert (found.num_tasks, found.obs_dim, found.action_dim) == (2, 4, 2)
    assert found.action_dims == (None if old else (2, 1))
    ours, reference = world_of(found), double(theirs)
    obs, a = normal(ROWS, 4), normal(ROWS, 2)
    for number, task in enumerate([2, 1]):
        a_masked = a * theirs.masks()[task, :2]
        padded = torch.nn.functional.pad(a_masked, (0, 1))
        z = reference.encode(torch.nn.functional.pad(obs, (0, 1)), task)
        same(ours.encode(obs, torch.tensor(number)), z)
        same(ours.next(z, a_masked, torch.tensor(number)), reference.next(z, padded, task))
        same(ours.reward(z, a_masked, torch.tensor(number)), reference.reward(z, padded, task))
        embedding = ours.embed(torch.tensor(number), z)[0]
        mask = theirs.masks()[task, :2].double().expand(ROWS, -1)
        mu, log_std = reference.pi(z, task)
        same(actor_of(found)(z, task=embedding, mask=mask), mu[:, :2].tanh())
        same(actor_of(found).std(z, embedding).log() * mask, log_std[:, :2])
        logits = critic_of(found)(z, a_masked, embedding)
        same(logits, reference.q_logits(z, padded, task))
    assert whole.num_tasks == TASKS, "the file itself is as it was"


def test_one_task_of_a_flow(tmp_path: Path) -> None:
    file = flow_file(flow=True, tasks=TASKS, task_dim=WIDTH)
    whole = load_published(file.save(tmp_path / "x.pt"))
    found = of_tasks(whole, [3], obs_dim=4, action_dim=2)
    ours, theirs = world_of(found), double(file.world)
    obs, a = normal(ROWS, 4), normal(ROWS, 2)
    task, pad = torch.tensor(0), torch.nn.functional.pad
    with torch.no_grad():
        z = theirs.encode(pad(obs, (0, 1)), 3)
        same(ours.encode(obs, task), z)
        same(ours.next(z, a, task), theirs.next(z, pad(a, (0, 1)), 3))
        same(ours.reward(z, a, task), theirs.reward(z, pad(a, (0, 1)), 3))
        same(actor_of(found)(z), double(file.actor)(z).tanh()[:, :2])
    assert found.optimizers == {} and whole.optimizers


@pytest.mark.parametrize(
    ("numbers", "obs", "action", "said"),
    [
        ([4], 5, 3, "tasks must be numbers from 0 to 3"),
        ([], 5, 3, "tasks must be numbers from 0 to 3"),
        ([0], 6, 3, "of 5 observations and 3 actions at most, the environment has 6 and 3"),
        ([1, 2], 5, 3, "have 1, 2 actions, the environment has 3"),
    ],
)
def test_tasks_that_do_not_fit(
    numbers: list[int], obs: int, action: int, said: str, tmp_path: Path
) -> None:
    theirs = TDMPC2(action_dims=ACTION_DIMS, task_dim=WIDTH)
    found = load_published(theirs.save(tmp_path / "x.pt"))
    with pytest.raises(PublishedError, match=said):
        of_tasks(found, numbers, obs, action)


def test_a_single_task_has_no_others(tmp_path: Path) -> None:
    found = load_published(TDMPC2().save(tmp_path / "x.pt"))
    with pytest.raises(PublishedError, match="it has one task and no embedding"):
        of_tasks(found, [0], 5, 3)


def test_normalised_padding_is_no_zero(tmp_path: Path) -> None:
    file = pwm_file(bins=21, tasks=TASKS, task_dim=WIDTH, normalised=("obs_rms", "ret_rms"))
    found = load_published(file.save(tmp_path / "x.pt"))
    with pytest.raises(PublishedError, match="padding is no zeros"):
        of_tasks(found, [0], 4, 3)


def test_names_of_tasks(tmp_path: Path) -> None:
    theirs = TDMPC2(action_dims=[3] * 30, task_dim=WIDTH)
    found = load_published(theirs.save(tmp_path / "x.pt"))
    names = ["walker-walk", "ball_in_cup-catch", "finger-turn_hard", "cartpole-swingup_sparse"]
    assert task_numbers(found, names) == [1, 12, 15, 11]
    with pytest.raises(PublishedError, match="dog-run: no task of the 30"):
        task_numbers(found, ["walker-walk", "dog-run"])
    few = load_published(TDMPC2(action_dims=[3] * 4, task_dim=2).save(tmp_path / "y.pt"))
    with pytest.raises(PublishedError, match="has 4 tasks, whose names it does not hold"):
        task_numbers(few, ["walker-walk"])


# --- optimisers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", [False, True])  # of both: world model and policy
def test_moments_by_name(flow: bool, tmp_path: Path) -> None:
    """Those of columns that were reordered or dropped, too."""
    file = flow_file(flow=flow, flow_policy=flow, tasks=TASKS, task_dim=WIDTH)
    found = load_published(file.save(tmp_path / "x.pt"))
    assert found.alg.model_learning.betas == [0.9, 0.999]
    assert found.alg.actor.betas == [0.7, 0.95]
    modules = {"world_model": file.world, "actor": file.actor, "critic": file.critic}
    for part, module in modules.items():
        state = file.optimizers[f"{part}_opt"].state
        learned = {n: p for n, p in module.named_parameters() if p in state}
        assert set(found.optimizers[part]) == set(learned)
        for name, p in learned.items():
            for key in ("exp_avg", "exp_avg_sq"):
                theirs = state[p][key]
                if name == "_reward.0.weight" and flow:
                    theirs = torch.cat([theirs[:, :16], theirs[:, 19:], theirs[:, 16:19]], 1)
                if name == "velocity_net.0.weight":
                    theirs = torch.cat([theirs[:, 16:19], theirs[:, :16], theirs[:, 19:]], 1)
                assert torch.equal(found.optimizers[part][name][key], theirs), name
            assert float(found.optimizers[part][name]["step"]) == 3.0
    assert "_task_emb.weight" not in found.optimizers["world_model"]


@pytest.mark.parametrize(
    ("key", "value", "said"), [("amsgrad", True, "amsgrad"), ("weight_decay", 0.1, "weight_decay")]
)
def test_another_adam_is_left_out(key: str, value: object, said: str, tmp_path: Path) -> None:
    file = pwm_file()
    for group in file.optimizers["actor_opt"].param_groups:
        group[key] = value
    found = load_published(file.save(tmp_path / "x.pt"))
    assert set(found.optimizers) == {"world_model", "critic"}
    note = next(n for n in found.notes if n.startswith("actor_opt: left out"))
    assert said in note


def test_no_moments_before_the_first_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = PWMFile(
        World(5, 3, 16, [12], [11], 1),
        codes.Actor(16, 3, [9]),
        codes.Ensemble([codes.Critic(16, [9]) for _ in range(3)]),
    )
    found = load_published(file.save(tmp_path / "init_policy.pt"))
    assert found.optimizers == {"world_model": {}, "actor": {}, "critic": {}}
