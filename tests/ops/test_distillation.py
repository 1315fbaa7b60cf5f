"""Divergence from a teacher against its definition. Shape legend: N tokens, H and h channels, V vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fusiontree.ops.cross_entropy import TeacherOutput, linear_cross_entropy, linear_distillation


def values(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels_N = torch.tensor([3, -100, 0, 11, 7, -100, 5])
    return {
        "hidden": draw(7, 6),
        "weight": draw(12, 6),
        "teacher_hidden": draw(7, 4),
        "teacher_weight": 2 * draw(12, 4),
        "labels": labels_N,
    }


def by_definition(v: dict[str, torch.Tensor], temperature: float) -> tuple[torch.Tensor, ...]:
    valid_N = v["labels"] >= 0
    student_NV = (v["hidden"] @ v["weight"].t())[valid_N]
    teacher_NV = (v["teacher_hidden"] @ v["teacher_weight"].t())[valid_N]
    loss = F.cross_entropy(student_NV, v["labels"][valid_N], reduction="sum")
    divergence = F.kl_div(
        (student_NV / temperature).log_softmax(-1),
        (teacher_NV / temperature).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    return loss, student_NV.logsumexp(-1).square().sum(), divergence * temperature**2


def teacher_of(v: dict[str, torch.Tensor], temperature: float, rows: slice = slice(None)) -> TeacherOutput:
    return TeacherOutput(v["teacher_hidden"], v["teacher_weight"][rows], temperature)


def with_gradients(v: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.clone().requires_grad_(name in ("hidden", "weight")) for name, t in v.items()}


def backward(sums: tuple[torch.Tensor, ...]) -> None:
    sum(factor * total for factor, total in zip((0.3, 0.2, 0.7), sums, strict=True)).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [3, 100])
def test_sums_and_gradients_are_those_of_the_definition(temperature: float, chunk: int) -> None:
    mine, theirs = with_gradients(values()), with_gradients(values())
    expected = by_definition(theirs, temperature)
    found = linear_distillation(
        mine["hidden"], mine["weight"], teacher_of(mine, temperature), mine["labels"], chunk_tokens=chunk
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    backward(found)
    backward(expected)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(mine[name].grad, theirs[name].grad)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_shards_of_the_vocabulary_give_the_same(temperature: float) -> None:
    whole = with_gradients(values())
    expected = by_definition(whole, temperature)
    backward(expected)
    shards, parts = [slice(0, 5), slice(5, 12)], []

    def of_rank(v: dict[str, torch.Tensor], rows: slice, gather: Any) -> tuple[torch.Tensor, ...]:
        teacher = teacher_of(v, temperature, rows)
        return linear_distillation(
            v["hidden"], v["weight"][rows], teacher, v["labels"], vocab_start=rows.start, gather_parts=gather
        )

    for rows in shards:  # what each rank gives to the gather
        of_rank(values(), rows, lambda part: parts.append(part) or torch.stack([part]))
    grads = []
    for rows in shards:
        mine = with_gradients(values())
        found = of_rank(mine, rows, lambda part: torch.stack(parts))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        backward(found)
        grads.append((mine["hidden"].grad, mine["weight"].grad))
    torch.testing.assert_close(grads[0][0] + grads[1][0], whole["hidden"].grad)
    torch.testing.assert_close(grads[0][1] + grads[1][1], whole["weight"].grad)


def test_a_model_that_equals_its_teacher_has_no_divergence() -> None:
    v = with_gradients(values(torch.float32))
    itself = TeacherOutput(v["hidden"].detach(), v["weight"].detach(), 2.0)
    loss, z, divergence = linear_distillation(v["hidden"], v["weight"], itself, v["labels"])
    plain = linear_cross_entropy(v["hidden"], v["weight"], v["labels"])
    torch.testing.assert_close((loss, z), plain)
    assert divergence.abs() < 1e-5
    divergence.backward()
    assert v["hidden"].grad.abs().max() < 1e-6 and v["weight"].grad.abs().max() < 1e-6
