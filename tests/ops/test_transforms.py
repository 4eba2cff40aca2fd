"""Every operation under every way to differentiate or transform it: right, or a clear error.

The truth is the reference in float64 under plain reverse-mode autograd. An operation is a function
of one vector that holds all its tensors, parameters too, so no argument is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pwm_fast
from pwm_fast import ops
from pwm_fast.backends import native, select
from pwm_fast.ops import Layer
from pwm_fast.ops.returns import discounted_return

pytestmark = pytest.mark.slow
Function = Callable[[Tensor], Tensor]
D, A, B, H, U = 8, 2, 3, 2, 8


class Case(NamedTuple):
    """An operation.

    Attributes:
        call: from tensors of ``shapes``.
        shapes: of all its tensors.
        native: whether native kernels run it in float32.
    """

    call: Callable[..., Tensor]
    shapes: Sequence[tuple[int, ...]]
    native: bool

    def function(self, x: Tensor) -> Tensor:
        """The operation on the tensors that lie one after another in ``x``, as one vector."""
        parts = x.split([prod(shape) for shape in self.shapes])
        return self.call(*(p.reshape(s) for p, s in zip(parts, self.shapes, strict=True))).reshape(
            -1
        )

    def draw(self, seed: int = 0) -> Tensor:
        """A float64 vector of float32 numbers."""
        generator = torch.Generator().manual_seed(seed)
        size = sum(prod(shape) for shape in self.shapes)
        return torch.randn(size, generator=generator).double()


def normed(k: int, n: int) -> list[tuple[int, ...]]:
    return [(n, k), (n,), (n,), (n,)]


def net(k: int, n: int) -> list[tuple[int, ...]]:
    return [*normed(k, U), (n, U), (n,)]


def layers(*p: Tensor) -> list[Layer]:
    return [Layer(*p[:4], act="mish"), Layer(*p[4:])]


def imagine(z: Tensor, noise: Tensor, std: Tensor, *p: Tensor) -> Tensor:
    out = ops.imagine(
        z,
        ops.Policy(layers(*p[:6]), std),
        ops.Flow(layers(*p[6:12])),
        ops.Heads(layers(*p[12:18]), -2.0, 2.0),
        noise=noise,
    )
    return torch.cat([out.z[1:].flatten(), out.action.flatten(), out.reward.flatten()])


def window(flow: bool) -> Callable[..., Tensor]:
    def loss(obs: Tensor, a: Tensor, reward: Tensor, *p: Tensor) -> Tensor:
        net = layers(*p[6:12])
        found = ops.world_model_loss(
            obs,
            a,
            reward.detach(),
            encoder=layers(*p[:6]),
            dynamics=ops.Flow(net) if flow else ops.LatentMap(net),
            heads=ops.Heads(layers(*p[12:18]), -2.0, 2.0),
            tau=torch.full((H, B), 0.25, dtype=obs.dtype),
        )
        return torch.stack([found.dynamics, found.reward])

    return loss


def esnr(g: Tensor) -> Tensor:
    found = ops.esnr(g)
    return torch.stack([found.signal, found.noise, found.ratio, found.db]).to(g.dtype)


def ends(like: Tensor) -> Tensor:
    """1, and 0 where an episode ends."""
    return torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=like.dtype)


CASES: dict[str, Case] = {
    "simnorm": Case(ops.simnorm, [(B, 16)], True),
    "project_simplex": Case(ops.project_simplex, [(B, 16)], False),
    "mish": Case(ops.mish, [(B, 7)], False),
    "layer_norm_act": Case(ops.layer_norm_act, [(B, 8), (8,), (8,)], True),
    "layer_norm_act simnorm": Case(
        lambda *t: ops.layer_norm_act(*t, act="simnorm"), [(B, 8), (8,), (8,)], True
    ),
    "linear_norm_act": Case(
        lambda x, *p: ops.linear_norm_act(x, Layer(*p, act="mish")), [(B, 7), *normed(7, 8)], True
    ),
    "linear_act_norm": Case(
        lambda x, *p: ops.linear_act_norm(x, Layer(*p, act="mish")), [(B, 7), *normed(7, 8)], True
    ),
    "mlp": Case(lambda x, y, *p: ops.mlp([x, y], layers(*p)), [(B, 3), (B, 4), *net(7, 5)], True),
    "mlp ensemble": Case(
        lambda x, *p: ops.mlp([x], layers(*p), order="act_norm"),
        [(B, 7), *((2, *shape) for shape in net(7, 2))],
        True,
    ),
    "velocity_field": Case(
        lambda z, a, tau, *p: ops.velocity_field(z, a, tau, layers(*p)),
        [(B, D), (B, A), (B,), *net(D + A + 1, D)],
        True,
    ),
    "flow_step": Case(
        lambda z, a, *p: ops.flow_step(z, a, layers(*p)),
        [(B, D), (B, A), *net(D + A + 1, D)],
        True,
    ),
    "flow_interpolate": Case(
        lambda *t: torch.cat(ops.flow_interpolate(*t)), [(B, D), (B, D), (B,)], False
    ),
    "integrate": Case(
        lambda z, *p: ops.integrate(lambda y, tau: ops.mlp([y], layers(*p)), z),
        [(B, D), *net(D, D)],
        True,
    ),
    "latent_rollout": Case(
        lambda z, a, *p: ops.latent_rollout(z, a, ops.LatentMap(layers(*p))),
        [(B, D), (H, B, A), *net(D + A, D)],
        True,
    ),
    "imagine": Case(
        imagine,
        [(B, D), (H, B, A), (A,), *net(D, A), *net(D + A + 1, D), *net(D + A, 5)],
        True,
    ),
    "world_model_loss flow": Case(
        window(True),
        [(H + 1, B, 4), (H, B, A), (H, B), *net(4, D), *net(D + A + 1, D), *net(D + A, 5)],
        True,
    ),
    "world_model_loss map": Case(
        window(False),
        [(H + 1, B, 4), (H, B, A), (H, B), *net(4, D), *net(D + A, D), *net(D + A, 5)],
        True,
    ),
    "symlog": Case(ops.symlog, [(B, 5)], False),
    "symexp": Case(ops.symexp, [(B, 5)], False),
    "two_hot_encode": Case(lambda x: ops.two_hot_encode(x, 11, -3.0, 3.0), [(B,)], False),
    "two_hot_decode": Case(ops.two_hot_decode, [(B, 11)], True),
    "two_hot_cross_entropy": Case(
        lambda v, x: ops.two_hot_cross_entropy(v, x.detach(), -3.0, 3.0), [(B, 11), (B,)], True
    ),
    "two_hot_cross_entropy target": Case(
        lambda v, x: ops.two_hot_cross_entropy(v, x, -3.0, 3.0), [(B, 11), (B,)], False
    ),
    # Where a slope has to be looked after: at an end, and at 0.
    "td_lambda behind an end": Case(
        lambda r, v, c: ops.td_lambda(r, v, continues=c * ends(c)),
        [(H, B), (H + 1, B), (H, B)],
        False,
    ),
    "td_lambda at an end": Case(
        lambda r, v, c: ops.td_lambda(r, v, continues=c - c.detach() * (1.0 - ends(c))),
        [(H, B), (H + 1, B), (H, B)],
        False,
    ),
    "discounted_return at an end": Case(
        lambda r, v, c: discounted_return(r, v, 0.9, c - c.detach() * (1.0 - ends(c))),
        [(H, B), (B,), (H, B)],
        False,
    ),
    "two_hot_encode of 0": Case(
        lambda x: ops.two_hot_encode(x - x.detach(), 10, -3.0, 3.0), [(B,)], False
    ),
    "symexp of 0": Case(lambda x: ops.symexp(x - x.detach()), [(B,)], False),
    "symlog of 0": Case(lambda x: ops.symlog(x - x.detach()), [(B,)], False),
    "td_lambda": Case(
        lambda r, v, c: ops.td_lambda(r, v, continues=c), [(H, B), (H + 1, B), (H, B)], False
    ),
    "discounted_return": Case(
        lambda r, v, c: discounted_return(r, v, 0.9, c), [(H, B), (B,), (H, B)], False
    ),
    "esnr": Case(esnr, [(4, 5)], True),
}


class Truth(NamedTuple):
    """Of an operation in float64: value, Jacobian, and a Hessian times ``t``."""

    y: Tensor
    jacobian: Tensor
    curvature: Tensor


class Drawn(NamedTuple):
    """What an operation is checked at: a point, a tangent, a gradient, and the truth there."""

    x: Tensor
    t: Tensor
    w: Tensor
    truth: Truth


@functools.cache
def drawn(name: str) -> Drawn:
    """The same for every way; the Hessian is that of ``w . f``, with the parts of ``w`` it has."""
    case = CASES[name]
    x, t = case.draw(), case.draw(1)
    with select.backend("reference"):
        leaf = x.clone().requires_grad_()
        y = case.function(leaf)
        w = torch.randn(1000, generator=torch.Generator().manual_seed(2)).double()[: y.numel()]
        (gradient,) = torch.autograd.grad(y, leaf, w, create_graph=True)
        curvature = torch.zeros_like(x)
        if gradient.requires_grad:
            (curvature,) = torch.autograd.grad(gradient @ t, leaf)
        return Drawn(x, t, w, Truth(y.detach(), jacobian(case.function, x), curvature))


class Same(TorchDispatchMode):
    """Changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SameFunctions(TorchFunctionMode):
    """Changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    """A subclass without a behaviour of its own."""


class OwnParameter(torch.nn.Parameter):
    """A parameter without a behaviour of its own."""


# Ways to a directional derivative ``J t``.


def dual_level(f: Function, x: Tensor, t: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


def dual_no_grad(f: Function, x: Tensor, t: Tensor) -> Tensor | None:
    """Which does not stop tangents."""
    with torch.no_grad():
        return dual_level(f, x, t)


def dual_of_leaf(f: Function, x: Tensor, t: Tensor) -> Tensor | None:
    """Of what reverse mode could differentiate as well."""
    return dual_level(f, x.clone().requires_grad_(), t)


def linearize(f: Function, x: Tensor, t: Tensor) -> Tensor:
    return torch.func.linearize(f, x)[1](t)


def jvp_of_vmap(f: Function, x: Tensor, t: Tensor) -> Tensor:
    return torch.func.jvp(torch.vmap(f), (x[None],), (t[None],))[1][0]


def vmap_of_jvp(f: Function, x: Tensor, t: Tensor) -> Tensor:
    return torch.vmap(lambda x, t: torch.func.jvp(f, (x,), (t,))[1])(x[None], t[None])[0]


def jvp_within_checkpoint(f: Function, x: Tensor, t: Tensor) -> Tensor:
    def both(x: Tensor) -> Tensor:
        return torch.func.jvp(f, (x,), (t,))[1]

    found = checkpoint(both, x, use_reentrant=False)
    assert isinstance(found, Tensor)
    return found


def jvp_of_make_fx(f: Function, x: Tensor, t: Tensor) -> Tensor:
    return make_fx(lambda x, t: torch.func.jvp(f, (x,), (t,))[1])(x, t)(x, t)


FORWARD: dict[str, Callable[[Function, Tensor, Tensor], Tensor | None]] = {
    "dual level": dual_level,
    "dual level, no_grad": dual_no_grad,
    "dual level, leaf": dual_of_leaf,
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "linearize": linearize,
    "jvp of vmap": jvp_of_vmap,
    "vmap of jvp": vmap_of_jvp,
    "jvp of functionalize": lambda f, x, t: torch.func.jvp(torch.func.functionalize(f), (x,), (t,))[
        1
    ],
    "jvp in a checkpoint": jvp_within_checkpoint,
    "make_fx of jvp": jvp_of_make_fx,
    "jvp by two backward passes": lambda f, x, t: torch.autograd.functional.jvp(f, x, t)[1],
}

# Ways to a gradient ``w J``.


def backward(f: Function, x: Tensor, w: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf, w)[0]


def of_loss(way: Callable[[Function], Any]) -> Callable[[Function, Tensor, Tensor], Any]:
    return lambda f, x, w: way(lambda x: (f(x) * w).sum())(x)


def through_checkpoint(reentrant: bool) -> Callable[[Function, Tensor, Tensor], Tensor]:
    def way(f: Function, x: Tensor, w: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        y = checkpoint(f, leaf, use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        y.backward(w)
        assert leaf.grad is not None
        return leaf.grad

    return way


def within(context: Callable[[], Any]) -> Callable[[Function, Tensor, Tensor], Tensor]:
    def way(f: Function, x: Tensor, w: Tensor) -> Tensor:
        with context():
            return backward(f, x, w)

    return way


def packed_by_hooks() -> Any:
    def pack(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    def unpack(x: Tensor) -> Tensor:
        return x.float() if x.dtype == torch.float64 else x

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def traced(mode: str) -> Callable[[Function, Tensor, Tensor], Tensor]:
    def way(f: Function, x: Tensor, w: Tensor) -> Tensor:
        def both(x: Tensor, w: Tensor) -> Tensor:
            return backward(f, x, w)

        return make_fx(both, tracing_mode=mode)(0.5 * x, w)(x, w)

    return way


def jit_traced(f: Function, x: Tensor, w: Tensor) -> Tensor:
    return backward(torch.jit.trace(f, (0.5 * x,), check_trace=False), x, w)


def of_subclass(f: Function, x: Tensor, w: Tensor) -> Tensor:
    leaf = x.clone().as_subclass(Named).requires_grad_()  # type: ignore[arg-type]
    y = f(leaf)
    assert type(y) is Named
    return torch.autograd.grad(y, leaf, w)[0].as_subclass(Tensor)  # type: ignore[arg-type]


def of_own_parameter(f: Function, x: Tensor, w: Tensor) -> Tensor:
    leaf = OwnParameter(x.clone())
    return torch.autograd.grad(f(leaf), leaf, w)[0]


def of_wrapper(f: Function, x: Tensor, w: Tensor) -> Tensor:
    leaf = TwoTensor(x.clone(), x.clone()).requires_grad_()
    y = f(leaf)
    assert isinstance(y, TwoTensor)
    found = torch.autograd.grad(y, leaf, TwoTensor(w, w))[0]
    torch.testing.assert_close(found.a, found.b)
    return found.a


REVERSE: dict[str, Callable[[Function, Tensor, Tensor], Tensor]] = {
    "backward": backward,
    "grad": of_loss(torch.func.grad),
    "grad of vmap": lambda f, x, w: torch.func.grad(lambda x: (torch.vmap(f)(x[None]) * w).sum())(
        x
    ),
    "vmap of grad": lambda f, x, w: torch.vmap(torch.func.grad(lambda x: (f(x) * w).sum()))(
        x[None]
    )[0],
    "vjp": lambda f, x, w: torch.func.vjp(f, x)[1](w)[0],
    "backward of vmap": lambda f, x, w: backward(lambda x: torch.vmap(f)(x[None])[0], x, w),
    "backward of vmap of vmap": lambda f, x, w: backward(
        lambda x: torch.vmap(torch.vmap(f))(x[None, None])[0, 0], x, w
    ),
    "backward of functionalize": lambda f, x, w: backward(torch.func.functionalize(f), x, w),
    "functionalize of grad": lambda f, x, w: torch.func.functionalize(
        torch.func.grad(lambda x: (f(x) * w).sum())
    )(x),
    "make_fx": traced("real"),
    "make_fx, fake": traced("fake"),
    "make_fx, symbolic": traced("symbolic"),
    "make_fx of grad": lambda f, x, w: make_fx(torch.func.grad(lambda x: (f(x) * w).sum()))(x)(x),
    "jit.trace": jit_traced,
    "checkpoint": through_checkpoint(False),
    "checkpoint, reentrant": through_checkpoint(True),
    "saved tensors hooks": within(packed_by_hooks),
    "save on CPU": within(torch.autograd.graph.save_on_cpu),
    "dispatch mode": within(Same),
    "function mode": within(SameFunctions),
    "device mode": within(lambda: torch.device("cpu")),
    "dual level of another": within(forward_ad.dual_level),
    "anomaly mode": within(torch.autograd.detect_anomaly),
    "subclass": of_subclass,
    "parameter subclass": of_own_parameter,
    "wrapper subclass": of_wrapper,
}

# Ways to a whole Jacobian, and to a Hessian times ``t``.

JACOBIANS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacobian": jacobian,
    "jacobian, vectorized": lambda f, x: jacobian(f, x, vectorize=True),
    "jacobian, forward": lambda f, x: jacobian(f, x, strategy="forward-mode", vectorize=True),
}
HESSIANS: dict[str, Callable[[Function, Tensor, Tensor], Tensor]] = {
    "hessian": lambda g, x, t: torch.func.hessian(g)(x) @ t,
    "jvp of grad": lambda g, x, t: torch.func.jvp(torch.func.grad(g), (x,), (t,))[1],
    "grad of jvp": lambda g, x, t: torch.func.grad(lambda x: torch.func.jvp(g, (x,), (t,))[1])(x),
    "grad of grad": lambda g, x, t: torch.func.grad(lambda x: torch.func.grad(g)(x) @ t)(x),
    "autograd's": lambda g, x, t: torch.autograd.functional.hvp(g, x, t)[1],
    "dual of backward": lambda g, x, t: dual_level(
        lambda x: torch.autograd.grad(g(x), x)[0], x.clone().requires_grad_(), t
    ),
}


def assert_near(got: Tensor | None, expected: Tensor) -> None:
    assert got is not None
    assert got.dtype == torch.float32
    scale = expected.abs().max().clamp_min(1.0).item()
    torch.testing.assert_close(got.detach().double(), expected, atol=3e-4 * scale, rtol=0.0)


# Where first-order kernels refuse, and say that the reference does not.
REFUSING = (
    "jvp by two backward passes",
    "autograd's",
    "jacobian, vectorized",
    # vmap hides what requires a gradient: of arguments that have none.
    "backward of vmap",
    "backward of vmap of vmap",
)

Expected = Callable[[Truth, Tensor, Tensor], Tensor]


def check(name: str, way: str, expected: Expected, run: Callable[..., Any]) -> None:
    """Compare; an error where it may be one, and then not on the reference."""
    case = CASES[name]
    x, t, w, truth = drawn(name)
    given = case.function, x.float(), t.float(), w.float()
    try:
        got = run(*given)
    except RuntimeError as error:
        if way not in REFUSING or "backend='reference'" not in str(error):
            raise
        with select.backend("reference"):
            got = run(*given)
    assert_near(got, expected(truth, t, w))


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("name", CASES)
def test_no_tangent_vanishes(name: str, way: str) -> None:
    check(name, way, lambda r, t, w: r.jacobian @ t, lambda f, x, t, w: FORWARD[way](f, x, t))


@pytest.mark.parametrize("name", CASES)
def test_linearize_in_something_else(name: str) -> None:
    """The operation's own tensors are constants there, as start latents are of an action."""
    case = CASES[name]
    x = case.draw()
    y = case.function(x.float())
    u, t = torch.randn_like(y), torch.randn_like(y)
    value, tangent = torch.func.linearize(lambda u: case.function(x.float()) * u, u)
    assert_near(value, (y * u).double())
    assert_near(tangent(t), (y * t).double())


@pytest.mark.parametrize("way", REVERSE)
@pytest.mark.parametrize("name", CASES)
def test_no_gradient_is_lost(name: str, way: str) -> None:
    check(name, way, lambda r, t, w: w @ r.jacobian, lambda f, x, t, w: REVERSE[way](f, x, w))


@pytest.mark.parametrize("way", JACOBIANS)
@pytest.mark.parametrize("name", CASES)
def test_jacobians(name: str, way: str) -> None:
    check(name, way, lambda r, t, w: r.jacobian, lambda f, x, t, w: JACOBIANS[way](f, x))


@pytest.mark.parametrize("way", HESSIANS)
@pytest.mark.parametrize("name", CASES)
def test_hessians(name: str, way: str) -> None:
    def run(f: Function, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return HESSIANS[way](lambda x: (f(x) * w).sum(), x, t)

    check(name, way, lambda r, t, w: r.curvature, run)


# torch.compile around and inside transforms; with aot_eager, as it is about what is traced.
COMPILED: dict[str, Callable[[Function, Tensor, Tensor], Tensor | None]] = {
    "compile of jvp": lambda f, x, t: torch.compile(
        lambda x, t: torch.func.jvp(f, (x,), (t,))[1], backend="aot_eager"
    )(x, t),
    "dual level of compile": lambda f, x, t: dual_level(
        torch.compile(f, backend="aot_eager"), x, t
    ),
    "compile of dual level": lambda f, x, t: torch.compile(
        lambda x, t: dual_level(f, x, t), backend="aot_eager"
    )(x, t),
    "jvp of compile": lambda f, x, t: torch.func.jvp(
        torch.compile(f, backend="aot_eager"), (x,), (t,)
    )[1],
}


# An operator of lists and one of tensors in every way; two more of tensors, and an operation that
# has no operator, in two ways each.
COMPILED_CASES = [
    *((name, way) for name in ("simnorm", "mlp") for way in COMPILED),
    *(("layer_norm_act", way) for way in ("compile of jvp", "jvp of compile")),
    *(("two_hot_decode", way) for way in ("compile of dual level", "dual level of compile")),
    *(("mish", way) for way in ("compile of jvp", "dual level of compile")),
]


@pytest.mark.parametrize(("name", "way"), COMPILED_CASES)
def test_no_tangent_vanishes_in_compiled_code(name: str, way: str) -> None:
    """What torch itself cannot compile, it says."""
    try:
        check(name, way, lambda r, t, w: r.jacobian @ t, lambda f, x, t, w: COMPILED[way](f, x, t))
    except (RuntimeError, NotImplementedError) as error:
        assert any(part in str(error) for part in ("forward AD", "forward mode", "dynamo")), error
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("centre", [True, False])
def test_a_trace_holds_no_weights(centre: bool, mode: str) -> None:
    """Packs that are kept for frozen weights do not become constants of a graph."""
    backend = "torch" if native.why_missing() is not None else None
    case = CASES["flow_step"]
    x, other = case.draw().float(), case.draw(5).float()

    def call(x: Tensor) -> Tensor:
        with ops.algebra(centre=centre, fold=True):
            if backend is None:
                return case.function(x)
            with select.backend(backend):
                return case.function(x)

    call(x)
    with select.backend("reference"):
        expected = case.function(other.double())
    assert_near(make_fx(call, tracing_mode=mode)(x)(other), expected)


@pytest.mark.parametrize("name", [n for n in CASES if " 0" in n or " end" in n])
def test_slopes_of_a_trace_without_gradients(name: str) -> None:
    """A graph of inputs that required none is right where it is differentiated later."""
    case = CASES[name]
    x, _, w, truth = drawn(name)
    graph = make_fx(lambda x: case.function(x))(x.float())
    assert_near(backward(graph, x.float(), w.float()), w @ truth.jacobian)


ASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "simnorm": lambda x: ops.simnorm(x, backend="native"),
    "mlp": lambda x: ops.mlp([x], [Layer(torch.ones(3, 8))], backend="native"),
    "two_hot_decode": lambda x: ops.two_hot_decode(x, backend="native"),
    "layer_norm_act": lambda x: ops.layer_norm_act(
        x, torch.ones(8), torch.zeros(8), backend="native"
    ),
    "flow_step": lambda x: ops.flow_step(
        x,
        x[:, :2],
        [Layer(torch.ones(8, 11), None, torch.ones(8), torch.ones(8))],
        backend="native",
    ),
    "esnr": lambda x: ops.esnr(x, backend="native").ratio,
}
needs_native = pytest.mark.skipif(
    native.why_missing() is not None, reason=f"no native kernels: {native.why_missing()}"
)


@needs_native
@pytest.mark.parametrize("name", ASKED)
def test_who_asks_for_kernels_is_told(name: str) -> None:
    """By argument and by context; a dual level alone is no reason."""
    x, t, call = torch.randn(3, 8), torch.randn(3, 8), ASKED[name]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        with pytest.raises(select.BackendError, match="forward mode, which only the reference"):
            call(dual)
        call(x)
    with pytest.raises(select.BackendError, match="only the reference follows"):
        torch.func.linearize(call, x)
    with pytest.raises(select.BackendError, match="Named, which only the reference follows"):
        call(x.as_subclass(Named))  # type: ignore[arg-type]
    with pytest.raises(select.BackendError, match=r"torch\.jit, which only the reference"):
        torch.jit.trace(call, (x,))


def test_explain_knows_of_tangents() -> None:
    x, t = torch.randn(3, 8), torch.randn(3, 8)
    with forward_ad.dual_level():
        told = pwm_fast.explain(ops.simnorm, forward_ad.make_dual(x, t))
        assert told.backend == "reference"
        assert pwm_fast.explain(ops.simnorm, x).backend == pwm_fast.explain("simnorm", x).backend
        if native.why_missing() is None:
            assert pwm_fast.explain(ops.simnorm, x).backend == "native"
    assert pwm_fast.explain(ops.simnorm, x.as_subclass(Named)).backend == "reference"  # type: ignore[arg-type]


def test_operators_lose_no_tangent() -> None:
    """Nor do the operators below, in a backward pass of what was not differentiated forward."""
    x = torch.randn(3, 8, requires_grad=True)
    layers = [Layer(torch.randn(5, 8), act="mish")]
    y, w = ops.mlp([x], layers), torch.randn(3, 5)
    if y.grad_fn is None or native.why_missing() is not None:
        pytest.skip("no native kernels")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.autograd.grad(y, x, forward_ad.make_dual(w, w))


def test_streamed_estimates_have_no_derivative() -> None:
    """Of tangents, and inside transforms, an error; nothing is kept of them."""
    accumulator = ops.EsnrAccumulator()
    g = torch.randn(5)

    def update(x: Tensor) -> Tensor:
        accumulator.update([x])
        return x

    for transform in (
        lambda: torch.func.jvp(update, (g,), (g,)),
        lambda: torch.func.grad(lambda x: update(x).sum())(g),
        lambda: torch.vmap(update)(g[None]),
        lambda: dual_level(update, g, g),
    ):
        with pytest.raises(RuntimeError, match="EsnrAccumulator keeps no derivatives"):
            transform()
    assert accumulator.samples == 0
