"""Cached, batched decoding against the plain definition: re-run the whole text for every token, one row at a time.

Shape legend: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch

from fusiontree.generation.decoding import NewToken, generate
from fusiontree.generation.running_batch import pad_left, prefill
from fusiontree.generation.sampling import SamplingConfig, sample
from fusiontree.utils.errors import UserError
from tests.helpers import tiny_model
from tests.models.recording import SeenTensors, pretend_gpu, tensors_of

PATTERNS = ["FFF", "MMM", "AAA", "FMA", "MAMF"]
WINDOWS = [3, 64]
"""Smaller and larger than any text here."""
LONG = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 3, 2, 38, 4]
PROMPTS = [LONG, [1], [27, 18, 28, 18, 28], [7, 7, 7, 7, 7, 7, 7, 7, 7]]
SAMPLING = {
    "greedy": SamplingConfig(greedy=True),
    "drawn": SamplingConfig(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.2),
}


def by_full_forward(model, prompt, sampling, seed, count):
    """Tokens and log-probabilities by running the whole text again for every token, no cache, no padding."""
    text, tokens, logprobs = list(prompt), [], []
    for step in range(count):
        with torch.no_grad():
            logits_BV = model(torch.tensor([text])).logits_BSV[:, -1]
        seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
        seen_BV[0, text] = True
        token = int(sample(logits_BV, sampling, seen_BV=seen_BV, seeds=[seed], step=step)[0])
        logprobs.append(float(logits_BV.double().log_softmax(-1)[0, token]))
        tokens.append(token)
        text.append(token)
    return tokens, logprobs


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(greedy=True),
        SamplingConfig(greedy=True, repetition_penalty=0.01),
        SamplingConfig(temperature=1e3),
        SamplingConfig(temperature=1e3, top_k=60),
        SamplingConfig(temperature=1e3, top_p=1.0, min_p=0.0),
    ],
)
def test_ids_without_a_token_are_never_drawn(sampling):
    model = tiny_model()
    never = [0, *range(5, 40), 63]
    rows = generate(model, PROMPTS, max_new_tokens=40, sampling=sampling, never=never, allow_longer=True).rows
    assert not {token for row in rows for token in row.tokens} & set(never)
    assert all(torch.tensor(row.logprobs).isfinite().all() for row in rows)


@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_decoding_draws_the_tokens_of_the_full_forward(pattern, window, how):
    """Faults of the first prototype: no cache after the prefill, history mask cut while decoding, padding misread."""
    model = tiny_model(layer_pattern=pattern, window_size=window)
    seeds = [5, 6, 7, 8]
    together = generate(model, PROMPTS, max_new_tokens=12, sampling=SAMPLING[how], seeds=seeds)
    for row, prompt in enumerate(PROMPTS):
        tokens, logprobs = by_full_forward(model, prompt, SAMPLING[how], seeds[row], 12)
        assert together.rows[row].tokens == tokens
        assert together.rows[row].logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("srte", ["none", "sincos", "learnable"])
def test_every_time_encoding_and_pyramidal_windows_decode_exactly(srte):
    model = tiny_model(srte_encoding=srte, attention_type="pyramidal", window_size=3, window_size_last=20)
    together = generate(model, PROMPTS, max_new_tokens=10, sampling=SAMPLING["drawn"])
    for row, prompt in enumerate(PROMPTS):
        assert together.rows[row].tokens == by_full_forward(model, prompt, SAMPLING["drawn"], row, 10)[0]


def test_a_row_gets_the_same_tokens_alone_and_in_any_batch():
    model = tiny_model(layer_pattern="FMA")
    seeds = [10, 11, 12, 13]
    together = generate(model, PROMPTS, max_new_tokens=15, sampling=SAMPLING["drawn"], seeds=seeds)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], max_new_tokens=15, sampling=SAMPLING["drawn"], seeds=[seeds[row]])
        assert alone.rows[0].tokens == together.rows[row].tokens
        assert alone.rows[0].logprobs == pytest.approx(together.rows[row].logprobs, abs=1e-4)
    order = [2, 0, 3]
    others = generate(
        model,
        [PROMPTS[i] for i in order],
        max_new_tokens=15,
        sampling=SAMPLING["drawn"],
        seeds=[seeds[i] for i in order],
    )
    assert [row.tokens for row in others.rows] == [together.rows[i].tokens for i in order]


def test_the_prefill_runs_once_and_every_later_step_feeds_one_token():
    """Fault of the first prototype: the prefill returned no cache, so each step paid for the whole text."""
    model = tiny_model()
    lengths = []
    model.register_forward_pre_hook(lambda module, args: lengths.append(tuple(args[0].shape)))
    generate(model, PROMPTS, max_new_tokens=5, sampling=SAMPLING["greedy"])
    assert lengths == [(4, len(LONG))] + [(4, 1)] * 4


def test_greedy_is_deterministic_and_takes_no_seed():
    model = tiny_model()
    first = generate(model, PROMPTS, max_new_tokens=8, sampling=SAMPLING["greedy"], seeds=[0, 1, 2, 3])
    second = generate(model, PROMPTS, max_new_tokens=8, sampling=SAMPLING["greedy"], seeds=[9, 8, 7, 6])
    assert [row.tokens for row in first.rows] == [row.tokens for row in second.rows]


def test_seeds_repeat_and_differ():
    model = tiny_model()
    drawn = [generate(model, [LONG], max_new_tokens=12, seeds=[seed]).rows[0].tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    both = generate(model, [LONG, LONG], max_new_tokens=12)
    assert both.rows[0].tokens != both.rows[1].tokens


@pytest.mark.parametrize("leaving", range(4))
def test_rows_that_stop_leave_and_change_nothing_for_the_others(leaving):
    model = tiny_model()
    sampling = SamplingConfig(temperature=2.0, repetition_penalty=2.0)
    free = generate(model, PROMPTS, max_new_tokens=16, sampling=sampling)
    stop = free.rows[leaving].tokens[2]
    batch_sizes = []
    model.register_forward_pre_hook(lambda module, args: batch_sizes.append(args[0].shape[0]))
    stopped = generate(model, PROMPTS, max_new_tokens=16, sampling=sampling, stop_tokens=[stop])
    for before, after in zip(free.rows, stopped.rows, strict=True):
        if stop in before.tokens:
            assert after.tokens == before.tokens[: before.tokens.index(stop) + 1]
            assert after.finish_reason == "stop_token"
        else:
            assert (after.tokens, after.finish_reason) == (before.tokens, "length")
    assert {row.finish_reason for row in stopped.rows} == {"stop_token", "length"}
    assert batch_sizes[-1] < batch_sizes[0] == 4


def decode(tokens: list[int]) -> str:
    return "".join(chr(ord("A") + token) for token in tokens)


def test_stop_strings_end_the_text_before_them():
    model = tiny_model()
    free = generate(model, PROMPTS, max_new_tokens=12, sampling=SAMPLING["drawn"], decode=decode)
    assert [row.text for row in free.rows] == [decode(row.tokens) for row in free.rows]
    stop = free.rows[0].text[4:7]
    stopped = generate(
        model, PROMPTS, max_new_tokens=12, sampling=SAMPLING["drawn"], decode=decode, stop_strings=[stop]
    )
    assert stopped.rows[0].text == free.rows[0].text[: free.rows[0].text.find(stop)]
    assert stopped.rows[0].tokens == free.rows[0].tokens[: len(stopped.rows[0].text) + 3]
    assert stopped.rows[0].finish_reason == "stop_string"


def test_the_text_leaves_out_the_stop_token():
    model = tiny_model()
    tokens = generate(model, [LONG], max_new_tokens=6, sampling=SAMPLING["greedy"]).rows[0].tokens
    row = generate(
        model, [LONG], max_new_tokens=6, sampling=SAMPLING["greedy"], stop_tokens=[tokens[2]], decode=decode
    ).rows[0]
    assert row.text == decode(row.tokens[:-1])
    assert len(row.logprobs) == len(row.tokens)


def test_streamed_pieces_are_the_result():
    model = tiny_model()
    pieces: list[NewToken] = []
    result = generate(model, PROMPTS, max_new_tokens=7, decode=decode, stop_strings=["QQ"], on_token=pieces.append)
    for index, row in enumerate(result.rows):
        own = [piece for piece in pieces if piece.row == index]
        assert [piece.token for piece in own] == row.tokens
        assert [piece.logprob for piece in own] == row.logprobs
        assert "".join(piece.text for piece in own) == row.text
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [row.finish_reason]
    assert result.prompt_tokens == sum(map(len, PROMPTS))
    assert result.new_tokens == sum(len(row.tokens) for row in result.rows)
    assert result.prefill_s > 0
    assert result.decode_s > 0


def test_the_repetition_penalty_counts_a_rows_own_tokens_and_not_the_padding():
    """Padding holds token 0; short prompts beside a long one draw it as readily as they do alone."""
    model = tiny_model()
    model.head.weight.data[0] *= 3  # a token that many rows draw
    penalty = SamplingConfig(greedy=True, repetition_penalty=3.0)
    prompts = [[token] for token in range(1, 64)]
    padded = generate(model, [LONG, *prompts], max_new_tokens=3, sampling=penalty)
    tokens = [row.tokens for row in padded.rows[1:]]
    assert tokens == [generate(model, [p], max_new_tokens=3, sampling=penalty).rows[0].tokens for p in prompts]
    assert any(0 in row for row in tokens)  # else the test would show nothing
    assert padded.rows[0].tokens == by_full_forward(model, LONG, penalty, 0, 3)[0]


def test_the_model_comes_back_in_the_mode_it_came_in_and_without_gradients():
    model = tiny_model()
    for mode in (True, False):
        model.train(mode)
        generate(model, [[1, 2]], max_new_tokens=2)
        assert model.training is mode
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_decode_in_their_dtype(dtype):
    """Fault of the first prototype: the time encoding made bf16 activations float32 and the next layer failed."""
    model = tiny_model().to(dtype)
    result = generate(model, PROMPTS, max_new_tokens=6, sampling=SAMPLING["greedy"])
    assert all(len(row.tokens) == 6 for row in result.rows)


def test_rows_too_long_for_the_model_are_refused_before_any_work():
    ran = []
    for srte in ("sincos", "learnable"):
        model = tiny_model(srte_encoding=srte, max_position_embeddings=20)
        model.register_forward_pre_hook(lambda module, args: ran.append(1))
        with pytest.raises(UserError, match=r"prompt 1 has 16 tokens and 5 new ones make 21.*20.*at most 4"):
            generate(model, [[1], LONG], max_new_tokens=5)
        assert not ran
    with pytest.raises(UserError, match="learnable"):
        generate(model, [LONG], max_new_tokens=5, allow_longer=True)
    assert not ran
    generate(model, [LONG], max_new_tokens=4)
    beyond = tiny_model(srte_encoding="sincos", max_position_embeddings=20)
    allowed = generate(beyond, [LONG], max_new_tokens=9, sampling=SAMPLING["greedy"], allow_longer=True)
    assert allowed.rows[0].tokens == by_full_forward(beyond, LONG, SAMPLING["greedy"], 0, 9)[0]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 64]], {}, "prompt 0 holds token 64.*ends at 63.*tokenizer"),
        ([[-1]], {}, "prompt 0 holds token -1"),
        ([[1]], {"stop_tokens": [65]}, "stop_tokens holds token 65"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_impossible_requests_are_one_clear_error(prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(tiny_model(), prompts, **{"max_new_tokens": 3, **options})


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        generate(tiny_model(), [[1]], max_new_tokens=1, seeds=[1, 2])
    with pytest.raises(ValueError, match="give decode"):
        generate(tiny_model(), [[1]], max_new_tokens=1, stop_strings=["x"])


def test_left_padding_ends_every_prompt_in_the_last_column():
    input_ids_BS, padding_mask_BS = pad_left([[1, 2, 3], [4]])
    assert input_ids_BS.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert padding_mask_BS.tolist() == [[True, True, True], [False, False, True]]


@pytest.mark.parametrize(("chunk", "window"), [(1, 4), (5, 1), (5, 4), (5, 60), (8, 4), (8, 60)])
@torch.inference_mode()
def test_prompts_in_chunks_fill_the_cache_of_one_pass(chunk, window):
    """Chunks that divide the prompt and those that do not; texts of unequal length are joined."""
    model = tiny_model(layer_pattern="FMA", window_size=window)
    prompts = [LONG + LONG[:7], [9, 8, 7], LONG]
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    cache, logits_BV = prefill(model, prompts, 40, chunk)
    hook.remove()
    assert max(seen) == chunk and sum(seen) == sum(map(len, prompts))
    whole, want_BV = prefill(model, prompts, 40, 1000)
    assert (cache.lengths, cache.columns) == (whole.lengths, whole.columns)
    torch.testing.assert_close(logits_BV, want_BV, atol=2e-5, rtol=0)
    for fixed in (False, True):
        if fixed:
            cache.fix(40)
        for tokens_B1 in torch.tensor([[[5], [6], [7]], [[1], [2], [3]]]):
            got, want = (model(tokens_B1, cache=kept).logits_BSV for kept in (cache, whole))
            torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("global_heads", "growth"), [(0, 1), (2, 4)])
@torch.inference_mode()
def test_a_longer_prompt_in_chunks_needs_no_larger_tensors(global_heads, growth):
    """Besides the cache. With global heads the CPU's mask has a chunk's queries and all keys; GPUs need no mask."""
    model = tiny_model(layer_pattern="FMA", global_heads=global_heads, max_position_embeddings=1024)

    def place(tensor):
        return tensor.untyped_storage().data_ptr()

    def largest(length, chunk):
        with SeenTensors() as seen:
            cache, _ = prefill(model, [[1] * length], length, chunk)
        cache.fix(length)
        kept = {place(t) for t in [*model.parameters(), *model.buffers(), *tensors_of(cache)]}
        return max(t.untyped_storage().nbytes() for _, t in seen.found if place(t) not in kept)

    assert largest(256, 32) <= growth * largest(64, 32)
    assert largest(256, 256) > 2 * largest(256, 32)


@torch.inference_mode()
def test_prompts_that_fit_together_share_a_forward():
    model = tiny_model(layer_pattern="FMA")
    prompts = [LONG, [9, 8, 7], [5] * 4, LONG[:6], [3]]
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    cache, logits_BV = prefill(model, prompts, 40, 14)
    hook.remove()
    assert seen == [(1, 14), (1, 2), (2, 4), (2, 6)]
    whole, want_BV = prefill(model, prompts, 40, 1000)
    torch.testing.assert_close(logits_BV, want_BV, atol=2e-5, rtol=0)
    got, want = (model(torch.ones(5, 1, dtype=torch.int64), cache=kept).logits_BSV for kept in (cache, whole))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_chunks_draw_the_tokens_of_one_pass():
    model = tiny_model(layer_pattern="FMA")
    results = [generate(model, PROMPTS, max_new_tokens=9, prefill_chunk=size).rows for size in (4, 4096)]
    assert [row.tokens for row in results[0]] == [row.tokens for row in results[1]]
    with pytest.raises(UserError, match="prefill_chunk is 0"):
        generate(model, PROMPTS, max_new_tokens=9, prefill_chunk=0)


@pytest.mark.parametrize("how", SAMPLING)
def test_replayed_steps_draw_the_same_tokens_while_rows_finish_at_different_times(how, monkeypatch):
    model = tiny_model(layer_pattern="FMA")
    prompts = [*PROMPTS, [11, 12], [5, 6, 7, 8, 9, 10]]
    seeds = list(range(len(prompts)))

    def run(stop):
        return generate(
            model, prompts, max_new_tokens=40, sampling=SAMPLING[how], seeds=seeds, stop_tokens=stop, graphs=True
        )

    free = run([])
    # Tokens that end rows early, in the middle and never; the last step may be any row's.
    stop = sorted({row.tokens[at] for row, at in zip(free.rows[:4], (1, 3, 9, 20), strict=True)})
    eager = run(stop)
    assert eager.graphed_steps == 0
    assert len({len(row.tokens) for row in eager.rows}) >= 3
    recorded = pretend_gpu(monkeypatch)
    replayed = run(stop)
    for want, got in zip(eager.rows, replayed.rows, strict=True):
        assert (got.tokens, got.finish_reason) == (want.tokens, want.finish_reason)
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
    assert len(recorded) == 1 and replayed.graphed_steps == max(len(row.tokens) for row in eager.rows) - 1
    assert generate(model, prompts, max_new_tokens=40, graphs=False).graphed_steps == 0


def test_few_tokens_are_decoded_eagerly(monkeypatch):
    pretend_gpu(monkeypatch)
    model = tiny_model()
    counts = [generate(model, PROMPTS, max_new_tokens=n, graphs=True).graphed_steps for n in (1, 16, 17)]
    assert counts == [0, 0, 16]
