"""World models: names, columns, initialisation, values against a second implementation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.models import FlowWorldModel, LatentModel, make_world_model
from pwm_fast.ops import project_simplex
from tests.models.builders import (
    ACTION,
    OBS,
    SlowModel,
    column_map,
    normal,
    randomize_,
    same,
    simplex,
    small,
    small_model,
)

KINDS = ("mlp", "flow")
TASKS = {"single": {}, "multi": {"task_dim": 4, "num_tasks": 3}}


def normed(*names: str) -> set[str]:
    parts = ("weight", "bias", "ln.weight", "ln.bias")
    return {f"{name}.{part}" for name in names for part in parts}


def linear(name: str) -> set[str]:
    return {f"{name}.weight", f"{name}.bias"}


SHARED = normed("_encoder.0", "_encoder.1", "_reward.0", "_reward.1") | linear("_reward.2")
DYNAMICS = {
    ("mlp", "linear"): normed("_dynamics.0", "_dynamics.1", "_dynamics.2"),
    ("flow", "linear"): normed("_velocity.0", "_velocity.1") | linear("_velocity.2"),
    ("flow", "simnorm"): normed("_velocity.0", "_velocity.1", "_velocity.2"),
}


# Names and shapes


@pytest.mark.parametrize(("kind", "head"), DYNAMICS)
@pytest.mark.parametrize("can_terminate", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_parameter_names(kind: str, head: str, can_terminate: bool, task: str) -> None:
    """Published checkpoints load by key: no name is missing, none is new."""
    model = small_model(can_terminate, kind=kind, head=head, **TASKS[task])
    expected = SHARED | DYNAMICS[kind, head]
    if can_terminate:
        expected |= normed("_termination.0", "_termination.1") | linear("_termination.2")
    if task == "multi":
        expected |= {"_task_emb.weight"}
    assert set(model.state_dict()) == expected
    assert {name for name, _ in model.named_parameters()} == expected


@pytest.mark.parametrize("kind", ["mlp", "flow", "residual", "shortcut"])
@pytest.mark.parametrize("task", TASKS)
def test_latents_that_are_observations(kind: str, task: str) -> None:
    """No encoder, D = O (no multiple of 8), and the last layer of every kind is linear."""
    model = small_model(kind=kind, encoder="identity", **TASKS[task])
    assert (model.latent_dim, model.simplices, model.encoder_layers()) == (OBS, False, ())
    names = set(model.state_dict())
    assert not any("encoder" in name for name in names)
    net = "_dynamics" if kind in ("mlp", "residual") else "_velocity"
    assert linear(f"{net}.2") <= names and f"{net}.2.ln.weight" not in names
    assert model.get_parameter(f"{net}.2.weight").shape[0] == OBS
    assert "encoder" not in model.num_parameters()
    obs, action = normal(3, OBS), normal(3, ACTION)
    number = None if task == "single" else torch.tensor([0, 2, 1])
    assert torch.equal(model.encode(obs, number), obs)
    assert model.next(obs, action, number).shape == (3, OBS)
    assert model.reward(obs, action, number).shape == (3, 21)
    with pytest.raises(ValueError, match=r"^obs must be \[\.\.\., 5\], got \(3, 4\)$"):
        model.encode(obs[:, 1:], number)
    with pytest.raises(TypeError, match=r"^obs must have a floating dtype, got torch\.int64$"):
        model.encode(obs.long(), number)
    with pytest.raises(ValueError, match="task"):
        model.encode(obs, torch.zeros(3, dtype=torch.int64) if number is None else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_parameter_shapes(kind: str, task: str) -> None:
    """First layers take the concatenated width; tau has one column more in a flow."""
    model = small_model(kind=kind, **TASKS[task])
    emb = TASKS[task].get("task_dim", 0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["_encoder.0.weight"] == (11, OBS + emb)
    assert shapes["_encoder.1.weight"] == (16, 11)
    assert shapes["_reward.0.weight"] == (10, 16 + emb + ACTION)
    assert shapes["_reward.2.weight"] == (21, 9)
    if kind == "mlp":
        assert shapes["_dynamics.0.weight"] == (14, 16 + emb + ACTION)
        assert shapes["_dynamics.2.ln.weight"] == (16,)
    else:
        assert shapes["_velocity.0.weight"] == (14, 16 + ACTION + 1 + emb)
        assert shapes["_velocity.2.weight"] == (16, 12)


def test_num_parameters_leaves_out_the_termination_head() -> None:
    """The published models have none, so a count that is compared with theirs has none either."""
    plain = small_model(kind="flow").num_parameters()
    ending = small_model(True, kind="flow").num_parameters()
    head = ending.pop("termination")
    pair = 16 + ACTION
    assert head == (pair * 10 + 3 * 10) + (10 * 9 + 3 * 9) + (9 + 1)
    assert ending == plain
    assert plain["total"] == plain["encoder"] + plain["velocity"] + plain["reward"]


# The order of the inputs


def unit(k: int, *widths: int) -> list[Tensor]:
    """Row k of the identity, split into parts of these widths."""
    x = torch.zeros(1, sum(widths), dtype=torch.float64)
    x[0, k] = 1.0
    return list(x.split(widths, dim=1))


def multi_task(kind: str, can_terminate: bool = False) -> LatentModel:
    return small_model(can_terminate, kind=kind, task_dim=4, num_tasks=3).requires_grad_(False)


def with_embedding(model: LatentModel, embedding: Tensor) -> Tensor:
    """Make ``embedding`` that of task 1, and return the task number."""
    assert model._task_emb is not None
    model._task_emb.weight[1] = embedding
    return torch.tensor(1)


def identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.bool)


def test_encoder_columns_are_obs_task() -> None:
    """``[obs, task]``: each column of the first weight answers to its own input and no other."""
    model = multi_task("mlp")

    def call(k: int) -> Tensor:
        obs, emb = unit(k, OBS, 4)
        return model.encode(obs, with_embedding(model, emb))

    columns = column_map(model._encoder[0].weight, call, OBS + 4)
    assert torch.equal(columns, identity(OBS + 4))


@pytest.mark.parametrize("head", ["_dynamics", "_reward", "_termination"])
def test_columns_are_z_task_action(head: str) -> None:
    """``[z, task, a]``, as PWM and TD-MPC2 have it."""
    model = multi_task("mlp", can_terminate=True)
    method = {"_dynamics": "next", "_reward": "reward", "_termination": "termination"}[head]

    def call(k: int) -> Tensor:
        z, emb, a = unit(k, 16, 4, ACTION)
        return getattr(model, method)(z, a, with_embedding(model, emb))

    columns = column_map(getattr(model, head)[0].weight, call, 16 + 4 + ACTION)
    assert torch.equal(columns, identity(16 + 4 + ACTION))


def test_flow_reward_columns_are_z_task_action() -> None:
    """Also in a flow, whose published code has [z, a, task] here."""
    model = multi_task("flow")

    def call(k: int) -> Tensor:
        z, emb, a = unit(k, 16, 4, ACTION)
        return model.reward(z, a, with_embedding(model, emb))

    columns = column_map(model._reward[0].weight, call, 16 + 4 + ACTION)
    assert torch.equal(columns, identity(16 + 4 + ACTION))


def test_velocity_columns_are_z_action_tau_task() -> None:
    """``[z, a, tau, task]``, as the published flow code has it."""
    model = multi_task("flow")
    assert isinstance(model, FlowWorldModel)

    def call(k: int) -> Tensor:
        z, a, tau, emb = unit(k, 16, ACTION, 1, 4)
        return model.velocity(z, a, tau, with_embedding(model, emb))

    columns = column_map(model._velocity[0].weight, call, 16 + ACTION + 1 + 4)
    assert torch.equal(columns, identity(16 + ACTION + 1 + 4))


# Initialisation


@pytest.mark.parametrize(("kind", "head"), DYNAMICS)
def test_initialisation(kind: str, head: str) -> None:
    """Normal weights of std 0.02, zero biases, LayerNorms at identity, heads that start at zero."""
    config = small(
        kind=kind, head=head, latent_dim=128, units=[130, 140], encoder_units=[150], task_dim=40
    )
    model = make_world_model(60, 20, config, can_terminate=True)
    zero = {"_reward.2.weight", "_termination.2.weight"}
    drawn = 0
    for name, p in model.named_parameters():
        if name == "_task_emb.weight":
            continue
        if name in zero or name.endswith("bias"):
            assert p.eq(0).all(), name
        elif name.endswith("ln.weight"):
            assert p.eq(1).all(), name
        else:
            # The deviation of a sample deviation of n draws is 1 / sqrt(2 n): five of them.
            assert p.std().item() == pytest.approx(0.02, rel=5 / (2 * p.numel()) ** 0.5), name
            assert abs(p.mean().item()) < 5 * 0.02 / p.numel() ** 0.5, name
            assert p.numel() < 1000 or p.abs().max() > 0.055, f"{name} is cut off too early"
            drawn += 1
    assert drawn == 2 + 3 + 2 + 2


def test_task_embeddings_start_within_0_02() -> None:
    """Uniform in +-0.02, which fills that range."""
    model = make_world_model(OBS, ACTION, small(task_dim=64, num_tasks=30))
    assert model._task_emb is not None
    weight = model._task_emb.weight.detach()
    assert weight.abs().max() <= 0.02
    assert weight.max() > 0.0195 and weight.min() < -0.0195
    assert weight.std().item() == pytest.approx(0.02 / 3**0.5, rel=0.05)


def test_fresh_reward_is_zero() -> None:
    """All bins equally likely: the expectation is symexp(0) = 0."""
    for bins in (1, 21):
        model = make_world_model(OBS, ACTION, small(num_bins=bins))
        logits = model.reward(torch.rand(4, 16), torch.rand(4, ACTION))
        assert logits.shape == (4, bins)
        assert logits.eq(0).all()
        same(model.decode_reward(logits), torch.zeros(4), atol=1e-6, rtol=0)


# Values


@pytest.mark.parametrize(("kind", "head"), DYNAMICS)
@pytest.mark.parametrize("integrator", ["heun", "euler"])
@pytest.mark.parametrize("task", [None, 2])
def test_forward_values(kind: str, head: str, integrator: str, task: int | None) -> None:
    """Every method in float64 against networks written from the formulas."""
    multi = {} if task is None else TASKS["multi"]
    model = small_model(True, kind=kind, head=head, integrator=integrator, substeps=3, **multi)
    slow = SlowModel(model, task)
    number = None if task is None else torch.full((7,), task)
    obs, z, a = normal(7, OBS), simplex(7, 16), normal(7, ACTION)
    same(model.encode(obs, number), slow.encode(obs))
    same(model.next(z, a, number), slow.next(z, a))
    same(model.reward(z, a, number), slow.reward(z, a))
    ending = model.termination(z, a, number)
    assert ending is not None
    same(ending, slow.termination(z, a))
    z_next, logits = model.step(z, a, number)
    same(z_next, slow.next(z, a))
    same(logits, slow.reward(z, a))


def test_termination_is_none_without_its_head() -> None:
    assert small_model(False).termination(simplex(2, 16), normal(2, ACTION)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_and_baseline_latents_lie_on_simplices(kind: str) -> None:
    """Groups of 8 are non-negative and sum to 1."""
    model = small_model(kind=kind)
    z = model.encode(10.0 * normal(3, 4, OBS))
    latents = [z]
    if kind == "mlp":
        latents.append(model.next(z, normal(3, 4, ACTION)))
    for z in latents:
        assert z.shape == (3, 4, 16)
        assert z.min() >= 0
        same(z.unflatten(-1, (2, 8)).sum(-1), torch.ones(3, 4, 2, dtype=torch.float64))


@pytest.mark.parametrize("substeps", [1, 2, 4])
def test_flow_next_is_flow_step_and_hand_written_heun(substeps: int) -> None:
    """``next`` = ``ops.flow_step`` (bitwise) = Heun written out on ``velocity``."""
    model = small_model(kind="flow", substeps=substeps)
    assert isinstance(model, FlowWorldModel)
    z, a = simplex(6, 16), normal(6, ACTION)
    ours = model.next(z, a)
    assert torch.equal(ours, ops.flow_step(z, a, model._velocity.layers(), substeps, "heun"))
    state, dt = z, 1.0 / substeps
    for k in range(substeps):
        k1 = model.velocity(state, a, k * dt)
        k2 = model.velocity(state + dt * k1, a, (k + 1) * dt)
        state = state + dt / 2 * (k1 + k2)
    same(ours, state)


def test_integrator_and_substeps_are_the_configured_ones() -> None:
    """Four ways to integrate give four results."""
    model = small_model(kind="flow")
    z, a = simplex(2, 16), normal(2, ACTION)
    results = []
    for model.config.integrator, model.config.substeps in itertools.product(
        ("heun", "euler"), (1, 2)
    ):
        results.append(model.next(z, a))
    for x, y in itertools.combinations(results, 2):
        assert (x - y).abs().max() > 1e-6


def test_velocity_takes_every_form_of_tau() -> None:
    """A number, a scalar tensor, ``[...]`` and ``[..., 1]``; a leading time axis too."""
    model = small_model(kind="flow")
    assert isinstance(model, FlowWorldModel)
    z, a = simplex(2, 5, 16), normal(2, 5, ACTION)
    expected = model.velocity(z, a, torch.full((2, 5), 0.25, dtype=torch.float64))
    for tau in (
        0.25,
        torch.tensor(0.25),
        torch.tensor(0.25, dtype=torch.float64),
        torch.full((2, 5, 1), 0.25, dtype=torch.float64),
    ):
        same(model.velocity(z, a, tau), expected)
    with pytest.raises(ValueError, match="tau must be"):
        model.velocity(z, a, torch.zeros(5))


@pytest.mark.parametrize("head", ["linear", "simnorm"])
def test_velocity_head(head: str) -> None:
    """A linear head takes negative values; a simnorm head's groups sum to 1 and are positive."""
    model = small_model(kind="flow", head=head)
    assert isinstance(model, FlowWorldModel)
    v = model.velocity(simplex(50, 16), normal(50, ACTION), 0.5)
    if head == "linear":
        assert v.min() < -0.1
    else:
        assert v.min() >= 0
        same(v.unflatten(-1, (2, 8)).sum(-1), torch.ones(50, 2, dtype=torch.float64))


def test_projection() -> None:
    """Negative entries become 0 and groups sum to 1; a latent on the simplices stays."""
    z = torch.tensor([[0.5, -0.5, 1.5, 0, 0, 0, 0, 0, *([-1.0] * 8)]], dtype=torch.float64)
    expected = torch.zeros(1, 16, dtype=torch.float64)
    expected[0, 0], expected[0, 2] = 0.25, 0.75
    same(project_simplex(z), expected)  # a group without a positive entry has nothing to scale
    z = simplex(5, 16)
    same(project_simplex(z), z)


def test_projection_is_an_option_of_next() -> None:
    """``project`` puts the integrated latent back on the simplices; it is off by default."""
    model = small_model(kind="flow")
    z, a = simplex(5, 16), normal(5, ACTION)
    free = model.next(z, a)
    assert free.min() < 0
    model.config.project = True
    same(model.next(z, a), project_simplex(free))


# Task numbers


@pytest.mark.parametrize("kind", KINDS)
def test_task_numbers_of_every_shape(kind: str) -> None:
    """A scalar, ``[B]`` and ``[H, B]`` for ``[H, B, ...]`` inputs, equal to one row at a time."""
    model = small_model(True, kind=kind, **TASKS["multi"])
    obs, z, a = normal(2, 4, OBS), simplex(2, 4, 16), normal(2, 4, ACTION)
    numbers = [torch.tensor(2), torch.tensor([0, 2, 1, 1]), torch.tensor([[0, 1, 2, 0], [2] * 4])]
    for task in numbers:
        every = task.expand(2, 4)
        for method, inputs in (
            ("encode", (obs,)),
            ("next", (z, a)),
            ("reward", (z, a)),
            ("termination", (z, a)),
        ):
            ours = getattr(model, method)(*inputs, task)
            for t, b in itertools.product(range(2), range(4)):
                row = getattr(model, method)(*(x[t, b] for x in inputs), every[t, b])
                same(ours[t, b], row, msg=f"{method}, task {tuple(task.shape)}")


def test_task_changes_every_output() -> None:
    model = small_model(True, kind="flow", **TASKS["multi"])
    obs, z, a = normal(4, OBS), simplex(4, 16), normal(4, ACTION)
    zero, one = torch.tensor(0), torch.tensor(1)
    for method, inputs in (("encode", (obs,)), ("next", (z, a)), ("reward", (z, a))):
        difference = getattr(model, method)(*inputs, zero) - getattr(model, method)(*inputs, one)
        assert difference.abs().amax(-1).min() > 1e-4, method


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (None, ValueError, "task numbers are required: the model has task_dim=4"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"broadcast to \(4,\), got \(3,\)"),
        (torch.zeros(1, 4, dtype=torch.int64), ValueError, r"broadcast to \(4,\), got \(1, 4\)"),
        (torch.zeros(4), TypeError, "task must hold integers .* got torch.float32"),
    ],
)
def test_task_errors(task: Tensor | None, error: type[Exception], message: str) -> None:
    model = small_model(kind="flow", **TASKS["multi"])
    with pytest.raises(error, match=message):
        model.encode(normal(4, OBS), task)


def test_single_task_model_refuses_task_numbers() -> None:
    with pytest.raises(ValueError, match="task must be None"):
        small_model().encode(normal(4, OBS), torch.zeros(4, dtype=torch.int64))


def test_task_embeddings_have_norm_1_at_most() -> None:
    """As ``nn.Embedding(max_norm=1)``: a longer row is scaled to norm 1, a shorter one stays."""
    model = small_model(kind="mlp", **TASKS["multi"])
    assert model._task_emb is not None
    weight = model._task_emb.weight
    with torch.no_grad():
        weight[0] *= 5.0
    start = weight.detach().clone()
    obs, task = normal(4, OBS), torch.tensor([0, 1, 2, 0])
    z = model.encode(obs, task)
    reference = torch.nn.Embedding(3, 4, max_norm=1.0, dtype=torch.float64)
    with torch.no_grad():
        reference.weight.copy_(start)
        x = torch.cat((obs, reference(task)), dim=-1)
    same(z, model._encoder(x))
    same(weight.norm(dim=-1), start.norm(dim=-1).clamp_max(1.0), rtol=1e-6)
    assert torch.equal(weight[1:], start[1:])
    z.sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


# Shapes, dtypes, state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (3, 2)])
def test_leading_shapes(kind: str, lead: tuple[int, ...]) -> None:
    """One latent, none at all, one row, and time x batch."""
    model = small_model(True, kind=kind)
    z, a = simplex(*lead, 16), normal(*lead, ACTION)
    assert model.encode(normal(*lead, OBS)).shape == (*lead, 16)
    assert model.next(z, a).shape == (*lead, 16)
    assert model.reward(z, a).shape == (*lead, 21)
    assert model.decode_reward(model.reward(z, a)).shape == lead
    ending = model.termination(z, a)
    assert ending is not None and ending.shape == lead


@pytest.mark.parametrize("kind", KINDS)
def test_float32_forward_and_gradients_agree_with_float64(kind: str) -> None:
    """The same parameters in both dtypes give the same results, up to float32's rounding."""
    model = small_model(kind=kind)
    single = make_world_model(OBS, ACTION, model.config)
    single.load_state_dict(model.state_dict())
    obs, a = normal(6, OBS), normal(6, ACTION)
    outputs = []
    for m, x, y in ((model, obs, a), (single, obs.float(), a.float())):
        z, logits = m.step(m.encode(x), y)
        assert z.dtype == logits.dtype == x.dtype
        (z.square().sum() + logits.square().sum()).backward()
        outputs.append((z, logits))
    torch.testing.assert_close(outputs[1][0].double(), outputs[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[1][1].double(), outputs[0][1], rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        close = torch.allclose(q.grad.double(), p.grad, rtol=1e-3, atol=1e-4)
        assert close, name


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: str) -> None:
    """A second model that loads the first one's state computes the same bits."""
    model = small_model(True, kind=kind, **TASKS["multi"])
    other = small_model(True, kind=kind, **TASKS["multi"])
    obs, a, task = normal(3, OBS), normal(3, ACTION), torch.tensor([0, 1, 2])
    assert not torch.equal(other.encode(obs, task), model.encode(obs, task))
    other.load_state_dict(model.state_dict())
    z = model.encode(obs, task)
    assert torch.equal(other.encode(obs, task), z)
    assert torch.equal(other.next(z, a, task), model.next(z, a, task))
    assert torch.equal(other.reward(z, a, task), model.reward(z, a, task))


def test_randomize_reaches_every_parameter() -> None:
    """The tests' own helper: no head stays at its zero start."""
    model = small_model(True, **TASKS["multi"])
    randomize_(model)
    assert all(p.abs().max() > 0 for p in model.parameters())
