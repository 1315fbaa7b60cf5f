"""The mixer against another implementation of Mamba-2, and the precision of its state space parameters.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusiontree.models.initialization import initialize_parameter
from fusiontree.models.mixers.base import MixerInputs
from fusiontree.models.mixers.mamba2 import Mamba2Mixer, SSMParameters
from tests.helpers import tiny_config, tiny_model


def mixer_pair(n_groups: int):
    """Our mixer and transformers' with the same weights; theirs packs z, x, B, C, dt in one projection."""
    mamba2 = pytest.importorskip("transformers.models.mamba2")
    config = tiny_config(mamba={"n_groups": n_groups, "chunk_size": 8})
    theirs = mamba2.modeling_mamba2.Mamba2Mixer(
        mamba2.Mamba2Config(
            hidden_size=config.hidden_size,
            num_heads=config.mamba_heads,
            head_dim=config.mamba.head_dim,
            state_size=config.mamba.d_state,
            n_groups=n_groups,
            expand=config.mamba.expand,
            conv_kernel=config.mamba.d_conv,
            chunk_size=config.mamba.chunk_size,
            num_hidden_layers=1,
            layer_norm_epsilon=config.norm_eps,
            use_conv_bias=True,
            use_bias=False,
        ),
        layer_idx=0,
    )
    # Their norm has as many groups as B and C have; older releases normalise all channels together.
    norm_groups = config.d_inner // getattr(theirs.norm, "group_size", config.d_inner)
    config = tiny_config(mamba={"n_groups": n_groups, "norm_groups": norm_groups, "chunk_size": 8})
    ours = Mamba2Mixer(config)
    for name, parameter in ours.named_parameters():
        values = initialize_parameter(f"layers.0.mamba.{name}", parameter.shape, config, seed=3)
        if parameter.ndim == 2 and "conv" not in name:
            values *= 3
        if name.endswith("bias") or name.endswith("norm.weight"):
            values += 0.2 * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
        parameter.data = values
    z, x, dt = ours.in_proj.weight.split([config.d_inner, config.d_inner, config.mamba_heads])
    with torch.no_grad():
        theirs.in_proj.weight.copy_(torch.cat([z, x, ours.bc_proj.weight, dt]))
        theirs.conv1d.weight.copy_(torch.cat([ours.conv_x.weight, ours.conv_bc.weight])[:, None])
        theirs.conv1d.bias.copy_(torch.cat([ours.conv_x.bias, ours.conv_bc.bias]))
        theirs.A_log.copy_(ours.ssm.A_log)
        theirs.D.copy_(ours.ssm.D)
        theirs.dt_bias.copy_(ours.ssm.dt_bias)
        theirs.norm.weight.copy_(ours.norm.weight)
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
    return config, ours, theirs


@pytest.mark.parametrize("n_groups", [1, 2])
def test_outputs_and_gradients_equal_transformers_mixer(n_groups):
    config, ours, theirs = mixer_pair(n_groups)
    generator = torch.Generator().manual_seed(0)
    u_BSC = torch.randn(2, 21, config.hidden_size, generator=generator)
    probe_BSC = torch.randn(2, 21, config.hidden_size, generator=generator)
    inputs = [u_BSC.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(inputs[0], MixerInputs()), theirs(inputs[1])]
    outputs = [out[0] if isinstance(out, tuple) else out for out in outputs]
    assert outputs[0].std() > 0.1
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    for out in outputs:
        (out * probe_BSC).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-4)
    z, x, dt = ours.in_proj.weight.grad.split([config.d_inner, config.d_inner, config.mamba_heads])
    pairs = [
        (torch.cat([z, x, ours.bc_proj.weight.grad, dt]), theirs.in_proj.weight.grad),
        (torch.cat([ours.conv_x.weight.grad, ours.conv_bc.weight.grad])[:, None], theirs.conv1d.weight.grad),
        (torch.cat([ours.conv_x.bias.grad, ours.conv_bc.bias.grad]), theirs.conv1d.bias.grad),
        (ours.ssm.A_log.grad, theirs.A_log.grad),
        (ours.ssm.D.grad, theirs.D.grad),
        (ours.ssm.dt_bias.grad, theirs.dt_bias.grad),
        (ours.norm.weight.grad, theirs.norm.weight.grad),
        (ours.out_proj.weight.grad, theirs.out_proj.weight.grad),
    ]
    for own, other in pairs:
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_space_parameters_stay_fp32_when_the_model_is_converted(dtype):
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".ssm." in name}
    model.to(dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".ssm." in name else dtype), name
        if ".ssm." in name:
            assert torch.equal(parameter, before[name])  # never rounded on the way
    assert model(torch.tensor([[1, 2, 3]])).logits_BSV.dtype == dtype
    assert model.double().layers[0].mamba.ssm.A_log.dtype == torch.float64


def test_forward_sees_fp32_even_if_an_engine_casts_the_parameters():
    ssm = SSMParameters(4)
    for parameter in ssm.parameters():
        parameter.data = torch.full((4,), 0.5, dtype=torch.bfloat16)
    values = ssm(torch.zeros(1, 2, 4, dtype=torch.bfloat16))
    assert {value.dtype for value in values} == {torch.float32}
    torch.testing.assert_close(values.A_H, -torch.exp(torch.full((4,), 0.5)))


def test_the_scan_is_a_method_that_can_be_replaced():
    config, mixer, _ = mixer_pair(1)
    u_BSC = torch.randn(1, 6, config.hidden_size)
    seen = {}

    def double(x_BSHP, ssm, B_BSGN, C_BSGN, documents, initial_state_BHPN=None):
        seen.update(x=x_BSHP, dt=ssm.dt_BSH, A=ssm.A_H)
        return 2 * x_BSHP, initial_state_BHPN

    mixer.scan = double
    mixer(u_BSC, MixerInputs())
    assert seen["x"].shape == (1, 6, config.mamba_heads, config.mamba.head_dim)
    assert seen["dt"].dtype == torch.float32 and bool((seen["dt"] > 0).all())
    assert bool((seen["A"] < 0).all())


def test_a_share_of_the_heads_computes_its_share():
    """Half the rows of every projection give half of the heads, as tensor parallelism assumes."""
    config, whole, _ = mixer_pair(2)
    u_BSC = torch.randn(2, 9, config.hidden_size)
    total = torch.zeros(2, 9, config.hidden_size)
    inner, heads, state = config.d_inner, config.mamba_heads, config.mamba.n_groups * config.mamba.d_state
    for rank in range(2):

        def part(size, start=0, rank=rank):
            return torch.arange(start + rank * size // 2, start + (rank + 1) * size // 2)

        half = Mamba2Mixer(config)
        rows = torch.cat([part(inner), part(inner, inner), part(heads, 2 * inner)])
        groups = torch.cat([part(state), part(state, state)])
        half.in_proj.weight = nn.Parameter(whole.in_proj.weight[rows])
        half.bc_proj.weight = nn.Parameter(whole.bc_proj.weight[groups])
        half.out_proj.weight = nn.Parameter(whole.out_proj.weight[:, part(inner)])
        for name, index in (("conv_x", part(inner)), ("conv_bc", groups)):
            getattr(half, name).weight = nn.Parameter(getattr(whole, name).weight[index])
            getattr(half, name).bias = nn.Parameter(getattr(whole, name).bias[index])
        for name in ("A_log", "D", "dt_bias"):
            setattr(half.ssm, name, nn.Parameter(getattr(whole.ssm, name)[part(heads)]))
        half.norm.weight = nn.Parameter(whole.norm.weight[part(inner)])
        total = total + half(u_BSC, MixerInputs())
    torch.testing.assert_close(total, whole(u_BSC, MixerInputs()), atol=1e-5, rtol=1e-5)
