"""The world-model loss of windows and its gradients, without an autograd graph.

The passes are those of :func:`pwm_fast.ops.world_model_loss`, called one after another: programs of
MLPs and rollouts (:mod:`pwm_fast.fused.row_program`) and the cross-entropy's kernels, with the
arithmetic between them in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import DynamicsSpec, LayerParams, LayerSpec, split_params
from pwm_fast.fused import row_program
from pwm_fast.fused.blocked_mlp import Ready, Specs
from pwm_fast.fused.dynamics import dynamics_weights
from pwm_fast.fused.folded import folded
from pwm_fast.fused.rollout import rollout_backward, rollout_forward, takes_blocks

_LINEAR = LayerSpec("norm_act", "none", True, False, 8, 1e-5)


class Net(NamedTuple):
    """An MLP: what its layers do, and their tensors in the order of an op's flat list."""

    specs: Specs
    tensors: list[Tensor]

    @property
    def layers(self) -> list[LayerParams]:
        """The tensors, a layer each."""
        return split_params(self.specs, self.tensors)


class WindowNets(NamedTuple):
    """The networks of a world model.

    Attributes:
        encoder: takes an observation; without layers where latents are observations.
        dynamics: takes ``[z, a]``, of a flow ``[z, a, tau]``.
        reward: takes ``[z, a]``; logits of a two-hot code, or the reward alone.
        termination: takes ``[z, a]``, or None.
    """

    encoder: Net
    dynamics: Net
    reward: Net
    termination: Net | None

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, network after network."""
        return [x for net in self if net is not None for x in net.tensors]


class WindowOptions(NamedTuple):
    """What a loss depends on beside tensors.

    Attributes:
        dynamics: of the rollouts.
        spec: the same, encoded.
        teacher: paths of a flow start at encoded observations, and nothing is rolled out.
        start_grad: where the gradient towards a rolled-out start goes: ``rollout`` (through it),
            ``encoder`` (to the encoded observation of that step) or ``none`` (the first has one).
        drawn: number of windows, a batch's first, that are flow matching at drawn flow times. The
            others learn from the latents that were rolled out: all of them, of what is no flow.
        target_grad: the gradient reaches latents through a flow's target too.
        start_noise: standard deviation of noise on a path's start; None where each call gives it.
        gamma: discount of later steps, above 0.
        vmin: first centre of a two-hot reward head.
        vmax: last centre.
        symlog: the centres are in symlog space.
        weights: of the dynamics', the reward's and the termination's loss in the total.
    """

    dynamics: DynamicsSpec
    spec: str
    teacher: bool
    start_grad: str
    drawn: int
    target_grad: bool
    start_noise: float | None
    gamma: float
    vmin: float
    vmax: float
    symlog: bool
    weights: tuple[float, float, float]


class WindowSizes(NamedTuple):
    """H steps of B windows, of O, A and D numbers."""

    horizon: int
    batch: int
    obs: int
    action: int
    latent: int


class WindowResult(NamedTuple):
    """Scalars, the encoded successors ``[H, B, D]``, and a gradient for each tensor."""

    dynamics: Tensor
    reward: Tensor
    termination: Tensor | None
    target: Tensor
    total: Tensor
    grads: list[Tensor]


def _split_first(
    weight: Tensor, sizes: WindowSizes, flow: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The columns of the first weight that latent, action and flow time meet."""
    z, a, *tau = weight.split([sizes.latent, sizes.action, *([1] if flow else [])], 1)
    return z, a, tau[0].squeeze(1).contiguous() if tau else None


class _Moving(NamedTuple):
    """What a rollout takes of a network."""

    w_z: Tensor
    w_tau: Tensor | None
    params: list[Tensor]


def _moving(net: Net, what: DynamicsSpec, sizes: WindowSizes) -> _Moving:
    """Of the dynamics; a folded head is ``W1z W3`` and ``W1z b3`` beside itself."""
    w_z, _, w_tau = _split_first(net.tensors[0], sizes, what.timed)
    params = net.tensors[1 + net.specs[0].bias :]
    if not what.fold:
        return _Moving(w_z, w_tau, params)
    count = 1 + net.specs[-1].bias
    others, head = params[:-count], params[-count:]
    return _Moving(w_z, w_tau, [*others, *folded(w_z, *head), *head])


def _through_fold(
    moving: _Moving, what: DynamicsSpec, dw_z: Tensor, grads: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of ``W1z`` and of the network's own tensors, from those of :func:`_moving`'s."""
    if not what.fold:
        return dw_z, grads
    count = 1 + what.layers[-1].bias
    others, made, head = grads[: -2 * count], grads[-2 * count : -count], grads[-count:]
    weight, *bias = moving.params[-count:]
    dw_z = torch.addmm(dw_z, made[0], weight.t())
    if bias:
        dw_z.addr_(made[1], bias[0])
        head[1] = torch.addmv(head[1], moving.w_z.t(), made[1])
    return dw_z, [*others, torch.addmm(head[0], moving.w_z.t(), made[0]), *head[1:]]


def covers(kernels: Kernels, nets: WindowNets, options: WindowOptions, sizes: WindowSizes) -> bool:
    """Whether :class:`WindowGradients` takes these: all of it runs block of rows by block."""
    for net in nets:
        if net is None or not net.specs:
            continue
        first, *others = (p.weight for p in net.layers)
        # Actions and flow times beside the latent make no weight too wide for a core's caches.
        own = [first if net is nets.encoder else first[:, : sizes.latent], *others]
        at_drawn = sizes.horizon * options.drawn if net is nets.dynamics else 0
        for rows in {sizes.batch, sizes.horizon * sizes.batch, at_drawn or sizes.batch}:
            if not row_program.runs(kernels, own, net.specs, rows):
                return False
    what = options.dynamics
    rollout = dynamics_weights(what, *_moving(nets.dynamics, what, sizes))
    return what.layers[0].bias and takes_blocks(kernels, what, rollout, sizes.batch)


class WindowGradients:
    """Loss and gradients of windows of these sizes; parameters are read anew in every call.

    Args:
        kernels: that have row programs.
        rows_kernels: of the cross-entropy.
        nets: networks of the sizes that will be given (see :func:`covers`).
        options: what the loss depends on.
        sizes: of the windows.
    """

    def __init__(
        self,
        kernels: Kernels,
        rows_kernels: Any,
        nets: WindowNets,
        options: WindowOptions,
        sizes: WindowSizes,
    ) -> None:
        self._kernels, self._rows_kernels = kernels, rows_kernels
        self._options, self._sizes = options, sizes
        self._flow = options.dynamics.timed
        pair = (sizes.latent, sizes.action)

        def ready(net: Net | None, inputs: Sequence[int]) -> Ready | None:
            return Ready(kernels, inputs, net.specs, net.layers) if net and net.specs else None

        self._encoder = ready(nets.encoder, (sizes.obs,))
        self._velocity = ready(nets.dynamics, (*pair, 1)) if options.drawn else None
        self._reward = Ready(kernels, pair, nets.reward.specs, nets.reward.layers)
        self._termination = ready(nets.termination, pair)
        self._scalar_reward = nets.reward.layers[-1].weight.shape[0] == 1
        first = nets.dynamics.layers[0]
        _, w_a, _ = _split_first(first.weight, sizes, self._flow)
        self._hoisted = Ready(
            kernels, (sizes.action,), (_LINEAR,), [LayerParams(w_a, first.bias, None, None)]
        )
        # What an error weighs in the total, rounded once: all rows of a step have it in common.
        steps = torch.arange(sizes.horizon, dtype=torch.float64, device="cpu")
        discount = options.gamma**steps
        each = (discount / (sizes.horizon * sizes.batch)).unsqueeze(1)
        self._discount = discount.float()
        self._shares = [(weight * each).float() for weight in options.weights]
        self._dynamics_share = (options.weights[0] * 2.0 / sizes.latent * each).float()

    def _average(self, each: Tensor) -> Tensor:
        """The discounted mean of errors ``[H, B]``."""
        return (self._discount * each.mean(1)).sum() / self._sizes.horizon

    @torch.no_grad()
    def __call__(
        self,
        nets: WindowNets,
        obs: Tensor,
        action: Tensor,
        reward: Tensor,
        terminated: Tensor | None,
        tau: Tensor | None,
        noise: Tensor | None = None,
    ) -> WindowResult:
        """The loss of ``obs [H+1, B, O]``, ``action [H, B, A]``, ``reward`` and flags ``[H, B]``.

        ``tau [H, B]`` is drawn if it is None; ``noise`` is the standard deviation of that on
        starts, if the options leave it to the call.
        """
        options, sizes = self._options, self._sizes
        rows, (horizon, batch) = sizes.horizon * sizes.batch, sizes[:2]
        shape = (horizon, batch, sizes.latent)
        encoder = nets.encoder.tensors
        actions = action.reshape(rows, sizes.action)
        target = self._encode(obs[1:].flatten(0, 1), encoder, False)[0].view(shape)

        # Latents: of the rollout, or encoded ones. Flow matching does not need the last one.
        drawn = options.drawn
        steps = horizon - 1 if drawn == batch else horizon
        _, w_a, _ = _split_first(nets.dynamics.tensors[0], sizes, self._flow)
        hoisted = [w_a, nets.dynamics.tensors[1]]
        latents: Tensor | None = None
        c_kept: list[Tensor] = []
        through = options.start_grad == "rollout"
        if steps and not options.teacher:
            started = obs[:-1].flatten(0, 1) if options.start_grad == "encoder" else obs[0]
            encoded, kept = self._encode(started, encoder, True)
            z0 = encoded[:batch]
            moved = actions[: steps * batch]
            c, c_kept = self._hoisted.forward([moved], hoisted, len(moved), through, through)
            c = c.view(steps, batch, -1)
            moving = _moving(nets.dynamics, options.dynamics, sizes)
            latents, saved = rollout_forward(
                self._kernels, z0, c, *moving, options.spec, through, through
            )
            z = latents[:horizon]
        else:
            started = obs[:-1].flatten(0, 1)
            encoded, kept = self._encode(started, encoder, True)
            z = encoded.view(shape)

        # The dynamics' error, and what it asks of latents and velocity.
        share = self._dynamics_share.unsqueeze(-1)
        velocity_grads: list[Tensor] | None = None
        following_grad = None
        squares = []
        dz = z.new_zeros(()).expand(shape)
        if self._velocity is not None:
            origin, goal = z[:, :drawn], target[:, :drawn]
            if tau is None:
                tau = torch.rand(horizon, drawn, dtype=z.dtype, device=z.device)
            if noise is not None:
                spread = noise.expand(shape)[:, :drawn]
                origin = torch.addcmul(origin, torch.randn_like(origin), spread)
            elif options.start_noise:
                origin = torch.add(origin, torch.randn_like(origin), alpha=options.start_noise)
            time = tau[:, :drawn].reshape(horizon, drawn, 1)
            start, count = 1.0 - time, horizon * drawn
            path = (start * origin).add_(time * goal).reshape(count, -1)
            inputs = [path, action[:, :drawn].reshape(count, -1), time.reshape(count, 1)]
            params = nets.dynamics.tensors
            v, v_kept = self._velocity.forward(inputs, params, count, True, True)
            error = v.view(horizon, drawn, -1).add_(origin).sub_(goal)
            squares.append(error.square().mean(-1))
            dv = error * share
            needs = (True, False, False)
            (dpath, *_), found = self._velocity.backward(
                dv.view(count, -1), inputs, params, v_kept, needs, True
            )
            velocity_grads = [_tensor(g) for g in found]
            dfirst = _tensor(dpath).view(horizon, drawn, -1).mul_(start)
            if options.target_grad:
                dfirst = dfirst.add_(dv)
            dz = dfirst if drawn == batch else F.pad(dfirst, (0, 0, 0, batch - drawn))
        if drawn < batch:
            assert latents is not None
            error = latents[1:, drawn:] - target[:, drawn:]
            squares.append(error.square().mean(-1))
            following_grad = error * share
        dynamics_loss = self._average(torch.cat(squares, 1))

        # The heads.
        pair = [z.reshape(rows, sizes.latent), actions]
        logits, r_kept = self._reward.forward(pair, nets.reward.tensors, rows, True, True)
        reward_each, dlogits = self._reward_error(logits, reward.reshape(rows))
        reward_loss = self._average(reward_each.view(horizon, batch))
        given_back, reward_grads = self._reward.backward(
            dlogits, pair, nets.reward.tensors, r_kept, (True, False), True
        )
        dz = dz + _tensor(given_back[0]).view(shape)
        total = options.weights[0] * dynamics_loss + options.weights[1] * reward_loss
        termination_loss: Tensor | None = None
        termination_grads: list[Tensor | None] = []
        if self._termination is not None and nets.termination is not None:
            assert terminated is not None
            net = nets.termination.tensors
            ending, t_kept = self._termination.forward(pair, net, rows, True, True)
            flags = terminated.reshape(rows, 1)
            each = F.binary_cross_entropy_with_logits(ending, flags, reduction="none")
            termination_loss = self._average(each.view(horizon, batch))
            dending = torch.sigmoid(ending).sub_(flags).view(horizon, batch)
            dending = dending.mul_(self._shares[2]).view(rows, 1)
            given_back, termination_grads = self._termination.backward(
                dending, pair, net, t_kept, (True, False), True
            )
            dz = dz.add_(_tensor(given_back[0]).view(shape))
            total = total + options.weights[2] * termination_loss

        # Back through the rollout, and the encoder.
        if latents is not None and through:
            dlatents = dz
            if following_grad is not None:
                dlatents = torch.zeros_like(latents)
                dlatents[:horizon] = dz
                dlatents[1:, drawn:] += following_grad
                if self._flow and not options.target_grad:
                    dlatents[:horizon, drawn:] -= following_grad
            dz0, dc, dw_z, dw_tau, dparams = rollout_backward(
                self._kernels, dlatents, z0, *moving, saved, options.spec, True
            )
            _, (dw_a, dbias) = self._hoisted.backward(
                dc.flatten(0, 1), [moved], hoisted, c_kept, (False,), True
            )
            own = [*map(_tensor, dparams)]
            first, others = _through_fold(moving, options.dynamics, _tensor(dw_z), own)
            pieces = [first, _tensor(dw_a)]
            if dw_tau is not None:
                pieces.append(dw_tau.unsqueeze(1))
            dynamics_grads = [torch.cat(pieces, 1), _tensor(dbias), *others]
            if velocity_grads is not None:
                torch._foreach_add_(dynamics_grads, velocity_grads)
        else:
            alone = latents is not None and options.start_grad == "none"
            dz0 = dz[0] if alone else dz.reshape(rows, sizes.latent)
            assert velocity_grads is not None
            dynamics_grads = velocity_grads
        encoder_grads: list[Tensor | None] = []
        if self._encoder is not None:
            _, encoder_grads = self._encoder.backward(dz0, [started], encoder, kept, (False,), True)
        each_net = (encoder_grads, dynamics_grads, reward_grads, termination_grads)
        return WindowResult(
            dynamics_loss,
            reward_loss,
            termination_loss,
            target,
            total,
            [_tensor(g) for grads in each_net for g in grads],
        )

    def _encode(self, obs: Tensor, params: list[Tensor], save: bool) -> tuple[Tensor, list[Tensor]]:
        """Latents of observations ``[N, O]``, and what is kept for the way back."""
        if self._encoder is None:
            return obs, []
        return self._encoder.forward([obs], params, len(obs), save, save)

    def _reward_error(self, logits: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
        """The error of each row, and the gradient of the weighted loss towards the logits."""
        options, batch = self._options, self._sizes.batch
        share = self._shares[1].repeat(1, batch).view(-1)
        if self._scalar_reward:
            error = logits.squeeze(1) - reward
            return error.square(), (2.0 * error * share).unsqueeze(1)
        each, lse = torch.empty_like(reward), torch.empty_like(reward)
        k, span = self._rows_kernels, (options.vmin, options.vmax, options.symlog)
        k.two_hot_ce_fwd(logits, reward, each, lse, *span)
        dlogits = torch.empty_like(logits)
        k.two_hot_ce_bwd(share, logits, reward, lse, dlogits, *span)
        return each, dlogits


def _tensor(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
