"""The kernels of a decoding step by Triton's interpreter, beside the reference formulas and the model's forward.

``TRITON_INTERPRET=1 python -m tests.ops.interpreted_step`` prints one line a result: name, relative error, bar.
Names of parts behind it select them.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fusiontree.models.fused_step import FusedStep
from fusiontree.models.weight_only import quantize_weights
from fusiontree.ops import step as step_ops
from fusiontree.ops.attention import cached_attention
from fusiontree.ops.step import Mix, Norm, Second, Shift, Weight, attention_triton, product_triton, reference
from tests.helpers import tiny_model
from tests.models.variants import VARIANTS

_g = torch.Generator().manual_seed(0)
KINDS = {
    "ragged prompts": {"layer_pattern": "FMA", "window_size": 5},
    **{
        name: VARIANTS[name]
        for name in (
            *("no local heads", "limited steps", "swiglu, tied head", "global heads without rotation"),
            *("mean of normalized branches", "concatenated branches", "sum and MLP in turn"),
        )
    },
}  # fmt: skip


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_g)


def say(name: str, got: Tensor, want: Tensor, bar: float = 3e-6) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype, name
    error = float((got - want).double().norm() / want.double().norm().clamp(min=1e-9))
    print(f"{name} {error:.2e} {bar}", flush=True)


def products(*several: int) -> None:
    for rows in several or (2, 3):
        x, wide = draw(rows, 2 * 40 + 3)[:, : 2 * 40], Weight(draw(37, 40))
        few, other = x[:, :40], Second(draw(rows, 48), Weight(draw(37, 24)), "swiglu")
        branches = draw(rows, 2 * 37)
        cases = {
            "plain": {},
            "norm and shift": {"norm": Norm(draw(40), 1e-5), "shift": Shift(draw(1, 40), 22)},
            "gelu and residual": {"activation": "gelu", "add_BN": draw(rows, 74)[:, 37:]},
            "two": {"activation": "tanh", "second": other},
            "mix": {"activation": "tanh", "mixed": Mix(branches, "both")},
            "first": {"mixed": Mix(branches[:, :37], "first")},
            "second": {"mixed": Mix(branches[:, 37:], "second"), "out_BN": torch.zeros(rows, 80)[:, 40:77]},
        }
        for name, case in cases.items() if rows < 70 else [("two", cases["two"])]:
            say(
                f"product {rows} {name}",
                product_triton.product(few, wide, **case).clone(),
                reference.product(few, wide, **case),
            )
        small = Weight(torch.randint(-127, 128, (37, 40), generator=_g, dtype=torch.int8), draw(37).abs() / 100)
        case = {"second": Second(few, small), "norm": Norm(draw(40), 1e-5)}
        for name, weight in (("int8", small), ("dense and int8", wide)):
            got, want = (product(few, weight, **case) for product in (product_triton.product, reference.product))
            say(f"product {rows} {name}", got, want)
        say(
            f"product {rows} swiglu",
            product_triton.product(x, wide, activation="swiglu"),
            reference.product(x, wide, activation="swiglu"),
        )


def attention(*cases: tuple[int, int, int]) -> None:
    """Split keys: many parts, parts without keys, texts of unequal length, a window that has turned round."""
    width, group, window = 24, 2, 200
    for local_kv, global_kv, columns in cases or ((2, 1, 900),):
        kv, capacity = local_kv + global_kv, 1024
        qkv = draw(2, (group + 2) * kv * width)
        positions, column = torch.tensor([columns, max(columns - 30, 3)]), torch.tensor([columns])
        stores = []
        for heads, slots in ((local_kv, window), (global_kv, capacity)):
            k, v = (draw(2, heads, slots, width).transpose(1, 2) for _ in range(2))
            table = torch.full((2, slots), -1)
            for row in range(2):
                for p in range(int(positions[row])):
                    table[row, p % slots if slots == window else columns - int(positions[row]) + p] = p
            stores.append(attention_triton.Store(k, v, table) if heads else None)
        tables = torch.cos(draw(2, width // 2)), torch.sin(draw(2, width // 2))
        got = attention_triton.attend(
            qkv, tables, *stores, positions, column, heads=(group * kv, group), window=window, rotates_global=True
        )
        # The kernel stored the new keys and values; the definition reads them there.
        cos, sin = (t[:, None, None] for t in tables)
        first, second = qkv[:, : (group + 1) * kv * width].view(2, 1, -1, width).chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
        q, new_k = turned.split([group * kv, kv], dim=2)
        new_v = qkv[:, (group + 1) * kv * width :].view(2, -1, width)
        want, heads_before = [], 0
        for store, slots in zip(stores, (window, None), strict=True):
            if store is None:
                continue
            assert bool((store.positions_BT == positions[:, None]).any(1).all())
            heads = store.k_BTKD.shape[2] * group
            part = q[:, :, heads_before : heads_before + heads]
            at = (store.positions_BT == positions[:, None]).long().argmax(1)
            kv_heads = slice(heads_before // group, (heads_before + heads) // group)
            for row in range(2):
                torch.testing.assert_close(store.k_BTKD[row, at[row]], new_k[row, 0, kv_heads])
                assert torch.equal(store.v_BTKD[row, at[row]], new_v[row, kv_heads])
            seen = {"key_positions_BT": store.positions_BT, "query_positions_BS": positions[:, None], "window": slots}
            want.append(cached_attention(part, store.k_BTKD, store.v_BTKD, **seen).flatten(1))
            heads_before += heads
        say(f"attention {local_kv} {global_kv} {columns}", got, torch.cat(want, dim=1))


def whole_steps() -> None:
    """A fused step of every kernel against the model's forward on the same cache."""
    for kind, overrides in KINDS.items():
        for rows in (1, 3) if kind == "ragged prompts" else (1,):
            model = tiny_model(**overrides)
            ids, mask = torch.randint(1, 64, (rows, 9), generator=_g), torch.ones(rows, 9, dtype=torch.bool)
            mask[-1, : 4 if rows > 1 else 0] = False
            caches = [model.new_cache(rows) for _ in range(2)]
            for cache in caches:
                model(ids, padding_mask_BS=mask, cache=cache)
                cache.fix(20)
            step_ops.triton_unavailable = lambda device: "the forward comes first"  # type: ignore[attr-defined]
            following = torch.randint(1, 64, (rows, 2), generator=_g)
            want = [model(following[:, i : i + 1], cache=caches[0]).logits_BSV[:, -1] for i in range(2)]
            step_ops.triton_unavailable = lambda device: None  # type: ignore[attr-defined]
            step = FusedStep(model)
            got = [step(following[:, i : i + 1], caches[1]) for i in range(2)]
            say(f"step {kind} {rows}", torch.stack(got), torch.stack(want), 2e-5)


def quantized_step() -> None:
    model = tiny_model(layer_pattern="FA")
    quantize_weights(model, "int8")
    ids = torch.randint(1, 64, (1, 12), generator=_g)
    cache = model.new_cache(1)
    want = model(ids).logits_BSV[:, -1]
    model(ids[:, :11], cache=cache)
    cache.fix(16)
    say("step int8", FusedStep(model)(ids[:, 11:], cache), want, 2e-5)


def everything() -> None:
    products(2, 3, 70)  # elementwise, tensor cores, and more rows than a program takes
    attention((2, 1, 900), (2, 1, 40), (0, 2, 700), (1, 0, 0))
    whole_steps()
    quantized_step()


if __name__ == "__main__":
    parts = {"products": products, "attention": attention, "everything": everything}
    with torch.inference_mode():
        for name in sys.argv[1:] or ["everything"]:
            parts[name]()
