"""The scan's Triton kernels run by Triton's interpreter: ``TRITON_INTERPRET=1 python -m tests.ops.interpreted_ssd``.

Prints one line a result: its name, its relative error and the bar.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusiontree.ops.documents import Documents
from fusiontree.ops.halves import halves
from fusiontree.ops.ssd.reference import ScanInputs, ssd_reference
from fusiontree.ops.ssd.triton import ssd_triton

RESULTS = ("y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dinitial")
_WIDTH, _SIZE, _GROUPS = 16, 32, 2


def documents(length: int) -> Documents:
    """Both rows continue a document and start two more, one of them in the middle of a chunk."""
    positions = torch.arange(7, 7 + length).expand(2, -1).contiguous()
    for start in (length // 3, length // 2 + 1):
        positions[:, start:] = torch.arange(length - start)
    return Documents.from_positions(positions)


def case(
    name: str, heads: int, docs: Documents | None, exchanged: bool, decay: float, dtype: torch.dtype, length: int
) -> None:
    """Compare results and gradients in ``dtype`` with the plain formula's in float64."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = [draw(2, length, heads, _WIDTH), torch.nn.functional.softplus(draw(2, length, heads) - 3)]
    inputs += [-decay * (1 + torch.rand(heads, generator=g)), draw(2, length, _GROUPS, _SIZE)]
    inputs += [draw(2, length, _GROUPS, _SIZE), draw(heads), draw(2, heads, _WIDTH, _SIZE)]
    other, weight_y, weight_state = draw(2, heads, _WIDTH, _SIZE), draw(2, length, heads, _WIDTH), draw(_WIDTH, _SIZE)

    def exchange(reached: Tensor, kept: Tensor) -> Tensor:
        return other.to(reached.dtype) * kept[..., None, None] + 0.3 * reached.flip(1)

    def results(scan: Callable, of: torch.dtype) -> list[Tensor]:
        # Steps, decays and states are fp32 at least.
        kinds = [torch.promote_types(of, torch.float32) if i in (1, 2, 5, 6) else of for i in range(len(inputs))]
        leaves = [t.to(kind).requires_grad_() for t, kind in zip(inputs, kinds, strict=True)]
        begin = {"state_exchange": exchange} if exchanged else {"initial_state_BHPN": leaves[6]}
        y, state = scan(ScanInputs(*leaves[:6], chunk_size=64, documents=docs, **begin))
        loss = (y.double() * weight_y).sum() + (state.double() * weight_state).sum()
        return [y, state, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]

    bar = 1e-5 if dtype == torch.float32 else 3e-3
    formula = results(ssd_reference, torch.float64)
    for what, got, want in zip(RESULTS, results(ssd_triton, dtype), formula, strict=True):
        error = float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp(min=1e-9))
        print(f"{name}: {what} {error:.2e} {bar:.0e}", flush=True)


def halves_of_one_projection() -> None:
    """B and C are halves of one tensor, whose gradient is what the kernels wrote: print its distance from a copy."""
    x, dt, bc = torch.randn(2, 70, 4, _WIDTH), torch.rand(2, 70, 4), torch.randn(2, 70, 2 * _GROUPS * _SIZE)
    bc.requires_grad_()
    parts = halves(bc)
    seen: list[Tensor] = [bc, bc]
    parts[0].register_hook(lambda grad: seen.__setitem__(0, grad))
    parts[1].register_hook(lambda grad: seen.__setitem__(1, grad))
    B, C = (part.unflatten(-1, (_GROUPS, _SIZE)) for part in parts)
    y, _ = ssd_triton(ScanInputs(x, dt, -torch.rand(4), B, C, torch.rand(4), chunk_size=64))
    (found,) = torch.autograd.grad(y.square().sum(), bc)
    (first, second), place = seen, found.untyped_storage().data_ptr()
    assert {first.untyped_storage().data_ptr(), second.untyped_storage().data_ptr()} == {place}, "a gradient was copied"
    print(f"halves: dBC {float((found - torch.cat((first, second), -1)).norm()):.2e} 1e-9", flush=True)


if __name__ == "__main__":
    halves_of_one_projection()
    case("whole rows", 4, None, False, 8.0, torch.float32, 150)
    case("packed", 18, documents(150), False, 0.01, torch.float32, 150)  # the nine heads of a group are three programs
    case("exchange", 4, None, True, 0.01, torch.float32, 150)
    case("packed exchange", 4, documents(150), True, 0.01, torch.float32, 150)
    # What the exchange returns counts for nothing, what the piece reaches still does.
    case("exchange of whole rows", 2, Documents.whole(2, 70), True, 0.01, torch.float32, 70)
    case("short rows", 2, documents(5), False, 0.01, torch.float32, 5)
    case("half precision", 2, documents(260), False, 0.5, torch.float16, 260)
