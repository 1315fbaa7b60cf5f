"""Decoding with the cache equals the full forward. Shape legend: B rows, S tokens, V vocabulary."""

from __future__ import annotations

import pytest
import torch

from fusiontree.models.cache import DecodeCache
from fusiontree.ops.documents import Documents
from tests.helpers import tiny_model
from tests.models.test_padding import LENGTHS, pad, texts
from tests.models.variants import VARIANTS


def tokens(rows, length):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(2))


def in_pieces(model, input_ids_BS, pieces, cache=None):
    """Logits of consecutive pieces, each continuing the cache."""
    cache = cache or model.new_cache(input_ids_BS.shape[0])
    outputs, start = [], 0
    for piece in pieces:
        out = model(input_ids_BS[:, start : start + piece], cache=cache)
        assert out.cache is cache
        outputs.append(out.logits_BSV)
        start += piece
    assert start == input_ids_BS.shape[1]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("kind", VARIANTS)
@torch.no_grad()
def test_token_by_token_equals_the_full_forward(kind):
    model = tiny_model(**VARIANTS[kind])
    input_ids_BS = tokens(2, 24)
    full = model(input_ids_BS).logits_BSV
    assert full.std() > 0.3
    for pieces in ([1] * 24, [10] + [1] * 14, [2, 9, 1, 1, 6, 5]):
        torch.testing.assert_close(in_pieces(model, input_ids_BS, pieces), full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", VARIANTS)
@torch.no_grad()
def test_prompts_padded_on_the_left_decode_as_alone(kind):
    model = tiny_model(**VARIANTS[kind])
    input_ids_BS, mask_BS = pad("left", width=20)
    following_BS = tokens(len(LENGTHS), 15)
    cache = model.new_cache(len(LENGTHS), 35)
    prefill = model(input_ids_BS, padding_mask_BS=mask_BS, cache=cache)
    pieces = [1] * 8 + [3] + [1] * 4
    decoded = in_pieces(model, following_BS, pieces, cache)
    assert cache.lengths == [length + 15 for length in LENGTHS] == cache.positions_B.tolist()
    for row, text in enumerate(texts()):
        alone = model(torch.cat([text, following_BS[row]])[None]).logits_BSV[0]
        torch.testing.assert_close(prefill.logits_BSV[row, mask_BS[row]], alone[: len(text)], atol=1e-4, rtol=0)
        torch.testing.assert_close(decoded[row], alone[len(text) :], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_prefill_fills_every_cache():
    """Fault of the first prototype: the cache was missing after the prefill."""
    model = tiny_model(layer_pattern="FMA", window_size=5)
    out = model(tokens(2, 9), cache=model.new_cache(2))
    cache = out.cache
    assert not cache.is_empty and cache.lengths == [9, 9]
    for letter, layer in zip("FMA", cache.layers, strict=True):
        assert ("mamba" not in layer) == (letter == "A")
        assert ("attention" not in layer) == (letter == "M")
        if "mamba" in layer:
            conv_x, conv_bc, state = layer["mamba"].previous()
            assert conv_x.shape == (2, 3, 64) and conv_bc.shape == (2, 3, 64)
            assert state.shape == (2, 8, 8, 16) and state.dtype == torch.float32 and bool(state.abs().sum() > 0)
        if "attention" in layer:
            assert sorted(layer["attention"].local.kept.positions_BT[0].tolist()) == [4, 5, 6, 7, 8]
            assert layer["attention"].everything.kept.positions_BT[0].tolist() == list(range(9))


@torch.no_grad()
def test_tokens_outside_the_window_still_reach_global_heads_and_state():
    """Fault of the first prototype: the history was cut while decoding."""
    for pattern in ("AA", "MM"):
        model = tiny_model(layer_pattern=pattern, window_size=2, srte_encoding="none")
        first, other = tokens(1, 20), tokens(1, 20)
        other[0, 0] = (other[0, 0] + 1) % 64
        logits = [in_pieces(model, ids, [10] + [1] * 10)[0, -1] for ids in (first, other)]
        assert (logits[0] - logits[1]).abs().max() > 1e-3


@torch.no_grad()
def test_rows_can_be_selected_reordered_and_repeated():
    model = tiny_model(layer_pattern="FMA")
    input_ids_BS, mask_BS = pad("left")
    cache = model.new_cache(len(LENGTHS))
    model(input_ids_BS, padding_mask_BS=mask_BS, cache=cache)
    rows = [3, 0, 0]
    chosen = cache.select(torch.tensor(rows))
    following_BS = tokens(3, 6)
    decoded = in_pieces(model, following_BS, [1] * 6, chosen)
    assert chosen.lengths == [LENGTHS[row] + 6 for row in rows]
    assert cache.lengths == LENGTHS  # the original is left as it was
    for slot, row in enumerate(rows):
        alone = model(torch.cat([texts()[row], following_BS[slot]])[None]).logits_BSV[0, -6:]
        torch.testing.assert_close(decoded[slot], alone, atol=1e-4, rtol=0)
    again = in_pieces(model, tokens(4, 2), [1, 1], cache)
    for row, text in enumerate(texts()):
        alone = model(torch.cat([text, tokens(4, 2)[row]])[None]).logits_BSV[0, -2:]
        torch.testing.assert_close(again[row], alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_caches_of_texts_of_any_length_are_joined():
    model = tiny_model(window_size=16)
    texts_S = [tokens(1, length) for length in (3, 5, 9)]  # rings of different numbers of slots, below the window
    caches = [model.new_cache(1) for _ in texts_S]
    for text_1S, cache in zip(texts_S, caches, strict=True):
        model(text_1S, cache=cache)
    following_BS = tokens(len(texts_S), 6)
    decoded = in_pieces(model, following_BS, [1] * 6, DecodeCache.join(caches))
    for row, text_1S in enumerate(texts_S):
        alone = model(torch.cat([text_1S[0], following_BS[row]])[None]).logits_BSV[0]
        torch.testing.assert_close(decoded[row], alone[-6:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_local_cache_does_not_grow_and_the_global_one_grows_by_doubling():
    model = tiny_model(layer_pattern="A", window_size=4)
    cache = model.new_cache(1)
    sizes = set()
    for _ in range(40):
        model(tokens(1, 1), cache=cache)
        attention = cache.layers[0]["attention"]
        sizes.add(attention.everything._buffer.k_BTKD.shape[1])
        assert attention.local.kept.k_BTKD.shape[1] <= 4
    assert len(sizes) <= 7
    roomy = model.new_cache(1, 40)
    model(tokens(1, 1), cache=roomy)
    assert roomy.layers[0]["attention"].everything._buffer.k_BTKD.shape[1] == 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_caches_hold_half_precision_and_an_fp32_state(dtype):
    model = tiny_model(layer_pattern="FMA").to(dtype)
    cache = model.new_cache(1)
    full = model(tokens(1, 12)).logits_BSV
    decoded = in_pieces(model, tokens(1, 12), [5] + [1] * 7, cache)
    assert decoded.dtype == dtype
    assert cache.layers[0]["attention"].local.kept.k_BTKD.dtype == dtype
    assert cache.layers[0]["mamba"].previous()[2].dtype == torch.float32
    torch.testing.assert_close(decoded, full, atol=0.1, rtol=0.1)


def test_gradients_flow_within_a_piece_and_not_into_the_cache():
    model = tiny_model()
    cache = model.new_cache(1)
    model(tokens(1, 5), cache=cache)
    loss = model(tokens(1, 4), labels_BS=tokens(1, 4), cache=cache).loss_sum
    loss.backward()
    assert model.embed.weight.grad is not None
    model(tokens(1, 1), labels_BS=tokens(1, 1), cache=cache).loss_sum.backward()


def test_logits_of_the_last_tokens_alone():
    model = tiny_model()
    ids = tokens(2, 9)
    full = model(ids).logits_BSV
    for kept, expected in ((2, full[:, -2:]), (0, full[:, 9:]), (12, full)):
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits_BSV, expected)


def test_misuse_of_a_cache_is_refused():
    model = tiny_model()
    input_ids_BS, mask_BS = pad("right")
    with pytest.raises(ValueError, match="padded on the left"):
        model(input_ids_BS, padding_mask_BS=mask_BS, cache=model.new_cache(4))
    with pytest.raises(ValueError, match="holds 3 rows and the input 4"):
        model(input_ids_BS, cache=model.new_cache(3))
    with pytest.raises(ValueError, match="packed rows"):
        model(input_ids_BS, documents=Documents.whole(4, 19), cache=model.new_cache(4))
    cache = model.new_cache(4)
    model(input_ids_BS, cache=cache)
    input_ids_BS, mask_BS = pad("left")
    with pytest.raises(ValueError, match="forward that fills a cache"):
        model(input_ids_BS, padding_mask_BS=mask_BS, cache=cache)


@torch.no_grad()
def test_pads_leave_nothing_in_the_cache():
    model = tiny_model(layer_pattern="F", window_size=8)
    cache = model.new_cache(2)
    mask_BS = torch.tensor([[True] * 6, [False] * 4 + [True] * 2])
    model(tokens(2, 6), padding_mask_BS=mask_BS, cache=cache)
    conv_x, conv_bc, _ = cache.layers[0]["mamba"].previous()
    for inputs_BKC in (conv_x, conv_bc):
        assert not inputs_BKC[1, 0].any() and bool(inputs_BKC[1, 1:].any(1).all()) and bool(inputs_BKC[0].any(1).all())
    attention = cache.layers[0]["attention"]
    assert attention.local.kept.positions_BT[1].tolist() == [0, 1, -1, -1, -1, -1]
    assert attention.everything.kept.positions_BT[1].tolist() == [-1, -1, -1, -1, 0, 1]
