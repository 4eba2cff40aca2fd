"""MLPs layer by layer, of sizes that are known: what calls that are like each other have to do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.fused.mlp import mlp_forward
from pwm_fast.fused.mlp_backward import mlp_backward


class ReadyLayers:
    """See :class:`pwm_fast.fused.blocked_mlp.Ready`: the same of layers that are too wide for it.

    Args:
        kernels: that run it, in fp32.
        spec: what each layer does, as text; none drops out.
        params: tensors of these sizes, on the device of all calls.
    """

    def __init__(self, kernels: Kernels, spec: str, params: Sequence[Tensor]) -> None:
        self._kernels, self._spec = kernels, spec
        self._shapes = [p.shape for p in params]
        first = params[0]
        self._dtype, self._device = first.dtype, first.device
        self.members = first.shape[0] if first.dim() == 3 else 0

    def forward(
        self, inputs: list[Tensor], params: list[Tensor], rows: int, save: bool, wgrad: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """``[rows, N]``, or ``[E rows, N]`` of an ensemble, and what a backward pass needs.

        Raises:
            ValueError: a tensor is not as the sizes say, on the device, and of the dtype.
        """
        if [p.shape for p in params] != self._shapes:
            raise ValueError(f"expected parameters of shapes {self._shapes}")
        for x in (*inputs, *params):
            if x.dtype != self._dtype or x.device != self._device:
                raise ValueError(f"expected {self._dtype} on {self._device}")
        if any(x.shape[0] != rows for x in inputs):
            raise ValueError(f"expected {rows} rows")
        return mlp_forward(self._kernels, inputs, params, [], self._spec, save, wgrad)

    def saved(self, kept: list[Tensor], rows: int, wgrad: bool) -> list[Tensor]:
        """What was kept, as the operator returns it."""
        return kept

    def backward(
        self,
        dy: Tensor,
        inputs: list[Tensor],
        params: list[Tensor],
        kept: list[Tensor],
        needs: tuple[bool, ...],
        wgrad: bool,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients towards the inputs that ``needs`` names, and the parameters' if ``wgrad``."""
        spec = self._spec
        return mlp_backward(self._kernels, dy, inputs, params, [], kept, [*needs], spec, wgrad)
