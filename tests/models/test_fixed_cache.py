"""A fixed cache decodes as any other, and its step can be recorded once and replayed.

Shape legend: B rows, S tokens.
"""

from __future__ import annotations

import math

import pytest
import torch

from fusiontree.models.cuda_graph import GraphedStep
from fusiontree.models.fused_step import FusedStep, join_weights, prepare
from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.dispatch import Backend, anywhere
from fusiontree.ops.elementwise import ELEMENTWISE
from tests.helpers import tiny_config, tiny_model
from tests.models.recording import SeenTensors, pretend_gpu, tensors_of
from tests.models.test_decoding import tokens
from tests.models.test_padding import LENGTHS, pad, texts
from tests.models.variants import VARIANTS

STEPS = 14


def filled(model, columns=None):
    """A cache of four ragged texts, and the token that each goes on with at every step."""
    input_ids_BS, mask_BS = pad("left")
    cache = model.new_cache(len(LENGTHS), columns)
    model(input_ids_BS, padding_mask_BS=mask_BS, cache=cache)
    return cache, tokens(len(LENGTHS), STEPS)


def expected(model, following_BS):
    """Logits after each of the following tokens, every row computed alone and whole."""
    logits = []
    for text, following_S in zip(texts(), following_BS, strict=True):
        alone = model(torch.cat([text, following_S])[None]).logits_BSV[0]
        logits.append(alone[len(text) :])
    return torch.stack(logits)


@pytest.mark.parametrize("how", ["eager", "replayed", "fused", "fused, replayed"])
@pytest.mark.parametrize("kind", VARIANTS)
@torch.no_grad()
def test_steps_of_a_fixed_cache_equal_the_full_forward(kind, how, monkeypatch):
    pretend_gpu(monkeypatch)
    model = tiny_model(**VARIANTS[kind])
    cache, following_BS = filled(model)
    want = expected(model, following_BS)
    columns = cache.columns
    cache.fix(columns + STEPS)
    places = [tensor.data_ptr() for tensor in tensors_of(cache)]
    if "fused" in how:
        prepare(model)
    step = GraphedStep(model, cache) if "replayed" in how else None
    for i in range(STEPS):
        tokens_B1 = following_BS[:, i : i + 1]
        if step:
            logits_BV = step(tokens_B1)
        elif model.fused_step:
            logits_BV = model.fused_step(tokens_B1, cache)
        else:
            logits_BV = model(tokens_B1, cache=cache).logits_BSV[:, -1]
        torch.testing.assert_close(logits_BV, want[:, i], atol=1e-4, rtol=0)
    assert [tensor.data_ptr() for tensor in tensors_of(cache)] == places
    assert cache.lengths == [length + STEPS for length in LENGTHS] == cache.positions_B.tolist()
    assert cache.columns == columns + STEPS == int(cache.column_1)


@torch.no_grad()
def test_a_mixer_without_a_step_runs_its_blocks_forward(monkeypatch, caplog):
    model = tiny_model(layer_pattern="FMA")
    cache, following_BS = filled(model)
    want = expected(model, following_BS)
    monkeypatch.setattr("fusiontree.models.mixers.mamba2.Mamba2Mixer.step_projections", lambda mixer: ())
    cache.fix(cache.columns + 1)
    prepare(model)
    assert not caplog.records  # no step is recorded on this device
    monkeypatch.setattr("fusiontree.models.fused_step.recordable", lambda device: True)
    prepare(model)
    assert "ordinary forward of layers 0, 1: a mixer has no fused step" in caplog.text
    assert [block.fuses_mixers for block in model.fused_step.blocks] == [False, False, True]
    torch.testing.assert_close(model.fused_step(following_BS[:, :1], cache), want[:, 0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_fused_step_shares_the_models_memory_and_leaves_its_values():
    model, same = (tiny_model(layer_pattern="FMA") for _ in range(2))
    step = FusedStep(model)
    for (name, after), before in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(after, before), name
    mamba = model.layers[0].mamba
    joined = join_weights(mamba.in_proj, mamba.bc_proj).values_NK
    assert joined.untyped_storage().data_ptr() == mamba.bc_proj.weight.untyped_storage().data_ptr()
    again = FusedStep(model)  # copies nothing
    for old, new in zip(step.blocks, again.blocks, strict=True):
        assert old._projections.values_NK.data_ptr() == new._projections.values_NK.data_ptr()
    assert [block.fuses_mixers for block in step.blocks] == [True] * 3


@pytest.mark.parametrize("window", [4, 60])
@torch.no_grad()
def test_rows_of_a_fixed_cache_can_be_selected_and_more_room_made(window, monkeypatch):
    pretend_gpu(monkeypatch)
    model = tiny_model(layer_pattern="FMA", window_size=window)
    cache, following_BS = filled(model)
    want = expected(model, following_BS)
    cache.fix(cache.columns + 5)
    for i in range(5):
        model(following_BS[:, i : i + 1], cache=cache)
    rows = [3, 1]
    chosen = cache.select(rows)
    with pytest.raises(ValueError, match="and is full"):
        model(following_BS[rows, 5:6], cache=chosen)
    chosen.fix(chosen.columns + STEPS)
    step = GraphedStep(model, chosen)
    for i in range(5, STEPS):
        torch.testing.assert_close(step(following_BS[rows, i : i + 1]), want[rows, i], atol=1e-4, rtol=0)
    assert cache.lengths == [length + 5 for length in LENGTHS]
    cache.fix(cache.columns + 1)
    got = model(following_BS[:, 5:6], cache=cache).logits_BSV[:, -1]
    torch.testing.assert_close(got, want[:, 5], atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [4, 60])
@torch.no_grad()
def test_a_rehearsal_changes_nothing_that_later_steps_read(window):
    """It shares keys and values with the cache and writes where the next step writes."""
    model = tiny_model(layer_pattern="FMA", window_size=window)
    cache, following_BS = filled(model)
    want = expected(model, following_BS)
    cache.fix(cache.columns + STEPS)
    for i in range(STEPS):
        for _ in range(2):
            trial = cache.rehearsal()
            model(tokens(len(LENGTHS), 1), cache=trial)
            assert trial.lengths == [length + 1 for length in cache.lengths]
        got = model(following_BS[:, i : i + 1], cache=cache).logits_BSV[:, -1]
        torch.testing.assert_close(got, want[:, i], atol=1e-4, rtol=0)


@torch.no_grad()
def test_misuse_of_a_fixed_cache_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="after the forward that fills it"):
        model.new_cache(1).fix(10)
    cache, following_BS = filled(model)
    with pytest.raises(ValueError, match="cannot be fixed at 3"):
        cache.fix(3)
    with pytest.raises(ValueError, match=r"call cache\.fix first"):
        GraphedStep(model, cache)
    cache.fix(cache.columns + 1)
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        GraphedStep(model, cache)
    with pytest.raises(ValueError, match="one token per row and step, not 2"):
        model(following_BS[:, :2], cache=cache)
    model(following_BS[:, :1], cache=cache)
    with pytest.raises(ValueError, match="and is full"):
        model(following_BS[:, 1:2], cache=cache)


@pytest.mark.parametrize(
    ("problem", "expected_error", "words"),
    [
        (lambda x: x.sum().item(), RuntimeError, "_local_scalar_dense cannot be part of a graph.*--no-graphs"),
        (lambda x: [][0], RuntimeError, "list index out of range.*--no-graphs"),
        (lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")), torch.OutOfMemoryError, "no room"),
    ],
)
@torch.no_grad()
def test_a_step_that_cannot_be_recorded_leaves_the_cache_usable(problem, expected_error, words, monkeypatch):
    pretend_gpu(monkeypatch)
    model = tiny_model(layer_pattern="FA")
    cache, following_BS = filled(model)
    want = expected(model, following_BS)
    cache.fix(cache.columns + STEPS)
    before = torch.cuda.current_stream()
    rehearsals = []

    def fail_when_recorded(module, inputs, output):
        rehearsals.append(module)
        if len(rehearsals) == 3:
            problem(output)

    hook = model.norm.register_forward_hook(fail_when_recorded)
    with pytest.raises(expected_error, match=words):
        GraphedStep(model, cache)
    hook.remove()
    assert torch.cuda.current_stream() is before
    for step in (None, GraphedStep(model, cache)):
        at = cache.lengths[0] - LENGTHS[0]
        tokens_B1 = following_BS[:, at : at + 1]
        got = step(tokens_B1) if step else model(tokens_B1, cache=cache).logits_BSV[:, -1]
        torch.testing.assert_close(got, want[:, at], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", VARIANTS)
@torch.inference_mode()
def test_a_step_off_the_cpu_brings_nothing_from_it_and_copies_no_keys(kind):
    """The meta device takes the place of a GPU: it mixes with no tensor of the host, and has no values to read."""
    length, columns = 20, 2300
    with torch.device("meta"):
        model = FusionTreeModel(tiny_config(**{**VARIANTS[kind], "max_position_embeddings": columns}))
    model.bfloat16().eval()
    ids_BS = torch.zeros(2, length, dtype=torch.int64, device="meta")
    cache = model.new_cache(2, columns)
    model(ids_BS, cache=cache, logits_to_keep=1)
    cache.fix(columns)
    with SeenTensors() as seen:
        logits_BSV = model(ids_BS[:, :1], cache=cache).logits_BSV
    assert logits_BSV.dtype == torch.bfloat16
    assert not [name for name, tensor in seen.found if tensor.device.type != "meta"]
    kept = [layer["attention"].everything._buffer for layer in cache.layers if "attention" in layer]
    keys = min((buffer.k_BTKD.numel() for buffer in kept if buffer), default=math.inf)
    assert keys > columns
    assert not [name for name, tensor in seen.found if tensor.dtype == torch.float32 and tensor.numel() >= keys]


def test_recording_compiles_nothing_that_the_rehearsals_did_not(monkeypatch):
    """torch cannot compile during a capture, and would if the recorded step's tensors differed in kind."""
    functions = {}

    def compiled(formula):
        if formula not in functions:
            functions[formula] = torch.compile(formula, backend=counting)
        return functions[formula]

    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setitem(ELEMENTWISE.backends, "reference", Backend("reference", lambda: compiled, anywhere))
    ELEMENTWISE.choose.cache_clear()
    torch._dynamo.reset()
    try:
        model = tiny_model(layer_pattern="FA").eval()
        with torch.inference_mode():
            for rows in (3, 1):
                cache = model.new_cache(rows)
                model(tokens(rows, 9), cache=cache)
                cache.fix(20)
                before = len(graphs)
                model(tokens(rows, 1), cache=cache.rehearsal())
                rehearsed = len(graphs)
                model(tokens(rows, 1), cache=cache)
                assert before < rehearsed == len(graphs)
    finally:
        ELEMENTWISE.choose.cache_clear()
        torch._dynamo.reset()
