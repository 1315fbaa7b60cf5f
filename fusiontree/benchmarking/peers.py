"""Times training and decoding of Hugging Face's Falcon-H1 beside ours, in one run.

The peer has our layer sizes (hidden size, heads, state, groups, MLP width) and as many layers as come nearest to our
number of parameters; all its heads are global. It gets the same data, AdamW with fp32 master weights, FSDP2's mixed
precision, recomputation of every layer, cuDNN attention (decoding steps: flash attention), mamba_ssm's scan, and our
Triton convolution and chunked loss (its own need a package that is hard to build and the whole logits).

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusiontree.models.config import ModelConfig
from fusiontree.models.cuda_graph import GraphedStep
from fusiontree.models.flops import matrix_parameters, visible_keys
from fusiontree.ops.conv import causal_conv1d
from fusiontree.ops.cross_entropy import linear_cross_entropy
from fusiontree.utils.device import Mark
from fusiontree.utils.errors import UserError, nearest

log = logging.getLogger(__name__)

WARMUP_STEPS = 4
"""Tokens decoded before the clock starts."""
EAGER_STEPS = 64
"""Maximum number of tokens for which our eager decoding is timed."""

_PEER_CHUNK = 2048
"""Tokens per forward of the peer's prefill, if one forward over the whole text does not fit into memory."""

_CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
# cuDNN makes a plan for each number of keys, which grows by one per decoded token.
_CUDNN_LAST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def falcon_layer_parameters(config: ModelConfig) -> int:
    """Return the matrix parameters of one Falcon-H1 layer of our sizes."""
    hidden, inner = config.hidden_size, config.d_inner
    mamba = hidden * (2 * inner + 2 * config.mamba.n_groups * config.mamba.d_state + config.mamba_heads)
    heads = 2 * (config.num_heads + config.kv_heads) * config.attention_head_dim
    return mamba + inner * hidden + hidden * heads + 3 * hidden * config.mlp_size


def falcon_layers(config: ModelConfig) -> int:
    """Return the number of Falcon-H1 layers whose parameters come nearest to all our layers'."""
    ours = matrix_parameters(config) - config.vocab_size * config.hidden_size
    return max(1, round(ours / falcon_layer_parameters(config)))


def falcon_training_flops(config: ModelConfig, length: int) -> float:
    """Return the peer's FLOPs of training on one token, counted as ours are."""
    layers = falcon_layers(config)
    per_layer = 2.0 * falcon_layer_parameters(config)
    per_layer += 4 * config.attention_head_dim * config.num_heads * visible_keys(length) / length
    conv_channels = config.d_inner + 2 * config.mamba.n_groups * config.mamba.d_state
    per_layer += 7 * config.d_inner * config.mamba.d_state + 2 * config.mamba.d_conv * conv_channels
    return 3.0 * (layers * per_layer + 2.0 * config.vocab_size * config.hidden_size)


def choose_peers(asked: list[str] | None, obstacles: dict[str, str]) -> list[str]:
    """Return the names of the peers to time.

    Args:
        asked: names; empty means all that can run here, None none.
        obstacles: for each peer why it cannot run here, empty if it can.

    Raises:
        UserError: a name is unknown, or its peer cannot run here.
    """
    for name in asked or []:
        if name not in obstacles:
            raise UserError(f"--peers {name}: there is no such peer{nearest(name, obstacles)}; use llama or falcon")
        if obstacles[name]:
            raise UserError(f"--peers {name}: {obstacles[name]}")
    if asked is None or asked:
        return list(dict.fromkeys(asked or []))
    for name, reason in obstacles.items():
        if reason:
            log.info("peer %s is left out: %s", name, reason)
    return [name for name, reason in obstacles.items() if not reason]


def falcon_missing() -> str:
    """Return why the package of Falcon-H1 cannot be used; empty if it can."""
    if find_spec("transformers") and find_spec("transformers.models.falcon_h1"):
        return ""
    return "it needs transformers with Falcon-H1, 4.57 or newer; pip install 'fusiontree[hf]'"


def _modules() -> Any:
    from transformers.models.falcon_h1 import modeling_falcon_h1

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any) -> Any:
        return causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation).transpose(1, 2)

    # mamba_ssm's combined kernel calls the package causal-conv1d; without it the peer takes its step by step path.
    modeling_falcon_h1.mamba2_split_conv1d_scan_combined = lambda *args, **kwargs: None
    modeling_falcon_h1.causal_conv1d_fn = convolve
    return modeling_falcon_h1


def build_falcon(config: ModelConfig, length: int, device: torch.device) -> Any:
    """Return the peer with random fp32 weights on ``device``."""
    modeling = _modules()
    from transformers import FalconH1Config

    mamba = config.mamba
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": falcon_layers(config),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.attention_head_dim,
        "max_position_embeddings": length + 1024,
        "mamba_d_ssm": config.d_inner,
        "mamba_n_heads": config.mamba_heads,
        "mamba_d_head": mamba.head_dim,
        "mamba_n_groups": mamba.n_groups,
        "mamba_d_state": mamba.d_state,
        "mamba_d_conv": mamba.d_conv,
        "mamba_expand": mamba.expand,
        "mamba_chunk_size": mamba.chunk_size,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attn_implementation": "sdpa",
    }
    peer_config = FalconH1Config(**sizes)
    with torch.device(device):
        return modeling.FalconH1ForCausalLM(peer_config)


def train_falcon(
    config: ModelConfig, ids_BS: Tensor, labels_BS: Tensor, mesh: Any, device: torch.device, *, steps: int, warmup: int
) -> dict[str, Any]:
    """Time the peer's training steps on one micro batch; each row is one document."""
    model = build_falcon(config, ids_BS.shape[1], device)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids_BS, labels_BS = ids_BS.to(device), labels_BS.to(device)
    tokens = ids_BS.numel()

    def loss_of(model: Any) -> Tensor:
        hidden_BSC = model.model(input_ids=ids_BS, use_cache=False).last_hidden_state
        total, _ = linear_cross_entropy(hidden_BSC.flatten(0, 1), model.lm_head.weight, labels_BS.flatten())
        return total / tokens

    # FSDP2 gathers the root's own parameters (the head) in the root's forward: put the loss there.
    model.forward = lambda _: loss_of(model)
    ends: list[Mark] = []
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        for step in range(warmup + steps):
            if step == warmup:
                torch.cuda.synchronize()
                ends.append(Mark(device))
                torch.cuda.reset_peak_memory_stats()
            loss = model(ids_BS)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ends:
                ends.append(Mark(device))
    seconds = sorted(end.seconds_since(before) for before, end in pairwise(ends))[steps // 2]
    flops = falcon_training_flops(config, ids_BS.shape[1])
    result = {
        "name": "Falcon-H1 (transformers)",
        "documents_per_row": 1.0,
        "layers": falcon_layers(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_time_s": seconds,
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_per_gpu": tokens / seconds,
        "model_flops_per_token": flops,
        "model_tflops_per_gpu": tokens / seconds * flops / 1e12,
        "loss": float(loss.detach()),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    return result


@torch.no_grad()
def decode_falcon(config: ModelConfig, ids_BS: Tensor, device: torch.device, *, tokens: int) -> dict[str, Any]:
    """Fill the peer's cache with ``ids_BS`` and time steady decoding after it, in bf16.

    Raises:
        RuntimeError: this version of transformers returned no cache, without which a step sees one token only.
    """
    model = build_falcon(config, ids_BS.shape[1], device).to(torch.bfloat16).eval()
    ids_BS = ids_BS.to(device)
    torch.cuda.reset_peak_memory_stats()
    with sdpa_kernel([*_CUDNN_FIRST, SDPBackend.MATH], set_priority=True):
        try:
            out = _filled(model, ids_BS, ids_BS.shape[1])
        except torch.OutOfMemoryError:  # without mamba_ssm, its scan holds matrices of all pairs of a chunk's tokens
            out = None
        if out is None:
            out = _filled(model, ids_BS, _PEER_CHUNK)
    if out.past_key_values is None:
        raise RuntimeError("Falcon-H1 returned no cache; its decoding needs transformers 5 or newer")

    def step(state: Any) -> Any:
        return model(
            input_ids=state.logits[:, -1:].argmax(-1),
            past_key_values=state.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )

    with sdpa_kernel([*_CUDNN_LAST, SDPBackend.MATH], set_priority=True):
        return {"steps": "eager", **timed_decoding(out, step, ids_BS.shape[0], tokens)}


def _filled(model: Any, ids_BS: Tensor, chunk: int) -> Any:
    """Return the output of the last of the forwards over ``chunk`` tokens each that fill a new cache."""
    out, kept = None, None
    for part_BS in ids_BS.split(chunk, dim=1):
        out = model(input_ids=part_BS, past_key_values=kept, use_cache=True, logits_to_keep=1)
        kept = out.past_key_values
    return out


def columns_to_decode(length: int, tokens: int) -> int:
    """Return the tokens of the text that :func:`decode_ours` continues from ``length`` tokens."""
    return length + min(tokens, EAGER_STEPS) + tokens + 2 * WARMUP_STEPS


@torch.no_grad()
def decode_ours(model: Any, ids_BS: Tensor, device: torch.device, *, tokens: int) -> dict[str, Any]:
    """Fill our cache with ``ids_BS`` and time steady decoding after it by a CUDA graph, as ``generate`` does.

    Eager steps are timed first: ``eager_tokens_per_s``. If the step cannot be recorded as a graph, the figures are
    those of the eager steps, with the ``error``.
    """
    ids_BS = ids_BS.to(device)
    rows, length = ids_BS.shape
    torch.cuda.reset_peak_memory_stats()
    columns = columns_to_decode(length, tokens)
    cache = model.new_cache(rows, columns, dtype=torch.bfloat16, device=device)
    logits_BV = model(ids_BS, cache=cache, logits_to_keep=1).logits_BSV[:, -1]

    def eager_step(state: Tensor) -> Tensor:
        return model(state.argmax(-1, keepdim=True), cache=cache).logits_BSV[:, -1]

    eager = timed_decoding(logits_BV, eager_step, rows, min(tokens, EAGER_STEPS))
    cache.fix(columns)
    try:
        step = GraphedStep(model, cache)
    except RuntimeError as error:
        return {"steps": "eager", **eager, "error": str(error)}
    graphed = timed_decoding(logits_BV, lambda state: step(state.argmax(-1, keepdim=True)), rows, tokens)
    return {"steps": "cuda graph", **graphed, "eager_tokens_per_s": eager["tokens_per_s"]}


def timed_decoding(state: Any, step: Any, rows: int, tokens: int) -> dict[str, Any]:
    """Take steps from ``state`` and return tokens per second and memory."""
    for _ in range(WARMUP_STEPS):
        state = step(state)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(tokens):
        state = step(state)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "tokens_per_s": rows * tokens / seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "memory_gib": torch.cuda.memory_allocated() / 2**30,
    }
