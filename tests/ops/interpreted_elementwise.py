"""The elementwise Triton kernels by Triton's interpreter, each result beside its reference formula's.

``TRITON_INTERPRET=1 python -m tests.ops.interpreted_elementwise`` prints one line a result: name, relative error, bar.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusiontree.ops.attention import merge_triton, split_causal
from fusiontree.ops.gate import reference as gate_reference
from fusiontree.ops.gate import triton as gate_triton
from fusiontree.ops.gelu import reference as gelu_reference
from fusiontree.ops.gelu import triton as gelu_triton
from fusiontree.ops.norm import reference as norm_reference
from fusiontree.ops.norm import triton as norm_triton
from fusiontree.ops.rotary import reference as rotary_reference
from fusiontree.ops.rotary import triton as rotary_triton

_g = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_g)


def say(name: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        error = float((mine - theirs).double().norm() / theirs.double().norm().clamp(min=1e-9))
        print(f"{name} {index} {error:.2e} 2e-06", flush=True)


def norms() -> None:
    y, z, w, dout = draw(2, 20, 2 * 48)[..., :48], draw(2, 20, 48), draw(48), draw(2, 20, 48)
    leaves = [t.detach().clone().requires_grad_() for t in (y, z, w)]
    plain = [norm_reference.rms_norm(leaves[0], leaves[2], 1e-5)]
    plain += torch.autograd.grad(plain[0], (leaves[0], leaves[2]), dout)
    fast = [norm_triton.rms_norm_triton(leaves[0], leaves[2], 1e-5)]
    fast += torch.autograd.grad(fast[0], (leaves[0], leaves[2]), dout)
    say("norm", fast, plain)
    grads = (dout, draw(2, 20, 48))
    plain = [*norm_reference.residual_rms_norm(leaves[0] + 0, leaves[2], 1e-5)]
    plain += torch.autograd.grad(plain, (leaves[0], leaves[2]), grads)
    fast = [*norm_triton.residual_rms_norm_triton(leaves[0] + 0, leaves[2], 1e-5)]
    fast += torch.autograd.grad(fast, (leaves[0], leaves[2]), grads)
    say("residual norm", fast, plain)
    for used in ((True, True), (False, True), (False, False)):
        grads = [draw(2, 20, 2 * 48)[..., 48:] if use else None for use in used]
        grads.append(draw(2, 20, 48))
        results = []
        for norm in (norm_triton.residual_rms_norm_triton, norm_reference.residual_rms_norm):
            outputs = norm(leaves[0] + 0, leaves[2], 1e-5, 2)
            pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
            used_outputs, given = ([pair[i] for pair in pairs] for i in (0, 1))
            wanted = (leaves[0], leaves[2])
            found = torch.autograd.grad(used_outputs, wanted, given, allow_unused=True, materialize_grads=True)
            results.append([*outputs, *found])
        say(f"residual norm of two uses {used}", *results)
    settings = {"groups": 2, "eps": 1e-5}
    plain = [norm_reference.gated_rms_norm(*leaves, **settings)]
    plain += torch.autograd.grad(plain[0], leaves, dout)
    fast = [norm_triton.gated_rms_norm_triton(*leaves, **settings)]
    fast += torch.autograd.grad(fast[0], leaves, dout)
    say("gated norm", fast, plain)


def gates() -> None:
    for kind, width in (("both", 2), ("first", 1), ("second", 1)):
        for padded in (False, True):
            counted = torch.rand(2, 9, generator=_g) > 0.3 if padded else None
            inputs = (4 * draw(2, 9, 40), draw(2, 9, 40 * width), counted)
            name = f"gate {kind} {padded}"
            say(name, gate_triton.mix_and_sums(*inputs, kind), gate_reference.mix_and_sums(*inputs, kind))
            grads = (draw(2, 9, 40), draw(2), draw(2), draw(2))
            fast, plain = gate_triton.gradients(*inputs, grads, kind), gate_reference.gradients(*inputs, grads, kind)
            say(f"{name} gradient", fast, plain)


def gelus() -> None:
    for count in (37, 5000):  # less than one program, and a last program that is not full
        x, dy = 3 * draw(1, 1, count), draw(1, 2, count)[:, 1:]
        say(f"gelu {count}", gelu_triton.again_and_gradient(x, dy), gelu_reference.again_and_gradient(x, dy))


def rotations() -> None:
    q, k = draw(2, 37, 6 * 24 + 5)[..., : 6 * 24].unflatten(-1, (6, 24)), draw(2, 37, 3, 24)
    for rows in (1, 2):
        positions = torch.arange(37).repeat(rows, 1)
        positions[-1, 11:] -= 11
        tables = rotary_reference.rotary_tables(positions, 24, 1e4)
        for first in ((4, 2), (6, 3), (0, 0)):  # local and global heads, or those of one kind
            fast, plain = (
                [part for pair in rotate.rotate_and_cut(q, k, *tables, first) for part in pair]
                for rotate in (rotary_triton, rotary_reference)
            )
            assert [part.shape for part in fast] == [part.shape for part in plain]
            say(f"rotation {rows} {first}", [p for p in fast if p.numel()], [p for p in plain if p.numel()])
            parts = [part + 1 for part in plain]
            say(
                f"rotation back {rows} {first}",
                rotary_triton.rotate_back(*parts, *tables),
                rotary_reference.rotate_back(*parts, *tables),
            )


def merges() -> None:
    outputs = [draw(2, 70, 3, 24).transpose(1, 2) for _ in range(2)]  # in memory as cuDNN leaves them
    lses = [3 * draw(2, 3, 70, 1) for _ in range(2)]
    say("merge", merge_triton.merged(*outputs, *lses), split_causal._merged(*outputs, *lses))


if __name__ == "__main__":
    norms()
    gates()
    gelus()
    rotations()
    merges()
