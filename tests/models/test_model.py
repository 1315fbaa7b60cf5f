"""The model as a whole. Shape legend: L layers, B rows, S tokens, V vocabulary."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fusiontree.models.initialization import initialize_model
from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.documents import Documents
from tests.helpers import tiny_config, tiny_model
from tests.models.variants import VARIANTS


def tokens(rows=2, length=13, seed=0):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_loss_sums_are_those_of_the_logits():
    model = tiny_model()
    ids, labels_BS = tokens(), tokens(seed=1)
    labels_BS[0, :4] = -100
    logits = model(ids).logits_BSV
    out = model(ids, labels_BS=labels_BS)
    assert out.logits_BSV is None and out.loss_sum.dtype == torch.float32
    expected = F.cross_entropy(logits.flatten(0, 1), labels_BS.flatten(), reduction="sum")
    assert float(out.loss_sum) == pytest.approx(float(expected), rel=1e-5)
    z = logits.logsumexp(-1).square()[labels_BS >= 0].sum()
    assert float(out.z_sum) == pytest.approx(float(z), rel=1e-5)


@pytest.mark.parametrize("kind", VARIANTS)
def test_gradients_flow_into_every_parameter(kind):
    model = tiny_model(**VARIANTS[kind])
    out = model(tokens(), labels_BS=tokens(seed=1))
    (out.loss_sum + out.layer_sums.sums_LB["entropy"].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert bool(parameter.grad.abs().sum() > 0), name


def test_gate_sums_alone_train_the_gate():
    model = tiny_model()
    model(tokens()).layer_sums.sums_LB["gate"].sum().backward()
    assert bool(model.layers[0].gate.up.weight.grad.abs().sum() > 0)
    assert bool(model.layers[0].mamba.in_proj.weight.grad.abs().sum() > 0)


@torch.no_grad()
def test_every_token_sees_only_tokens_before_it():
    model = tiny_model(layer_pattern="FMA")
    ids = tokens(1, 20)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 64
    difference = (model(ids).logits_BSV - model(changed).logits_BSV).abs().amax(-1)[0]
    assert difference[:12].max() == 0
    assert difference[12:].min() > 1e-4


def test_branch_scales_multiply_each_rows_branch_outputs():
    model = tiny_model(num_layers=2)
    ids = tokens(3, 9)
    scale_LB2 = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [0.5, 2.0], [1.0, 0.0]]])
    out = model(ids, branch_scale_LB2=scale_LB2)

    def by_hooks(row):
        for layer, block in enumerate(model.layers):
            for branch, name in enumerate(("mamba", "attention")):
                factor = float(scale_LB2[layer, row, branch])
                handles.append(
                    getattr(block, name).register_forward_hook(
                        lambda module, args, value, factor=factor: factor * value
                    )
                )
        return model(ids[row : row + 1]).logits_BSV[0]

    plain = model(ids).logits_BSV
    for row in range(3):
        handles = []
        torch.testing.assert_close(out.logits_BSV[row], by_hooks(row), atol=1e-5, rtol=1e-5)
        for handle in handles:
            handle.remove()
        assert not torch.allclose(out.logits_BSV[row], plain[row], atol=1e-3)
    ones = model(ids, branch_scale_LB2=torch.ones(2, 3, 2)).logits_BSV
    assert torch.equal(ones, plain)


@torch.no_grad()
def test_scales_reach_the_branch_that_a_layer_has():
    model = tiny_model(layer_pattern="MA")
    scale_LB2 = torch.tensor([[[0.0, 7.0], [1.0, 7.0]], [[7.0, 1.0], [7.0, 0.0]]])
    inputs = []
    for block in model.layers:
        block.align.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    out = model(tokens(), branch_scale_LB2=scale_LB2)
    assert not inputs[0][0].any() and inputs[0][1].any()
    assert inputs[1][0].any() and not inputs[1][1].any()
    without = model(tokens()).logits_BSV
    assert not torch.allclose(out.logits_BSV, without, atol=1e-3)


def test_a_dropped_branch_still_runs_and_gets_zero_gradients():
    """A branch that is skipped instead would leave collectives waiting under a sharding engine."""
    model = tiny_model(num_layers=1)
    ran = []
    model.layers[0].mamba.register_forward_hook(lambda *_: ran.append(1))
    scale_LB2 = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    model(tokens(), labels_BS=tokens(seed=1), branch_scale_LB2=scale_LB2).loss_sum.backward()
    assert ran
    for name, parameter in model.layers[0].mamba.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert bool(model.layers[0].attention.q_proj.weight.grad.any())


def test_tied_head_is_the_embedding():
    tied, untied = tiny_model(tie_word_embeddings=True), tiny_model()
    assert tied.head.weight is tied.embed.weight
    assert "head.weight" not in dict(tied.named_parameters()) and "head.weight" in dict(untied.named_parameters())
    with torch.no_grad():
        copy = tiny_model()
        for name, parameter in tied.named_parameters():
            dict(copy.named_parameters())[name].copy_(parameter)
        copy.head.weight.copy_(tied.embed.weight)
        assert torch.equal(copy(tokens()).logits_BSV, tied(tokens()).logits_BSV)
    tied(tokens(), labels_BS=tokens(seed=1)).loss_sum.backward()
    copy(tokens(), labels_BS=tokens(seed=1)).loss_sum.backward()
    torch.testing.assert_close(tied.embed.weight.grad, copy.embed.weight.grad + copy.head.weight.grad)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_built_on_the_meta_device_is_the_same_model(tied):
    config = tiny_config(layer_pattern="FMA", srte_encoding="learnable", tie_word_embeddings=tied)
    with torch.device("meta"):
        late = FusionTreeModel(config)
    assert all(p.is_meta for p in late.parameters()) and not list(late.buffers())
    late.to_empty(device="cpu")
    assert (late.head.weight is late.embed.weight) == tied
    early = FusionTreeModel(config)
    initialize_model(late, seed=5)
    initialize_model(early, seed=5)
    assert torch.equal(late(tokens()).logits_BSV, early(tokens()).logits_BSV)


def test_checkpointed_blocks_give_the_same_gradients():
    def gradients(wrap):
        model = tiny_model(layer_pattern="FMA", srte_encoding="learnable")
        if wrap:
            for block in model.layers:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        packed = Documents.from_positions(torch.arange(13).expand(2, 13) % 7)
        out = model(tokens(), labels_BS=tokens(seed=1), documents=packed)
        (out.loss_sum + out.layer_sums.sums_LB["gate"].sum()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain = gradients(wrap=False)
    for name, grad in gradients(wrap=True).items():
        assert torch.equal(grad, plain[name]), name


def test_what_a_block_takes_and_returns_are_tensors_that_hooks_can_find():
    model = tiny_model(srte_encoding="learnable")
    seen = {}
    model.layers[0].register_forward_hook(lambda module, args, out: seen.update(args=args, out=out))
    model(tokens(), labels_BS=tokens(seed=1))
    needing = [
        t for t in torch.utils._pytree.tree_leaves(seen["args"]) if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    assert len(needing) == 2  # the residual stream and the learned time encoding
    outputs = torch.utils._pytree.tree_leaves(seen["out"])
    assert len(outputs) == 4 and all(isinstance(t, torch.Tensor) and t.requires_grad for t in outputs)


@pytest.mark.parametrize("kind", VARIANTS)
@torch.no_grad()
def test_float64_agrees_with_float32(kind):
    model = tiny_model(**VARIANTS[kind])
    single = model(tokens()).logits_BSV
    double = model.double()(tokens()).logits_BSV
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=2e-5, rtol=0)


def test_unknown_backends_are_named():
    from fusiontree.utils.errors import UserError

    model = tiny_model(kernels={"ssd": "mamba_ssm"})
    with pytest.raises(UserError, match="mamba_ssm"):
        model(tokens())
