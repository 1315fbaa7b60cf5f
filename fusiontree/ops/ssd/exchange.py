"""States that come from outside in the middle of a scan, forward and backward (plain PyTorch, any device).

A piece of a row adds ``S_c`` to the state in chunk c and keeps ``k_c`` of what was there: h_{c+1} = k_c h_c + S_c.
From zero it reaches z, and it keeps P = prod k_c of its initial state h_0 = E(z, P), where E is the caller's. With
g_c the gradient of h_c, the gradients that go into S_c obey the same recursion whether they come from the outputs or
through z, so one pass with d(final) + dz gives both. Only the decays need more: that pass reads h_c where the part
through z should read h_c without the initial state; the difference is P <dz, h_0> in every chunk's log decay, and P
itself adds P dP.

Shape legend: B rows, H heads, P channels of a head, N size of the state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Exchange:
    """One call of a ``state_exchange``, kept for its backward pass."""

    def __init__(self, state_exchange: Callable[[Tensor, Tensor], Tensor], z_BHPN: Tensor, decay_BH: Tensor) -> None:
        """Call ``state_exchange`` with what the piece reaches from zero and its total decay.

        What it saves for :meth:`backward` is kept as it is: that pass is one of its own inside the block's, and a
        recomputation of the block that it asked for would be a second one.
        """
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            self._z_BHPN = z_BHPN.detach().requires_grad_()
            self._decay_BH = decay_BH.detach().requires_grad_()
            self._initial_BHPN = state_exchange(self._z_BHPN, self._decay_BH)
        self.initial_BHPN = self._initial_BHPN.detach()

    def backward(self, grad_initial_BHPN: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``dz`` and what every chunk's log decay gets beside the usual pass, ``[B, H]``."""
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
