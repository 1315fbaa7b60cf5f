"""Operations of a decoding step: the reference against its definition, and the sizes that the kernels are given.

The kernels themselves run in :mod:`tests.ops.interpreted_step`; the fused step of every kind of model is compared with
the full forward in :mod:`tests.models.test_fixed_cache`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusiontree.ops.step import Mix, Norm, Second, Shift, Weight, product

g = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def test_a_product_is_its_definition() -> None:
    x, w, norm, shift, add = draw(3, 8), draw(10, 8), draw(8), draw(1, 8), draw(3, 10)
    normed = x / (x.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * norm
    want = normed @ w.T + add
    want[:, :4] += shift @ w[:4].T
    got = product(x, Weight(w), norm=Norm(norm, 1e-5), shift=Shift(shift, 4), add_BN=add)
    torch.testing.assert_close(got, want)


def test_a_second_product_its_activation_and_the_mix() -> None:
    x, w, x2, w2, branches = draw(2, 6), draw(5, 6), draw(2, 14), draw(5, 7), draw(2, 10)
    logits = torch.tanh(x) @ w.T + (F.silu(x2[:, :7]) * x2[:, 7:]) @ w2.T
    gate = torch.sigmoid(logits)
    second = Second(x2, Weight(w2), "swiglu")
    wanted = {
        "both": gate * branches[:, :5] + (1 - gate) * branches[:, 5:],
        "first": gate * branches[:, :5],
        "second": (1 - gate) * branches[:, :5],
    }
    for given, want in wanted.items():
        seen = branches if given == "both" else branches[:, :5]
        out = torch.zeros(2, 9, dtype=torch.float64)
        got = product(x, Weight(w), activation="tanh", second=second, mixed=Mix(seen, given), out_BN=out[:, 2:7])  # type: ignore[arg-type]
        torch.testing.assert_close(got, want)
        assert torch.equal(out[:, 2:7], got) and not out[:, :2].any() and not out[:, 7:].any()


def test_weights_with_a_scale() -> None:
    values, scale, x = (
        torch.randint(-127, 128, (5, 8), generator=g, dtype=torch.int8),
        draw(5).float(),
        draw(2, 8).float(),
    )
    torch.testing.assert_close(product(x, Weight(values, scale)), x @ (values.float() * scale[:, None]).T)


def test_gradients_flow_through_the_reference() -> None:
    x, w = draw(2, 6).requires_grad_(), draw(5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: product(x, Weight(w), activation="gelu"), (x, w))


def test_keys_are_split_for_few_rows_only() -> None:
    pytest.importorskip("triton")
    from fusiontree.ops.step.attention_triton import parts_for

    assert parts_for(2, 32768) == 128
    assert parts_for(64, 32768) == 4
    assert parts_for(2, 100) == 1
    assert parts_for(4096, 32768) == 1


def test_programs_have_sizes_that_triton_takes() -> None:
    pytest.importorskip("triton")
    from fusiontree.ops.step.product_triton import _tile

    for rows in (1, 2, 3, 32, 200):
        for outputs, inputs in ((37, 24), (2048, 256), (50432, 2048), (14400, 8192)):
            tile = _tile(rows, outputs, inputs)
            sizes = [tile[name] for name in ("ROWS", "BN", "BK", "STATS")]
            assert all(size & (size - 1) == 0 for size in sizes)
            assert tile["dot"] is False or min(tile["ROWS"], tile["BN"], tile["BK"]) >= 16
            assert tile["ROWS"] * tile["BN"] * tile["BK"] <= 1 << 18


def test_kernels_start_early_on_hopper_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel waits if and only if it is launched early; what follows a join of streams is not."""
    pytest.importorskip("triton")
    from fusiontree.ops.step.early_start import _starts_early, early_start

    found = {}
    for capability in ((9, 0), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, seen=capability: seen)
        _starts_early.cache_clear()
        found[capability] = [early_start(torch.device("cuda", 0), follows) for follows in (True, False)]
    _starts_early.cache_clear()
    assert found[9, 0] == [(True, {"launch_pdl": True}), (True, {})]
    assert found[8, 0] == [(False, {})] * 2 == [early_start(torch.device("cpu"), follows) for follows in (True, False)]


def test_one_row_takes_enough_programs_for_a_large_gpu() -> None:
    pytest.importorskip("triton")
    from fusiontree.ops.step.product_triton import _tile

    for outputs, inputs in ((2048, 256), (2048, 4096), (4096, 4096), (4352, 2048), (14400, 2048)):
        assert outputs // _tile(1, outputs, inputs)["BN"] >= 256
