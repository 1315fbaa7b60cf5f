"""Configurations of families of models in transformers, in terms of this project's settings."""

from __future__ import annotations

import math
from collections.abc import Callable

from fusiontree.convert.foreign_reading import TIED, Reading
from fusiontree.utils.errors import UserError


def _common(reading: Reading, *, epsilon: str, default_epsilon: float, tied: bool = False) -> None:
    """Read what every family has."""
    reading.set("norm", "norm_eps", reading.number(epsilon, default_epsilon, float))
    if not isinstance(tied := reading.take(TIED, tied), bool):
        raise UserError(f"{reading.foreign.file}: '{TIED}' is {tied!r}; it must be true or false")
    reading.set("embed", TIED, tied)
    if reading.take("max_position_embeddings") is not None:
        reading.foreign.longest = reading.number("max_position_embeddings", None)


def _rope(reading: Reading) -> None:
    """Read the rotary encoding: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``."""
    theta, partial = reading.take("rope_theta", 10000.0), reading.take("partial_rotary_factor", 1.0)
    scaling = reading.take("rope_scaling", {})
    parameters = reading.take("rope_parameters", scaling)
    if not isinstance(parameters, dict):
        raise UserError(f"{reading.foreign.file}: the rotary encoding's parameters are {parameters!r}, no mapping")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta", theta)
    partial = parameters.get("partial_rotary_factor", partial)
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if kind != "default" or nested:
        reading.obstacle("rope_scaling", "attention", f"is {parameters!r}; positions are never scaled here")
    if partial != 1.0:
        reading.obstacle("partial_rotary_factor", "attention", f"is {partial!r}; here all channels are rotated")
    reading.set("attention", "rope_theta", reading.checked("rope_theta", theta, float))


def _heads(reading: Reading, heads: int = 32, kv_heads: int | None = None, head_dim: int | None = None) -> int:
    """Read the heads of attention, with the defaults of the family; return their number."""
    heads = reading.number("num_attention_heads", heads)
    if kv_heads is None or reading.gives("num_key_value_heads"):
        kv_heads = heads
    reading.set("attention", "num_heads", heads)
    reading.set("attention", "num_kv_heads", reading.number("num_key_value_heads", kv_heads))
    width = head_dim or max(1, reading.number("hidden_size", 4096) // heads)
    reading.set("attention", "head_dim", reading.number("head_dim", width))
    return heads


def _attention(reading: Reading, window: int | None, heads: int) -> None:
    """State which tokens the heads see: all, or a window."""
    reading.set("attention", "global_heads", heads if window is None else 0)
    if window is not None:
        reading.set("attention", "window_size", window)
        reading.set("attention", "attention_type", "local_global")


def _llama(
    reading: Reading, window: int | None = None, tied: bool = False, activation: str = "silu", **family: int
) -> None:
    """Read a configuration of Llama's family, whose defaults of heads are given."""
    _common(reading, epsilon="rms_norm_eps", default_epsilon=1e-6, tied=tied)
    _rope(reading)
    _attention(reading, window, _heads(reading, **family))
    reading.only("attention_bias", False, False, "attention")
    _mlp(reading, activation=activation)


def _mlp(reading: Reading, key: str = "hidden_act", activation: str = "silu") -> None:
    """State what the MLP of a transformer block has that ours has not."""
    why = "reads the residual stream after attention, normalized again; here it reads the branches' outputs"
    reading.obstacle("mlp", "model", why)
    if (given := reading.take(key, activation)) in ("silu", "swish"):
        reading.set("mlp", "mlp_activation", "swiglu")
    else:
        reading.obstacle(key, "mlp", f"is '{given}'; a gated MLP uses silu here")
    reading.only("mlp_bias", False, False, "mlp")


def _mistral(reading: Reading) -> None:
    window = reading.take("sliding_window")
    if window is None and not reading.gives("sliding_window"):
        window = 4096
    _llama(reading, None if window is None else reading.checked("sliding_window", window, int), kv_heads=8)


def _qwen2(reading: Reading) -> None:
    for key in ("sliding_window", "max_window_layers"):
        reading.take(key)  # no effect without use_sliding_window
    _llama(reading, kv_heads=32)
    reading.only("use_sliding_window", False, False, "attention")
    kinds = reading.take("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        reading.obstacle("layer_types", "attention", f"is {kinds!r}; here all layers are alike")
    reading.obstacle("qkv_bias", "attention", "is added to queries, keys and values; here they have no bias")


def _gemma(reading: Reading) -> None:
    reading.take("hidden_activation")  # says the same as hidden_act
    _llama(reading, tied=True, activation="gelu_pytorch_tanh", heads=16, kv_heads=16, head_dim=256)
    reading.obstacle("norm_style", "norm", "multiplies by 1 + weight; here norms multiply by the weight")
    reading.obstacle("embedding_scale", "embed", "is sqrt(hidden_size); here embeddings are not scaled")
    reading.only("use_bidirectional_attention", False, False, "attention")


def _mamba(reading: Reading, names: dict[str, str], defaults: dict[str, int]) -> None:
    """Read sizes and step limits of Mamba-2 mixers; ``names`` are the file's keys by our setting."""
    for ours, theirs in names.items():
        reading.set("mamba", f"mamba.{ours}", reading.number(theirs, defaults[ours]))
    limits = reading.take("time_step_limit", [0.0, math.inf])
    if not isinstance(limits, list) or len(limits) != 2:
        raise UserError(f"{reading.foreign.file}: 'time_step_limit' is {limits!r}, and two numbers are expected")
    low, high = (math.inf if isinstance(x, dict) or x is None else x for x in limits)  # {"__float__": "Infinity"}
    reading.set("mamba", "mamba.dt_min", reading.checked("time_step_limit", low, float) if low else None)
    reading.set("mamba", "mamba.dt_max", None if high == math.inf else reading.checked("time_step_limit", high, float))
    reading.set("mamba", "srte_encoding", "none")


def _mamba2(reading: Reading) -> None:
    _common(reading, epsilon="layer_norm_epsilon", default_epsilon=1e-5)
    names = {"head_dim": "head_dim", "d_state": "state_size", "n_groups": "n_groups", "d_conv": "conv_kernel"}
    defaults = {"head_dim": 64, "d_state": 128, "n_groups": 8, "d_conv": 4, "expand": 2}
    _mamba(reading, names | {"expand": "expand"}, defaults)
    reading.set("mamba", "mamba.norm_groups", reading.number("n_groups", 8))
    reading.only("hidden_act", "silu", "silu", "mamba")
    reading.only("use_bias", False, False, "mamba")
    reading.take("num_heads")  # expand * hidden_size / head_dim


_HYBRID = {"head_dim": "mamba_d_head", "d_state": "mamba_d_state", "n_groups": "mamba_n_groups"}
_HYBRID |= {"d_conv": "mamba_d_conv"}
_HYBRID_DEFAULTS = {"head_dim": 64, "d_state": 256, "n_groups": 1, "d_conv": 4}


def _hybrid(reading: Reading, inner: int) -> None:
    """Read what Falcon-H1 and Bamba share; ``inner`` is the inner width of their Mamba mixers."""
    _common(reading, epsilon="rms_norm_eps", default_epsilon=1e-5)
    _rope(reading)
    _attention(reading, None, _heads(reading, kv_heads=8))
    heads = reading.number("mamba_n_heads", 128)
    names = dict(_HYBRID)
    if reading.take("mamba_d_head", "auto") == "auto":
        names.pop("head_dim")
        reading.set("mamba", "mamba.head_dim", max(1, inner // heads))
    _mamba(reading, names, _HYBRID_DEFAULTS)
    reading.set("mamba", "mamba.norm_groups", reading.number("mamba_n_groups", 1))
    hidden = reading.number("hidden_size", 4096)
    if inner % hidden:
        reading.obstacle("mamba_d_ssm", "mamba", f"is {inner}, no multiple of hidden_size {hidden}")
    else:
        reading.set("mamba", "mamba.expand", inner // hidden)
    reading.only("mamba_proj_bias", False, False, "mamba")
    reading.only("attention_bias", False, False, "attention")
    _mlp(reading)


def _falcon_h1(reading: Reading) -> None:
    expanded = reading.number("mamba_expand", 2) * reading.number("hidden_size", 4096)
    null = reading.gives("mamba_d_ssm") and reading.take("mamba_d_ssm") is None
    inner = expanded if null else reading.number("mamba_d_ssm", 1024)
    _hybrid(reading, inner)
    multipliers = {"embedding": "embed", "lm_head": "embed", "key": "attention", "attention_in": "attention"}
    multipliers |= {"attention_out": "attention", "ssm_in": "mamba", "ssm_out": "mamba"}
    for name, part in multipliers.items():
        reading.only(f"{name}_multiplier", 1.0, 1.0, part)
    reading.only("ssm_multipliers", [1.0] * 5, [1.0] * 5, "mamba")
    reading.only("mlp_multipliers", [1.0] * 2, [1.0] * 2, "mlp")
    reading.only("projectors_bias", False, False, "attention")
    reading.only("mamba_rms_norm", True, False, "mamba")
    reading.only("mamba_norm_before_gate", False, True, "mamba")


def _bamba(reading: Reading) -> None:
    inner = reading.number("mamba_expand", 2) * reading.number("hidden_size", 4096)
    _hybrid(reading, inner)
    reading.take("attn_layer_indices")  # the map says which layers have which mixer
    reading.obstacle("partial_rotary_factor", "attention", "is 0.5; here all channels are rotated")


def _qwen3_next(reading: Reading) -> None:
    """Read Gated DeltaNet; what its attention and its mixture of experts have, ours have not."""
    _common(reading, epsilon="rms_norm_eps", default_epsilon=1e-6)
    norms = "multiplies by 1 + weight; here norms multiply by the weight, so the map must add 1"
    reading.obstacle("norm_style", "norm", norms)
    _rope(reading)
    _attention(reading, None, _heads(reading, heads=16, kv_heads=2, head_dim=256))
    reading.only("attention_bias", False, False, "attention")
    reading.obstacle("partial_rotary_factor", "attention", "is 0.25 unless stated; here all channels are rotated")
    why = "multiplies attention's output, and queries and keys are normalized; attention has neither here"
    reading.obstacle("attention_gate", "attention", why)
    for key in ("layer_types", "full_attention_interval"):
        reading.take(key)  # the map says which layers have which mixer
    _mlp(reading)
    reading.only("hidden_act", "silu", "silu", "delta")  # of the convolutions, too
    for key in ("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "shared_expert_intermediate_size"):
        reading.take(key)
    for key in ("num_experts_per_tok", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef"):
        reading.take(key)
    if (experts := reading.take("num_experts", 512)) != 0:
        reading.obstacle("num_experts", "mlp", f"is {experts!r}; here each layer has one MLP")
    heads, key_heads = reading.number("linear_num_value_heads", 32), reading.number("linear_num_key_heads", 16)
    width = reading.number("linear_value_head_dim", 128)
    sizes = {"key_dim": reading.number("linear_key_head_dim", 128), "value_dim": width}
    sizes |= {"heads_per_key": heads // key_heads, "d_conv": reading.number("linear_conv_kernel_dim", 4)}
    for name, value in sizes.items():
        reading.set("delta", f"mixers.gated_delta_net.{name}", value)
    expand = heads * width / reading.number("hidden_size", 2048)
    reading.set("delta", "mixers.gated_delta_net.expand", expand)
    reading.set("delta", "srte_encoding", "none")


FAMILIES: dict[str, Callable[[Reading], None]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "gemma": _gemma,
    "mamba2": _mamba2,
    "falcon_h1": _falcon_h1,
    "bamba": _bamba,
    "qwen3_next": _qwen3_next,
}
"""Readers by ``model_type``."""
