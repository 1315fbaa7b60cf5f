"""The step of AdamW over many tensors against ``torch.optim.AdamW``, for gradients, states and copies of each dtype.

``tests/ops/interpreted_adamw.py`` runs the same comparison over the Triton kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.ops import adamw as operation
from fusiontree.ops.adamw import Constants, Parts, Update, adamw

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RATES = (0.01, 0.02, 0.005, 0.03)
GRADIENT_SCALES = (1.0, 3.0, 0.1, 1e-4)
DECAY = 0.25
CONSTANTS = Constants(0.9, 0.95, 1e-8)


@dataclass(frozen=True)
class Case:
    """A list of tensors and what their update reads and writes."""

    sizes: tuple[int, ...] = (5, 2048, 4096 + 7, 64)
    gradient: torch.dtype = F32
    copy: torch.dtype | None = None
    states: torch.dtype = F32
    constants: Constants = CONSTANTS
    divisor: float = 1.0
    skipped: tuple[int, ...] = ()
    """Steps whose norm is not finite."""
    missing: tuple[int, ...] = ()
    """Tensors without a gradient."""
    offset: int = 0
    """Elements before each gradient in its memory, so that its address is odd."""


CASES: dict[str, Case] = {
    "fp32": Case(),
    "bf16": Case(gradient=BF16, copy=BF16),
    "fp16 at a loss scale": Case(gradient=F16, copy=F16, divisor=1024.0),
    "fp32 sums, bf16 copies": Case(copy=BF16, divisor=2.5),
    "bf16 states": Case(gradient=BF16, states=BF16),
    "skipped": Case(gradient=BF16, copy=BF16, skipped=(0, 2)),
    "without a gradient": Case(gradient=BF16, copy=BF16, missing=(1, 3)),
    "odd addresses": Case(gradient=BF16, copy=BF16, offset=1),
    "other constants": Case(constants=Constants(0.0, 0.999, 1e-3)),
    "many tensors": Case(sizes=tuple(1 + number % 3 for number in range(150)), gradient=BF16, copy=BF16),
}
RESULTS = ("values", "mean", "square", "step", "copy")


def draw(size: int, number: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(size, generator=generator)


def gradients_of(case: Case, step: int, device: str = "cpu") -> list[Tensor | None]:
    """Gradients that are ``divisor`` times too large; the values are exact in the dtype after the division, too."""
    found: list[Tensor | None] = []
    for number, size in enumerate(case.sizes):
        values = (draw(size, number, step + 1) * GRADIENT_SCALES[step]).to(BF16).float() * case.divisor
        memory = torch.zeros(size + case.offset, dtype=case.gradient, device=device)
        memory[case.offset :] = values.to(case.gradient)
        found.append(None if number in case.missing else memory[case.offset :])
    return found


def parts_of(case: Case, device: str = "cpu") -> list[Parts]:
    """Every second tensor decays."""
    parts = []
    for number, size in enumerate(case.sizes):
        values = draw(size, number, 0).to(device)
        mean, square = (torch.zeros(size, dtype=case.states, device=device) for _ in range(2))
        copy = None if case.copy is None else values.to(case.copy)
        step = torch.zeros((), device=device)
        parts.append(Parts(values, mean, square, step, DECAY * (number % 2), copy))
    return parts


def ours(case: Case, backend: str = "reference", device: str = "cpu") -> list[Parts]:
    parts = parts_of(case, device)
    update = adamw(parts, case.constants, backend)
    divisor = torch.tensor(case.divisor, dtype=torch.float64, device=device)
    for step, rate in enumerate(RATES):
        norm = torch.tensor((math.inf, math.nan)[step % 3 // 2] if step in case.skipped else 2.0, device=device)
        update(gradients_of(case, step, device), torch.tensor(rate, device=device), divisor, norm.double())
    return parts


def torchs(case: Case, device: str = "cpu") -> list[Parts]:
    """What ``torch.optim.AdamW`` makes of fp32 gradients that were divided before."""
    parts = parts_of(case, device)
    beta1, beta2, eps = case.constants
    groups: list[Any] = [{"params": [its.values], "weight_decay": its.decay} for its in parts]
    optimizer = torch.optim.AdamW(groups, betas=(beta1, beta2), eps=eps, fused=True)
    for step, rate in enumerate(RATES):
        if step in case.skipped:
            continue
        for group in optimizer.param_groups:
            group["lr"] = rate
        for its, gradient in zip(parts, gradients_of(case, step, device), strict=True):
            its.values.grad = torch.zeros_like(its.values) if gradient is None else gradient.float() / case.divisor
        optimizer.step()
    found = []
    for its in parts:
        state = optimizer.state[its.values]
        copy = None if its.copy is None else its.values.to(its.copy.dtype)
        found.append(Parts(its.values, state["exp_avg"], state["exp_avg_sq"], state["step"], its.decay, copy))
    return found


def compare(case: Case, backend: str, device: str = "cpu", *, rounds: bool = True) -> list[tuple[str, float, float]]:
    """Name, greatest relative distance over all tensors, and bar of each result.

    ``rounds``: casts round to the nearest value, as everywhere but in Triton's interpreter.
    """
    found = []
    pairs = list(zip(ours(case, backend, device), torchs(case, device), strict=True))
    for name in RESULTS:
        both = [(getattr(mine, name), getattr(theirs, name)) for mine, theirs in pairs]
        if both[0][0] is None:
            continue
        far = [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in both]
        bar = 1e-9 if name == "step" else 2e-6 if case.states == F32 else 2e-2
        if name == "copy":  # where a value lies between two of the copy's type, it may go to either
            bar = 8e-3 if not rounds else 1e-3 if case.copy == BF16 else 1e-4
            if rounds:
                for mine, _ in pairs:
                    assert mine.copy is not None and torch.equal(mine.copy, mine.values.to(mine.copy.dtype))
        found.append((name, max(far), bar))
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_that_of_torch(name: str) -> None:
    wrong = [f"{what} is off by {error:.1e}" for what, error, bar in compare(CASES[name], "reference") if error >= bar]
    assert not wrong


def test_a_gradient_of_16_bits_is_read_as_it_is_and_stays() -> None:
    case = CASES["bf16"]
    parts = parts_of(case)
    gradients = gradients_of(case, 0)
    before = [None if gradient is None else gradient.clone() for gradient in gradients]
    adamw(parts, case.constants)(gradients, torch.tensor(0.1), torch.tensor(4.0), torch.tensor(1.0))
    for gradient, kept in zip(gradients, before, strict=True):
        assert gradient is not None and kept is not None and torch.equal(gradient, kept)


def test_tensors_that_cannot_be_updated_are_refused() -> None:
    its = parts_of(Case(sizes=(6,)))[0]
    with pytest.raises(ValueError, match=r"mean of tensor 1 has shape \(3, 2\) and strides \(1, 3\)"):
        adamw([its, its._replace(mean=torch.zeros(2, 3).t())], CONSTANTS)
    with pytest.raises(ValueError, match="copy of tensor 0 has shape"):
        adamw([its._replace(copy=torch.zeros(5, dtype=BF16))], CONSTANTS)
    with pytest.raises(ValueError, match=r"tensor 0 is torch\.bfloat16"):
        adamw([its._replace(values=its.values.bfloat16())], CONSTANTS)


def test_every_backend_is_named() -> None:
    assert list(operation.UPDATES.backends) == ["triton", "reference"]
    update: Update = adamw(parts_of(Case()), CONSTANTS)
    assert type(update).__name__ == "ReferenceUpdate"


def test_a_prepared_update_brings_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph can record it; the kernels themselves need a GPU or the interpreter."""
    kernels = pytest.importorskip("fusiontree.ops.adamw.triton")

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **settings: launched.append(grid[0])

    def refuse(values: Any) -> Tensor:
        raise RuntimeError("a copy to the device")

    launched: list[int] = []
    for name in ("_adamw_counts", "_adamw_update"):
        monkeypatch.setattr(kernels, name, Launch())
    case = CASES["without a gradient"]
    update = kernels.TritonUpdate(parts_of(case), case.constants)
    others, gradients = gradients_of(case, 0), gradients_of(case, 0)
    scalars = [torch.ones(()) for _ in range(3)]
    update.prepare(gradients)
    monkeypatch.setattr(update, "_on_device", refuse)
    update(gradients, *scalars)
    assert launched == [1, 1 + 3, 1 + 1]  # blocks of 2,048 elements with a gradient, and without
    with pytest.raises(RuntimeError, match="a copy to the device"):
        update(others, *scalars)
