"""State exchange in the middle of a scan, forward and backward (plain PyTorch, any device).

Scan chunk c multiplies the state by ``k_c`` and adds ``S_c``: h_{c+1} = k_c h_c + S_c. A scan from zero ends in z, and
all chunks together multiply the initial state by P = prod k_c. The caller's function E computes the initial state
h_0 = E(z, P). Let g_c be the gradient of h_c. Gradients of S_c from the outputs and gradients of S_c through z obey the
same recursion, so one backward scan with d(final) + dz gives their sum. Only the decays need a correction: this scan
uses h_c, but the gradient through z should use h_c without the initial state. The difference is P <dz, h_0> in every
chunk's log decay; in addition, P contributes P dP.

Shape legend: B rows, H heads, P channels of a head, N size of the state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Exchange:
    """One call of a ``state_exchange``, with its graph for the backward pass."""

    def __init__(self, state_exchange: Callable[[Tensor, Tensor], Tensor], z_BHPN: Tensor, decay_BH: Tensor) -> None:
        """Call ``state_exchange`` with the final state of a scan from zero and the total decay.

        Tensors that it saves for :meth:`backward` are kept, not recomputed: :meth:`backward` runs a separate backward
        pass inside that of the block, and would trigger a second recomputation of the block.
        """
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            self._z_BHPN = z_BHPN.detach().requires_grad_()
            self._decay_BH = decay_BH.detach().requires_grad_()
            self._initial_BHPN = state_exchange(self._z_BHPN, self._decay_BH)
        self.initial_BHPN = self._initial_BHPN.detach()

    def backward(self, grad_initial_BHPN: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``dz`` and the correction to the gradient of every chunk's log decay, ``[B, H]``."""
        if not self._initial_BHPN.requires_grad:
            return torch.zeros_like(self._z_BHPN), torch.zeros_like(self._decay_BH)
        dz, dP = torch.autograd.grad(
            self._initial_BHPN,
            (self._z_BHPN, self._decay_BH),
            grad_initial_BHPN.to(self._initial_BHPN.dtype),
            allow_unused=True,
            materialize_grads=True,
        )
        through_initial_BH = (dz * self.initial_BHPN).sum((-2, -1))
        return dz, self._decay_BH.detach() * (dP - through_initial_BH)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
